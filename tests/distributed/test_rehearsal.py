"""Rehearsals of large jobs on one machine, held to real ranks, and to engines whose order is wrong on one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from msdiff_dist.apps.train.phases import phases
from msdiff_dist.apps.train.plan import plan_phases, plan_run
from msdiff_dist.apps.train.rehearsal import ranks_to_rehearse
from msdiff_dist.apps.train.rehearsal_report import STEP, render, report, run_report
from msdiff_dist.apps.train.rehearsed_rank import rehearse_rank
from msdiff_dist.cli.main import app
from msdiff_dist.distributed.collective_trace import CollectiveTrace
from msdiff_dist.distributed.engines import StageParallelEngines
from msdiff_dist.recipe import recipe_from
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

SHARED_RANKS = [[0, 1], [0, 1, 2]]


@pytest.fixture(autouse=True)
def _local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed wants it


def rehearsed(world_size: int, **changes: Any) -> dict[str, Any]:
    recipe = recipe_from(recipe_of(ADAM, train__global_batch_size=24 * world_size, **changes))
    plan = plan_run(recipe, world_size)
    return report(world_size, [rehearse_rank(recipe, plan, r) for r in ranks_to_rehearse(plan.placement)])


@pytest.mark.parametrize("zero_decoders", [1, 2])
def test_collectives_do_not_grow_with_the_number_of_ranks(zero_decoders: int) -> None:
    accumulation = 2
    changes = {"parallel__zero_decoders": zero_decoders, "train__gradient_accumulation_steps": accumulation}
    few, many = rehearsed(8, **changes), rehearsed(64, **changes)
    assert few["orders_agree"]
    assert many["orders_agree"]
    # Of a rank with one stage: a reduction (one for each micro batch under ZeRO 2) and a gather of each of its two
    # parts, an exchange for each micro batch, and what the ranks agree on.
    reductions = 1 + (1 if zero_decoders == 1 else accumulation)
    assert many["ranks"]["collectives_per_step"] <= reductions + 2 + accumulation + 1
    assert [(row["group"], row["calls"]) for row in many["ranks"]["by_group"]] == [
        (row["group"], row["calls"]) for row in few["ranks"]["by_group"]
    ]


def test_bytes_are_those_of_the_weights() -> None:
    found = rehearsed(64)
    recipe = recipe_from(recipe_of(ADAM, train__global_batch_size=24 * 64))
    costs = plan_run(recipe, 64).costs
    bytes_of = {row["group"]: row["bytes"] for row in found["ranks"]["by_group"]}
    for title, part in [("shared", costs.encoder), *((f"stage {k}", d) for k, d in enumerate(costs.decoders))]:
        # A reduction and a gather of all fp32 elements, of which padding to equal ranges makes a few more.
        assert 8 * part.params <= bytes_of[title] <= 8 * part.params * 1.2


def real(rank: int, mapping: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    with open_run(rank, 2, mapping, path) as run:
        run.step(1e-3)
        with CollectiveTrace() as trace:
            run.step(1e-3)
    return [(call.kind, call.what) for call in trace.calls]


def test_a_rehearsal_does_what_real_ranks_do(tmp_path: Path) -> None:
    mapping = recipe_of(ADAM, parallel__placement=SHARED_RANKS)
    recipe = recipe_from(mapping)
    plan = plan_run(recipe, 2)
    for rank, calls in enumerate(run_distributed(real, 2, mapping, tmp_path / "run")):
        steps = [c for c in rehearse_rank(recipe, plan, rank).calls if c.phase == STEP]
        # gloo has no reduce-scatter: an exchange of the same bytes stands for it there.
        as_gloo = [("all_to_all", "") if c.kind == "reduce_scatter" else (c.kind, c.what) for c in steps]
        assert as_gloo == calls


def test_a_rank_whose_stages_are_in_another_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rehearsed(2, parallel__placement=SHARED_RANKS)["orders_agree"]
    make = StageParallelEngines.__init__

    def backwards(self: StageParallelEngines, *args: Any) -> None:
        make(self, *args)
        if torch.distributed.get_rank() == 1:
            self.stages = dict(reversed(self.stages.items()))

    monkeypatch.setattr(StageParallelEngines, "__init__", backwards)
    found = rehearsed(2, parallel__placement=SHARED_RANKS)
    assert not found["orders_agree"]
    assert "rank 1 issues" in found["disagreement"]
    assert "of stage 0 (" in found["disagreement"]
    assert "of stage 1 (" in found["disagreement"]


def test_each_phase_of_a_run_is_rehearsed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    ends = {"at": [None, 9, None]}
    recipe.write_text(yaml.safe_dump(recipe_of(ADAM, train__steps=20, stages__end=ends) | {"grow": {"at": 4}}))
    command = [sys.executable, "-m", "msdiff_dist.cli.main", "plan", str(recipe), "--world-size", "6", "--rehearse"]
    found = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True).stdout)
    assert [(p["first"], p["last"], p["about"]) for p in found["phases"]] == [
        (1, 4, "unified"), (5, 9, "3 stages"), (10, 20, "3 stages without 1"),
    ]  # fmt: skip
    planned = plan_phases(recipe_from(yaml.safe_load(recipe.read_text())), 6)
    for phase, (_, plan) in zip(found["phases"], planned, strict=True):
        assert phase["orders_agree"]
        assert phase["rehearsed"] == ranks_to_rehearse(plan.placement)
        sizes = {row["group"]: row["size"] for row in phase["ranks"]["by_group"] if row["group"].startswith("stage")}
        holders = {f"stage {k}": len(plan.placement.group(k)) for k in range(plan.placement.num_stages)}
        assert sizes == {title: size for title, size in holders.items() if size}
    del found["phases"][1]["first"], found["phases"][1]["last"], found["phases"][1]["about"]
    assert {**found, "phases": None} == {**found["phases"][1], "phases": None}


def test_a_phase_whose_orders_disagree_is_named(tmp_path: Path) -> None:
    recipe = recipe_from(recipe_of(ADAM, train__steps=20, stages__end={"at": [None, 9, None]}))
    good, bad = rehearsed(2), rehearsed(2) | {"orders_agree": False, "disagreement": "rank 1 issues nothing"}
    assert run_report(phases(recipe), [good, good], 0)["orders_agree"]
    found = run_report(phases(recipe), [good, bad], 0)
    assert (found["orders_agree"], found["disagreement"]) == (False, "in steps 10-20, rank 1 issues nothing")
    shown = Console(width=200)
    with shown.capture() as text:
        shown.print(render(found, "run"))
    assert "3 stages without 1" in text.get()
    assert "in steps 10-20, rank 1 issues nothing" in text.get()


EXTENSION = """
import torch
from msdiff_dist.distributed.engines import StageParallelEngines

make = StageParallelEngines.__init__


def more_on_rank_0(self, *args):
    make(self, *args)
    if torch.distributed.get_rank() == 0:
        torch.distributed.all_reduce(torch.zeros(3))


StageParallelEngines.__init__ = more_on_rank_0
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(ADAM)))
    # In a process of its own, whose output holds nothing but the report.
    command = [sys.executable, "-m", "msdiff_dist.cli.main", "plan", str(recipe), "--world-size", "6", "--rehearse"]
    found = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True).stdout)
    assert (found["world_size"], found["orders_agree"], found["phases"]) == (6, True, [])
    groups = [(row["group"], row["size"], row["calls"]) for row in found["ranks"]["by_group"]]
    assert groups == [
        ("stage 0", 3, 2), ("stage 1", 2, 2), ("stage 2", 1, 0), ("shared", 6, 2), ("routing", 6, 1),
        ("agreement", 6, 1),
    ]  # fmt: skip
    (tmp_path / "one_more.py").write_text(EXTENSION)
    recipe.write_text(yaml.safe_dump(recipe_of(ADAM) | {"extensions": ["one_more"]}))
    monkeypatch.syspath_prepend(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(recipe), "--world-size", "6", "--rehearse"])
    assert result.exit_code == 2
    assert "do not fit together" in " ".join(result.stdout.split())
