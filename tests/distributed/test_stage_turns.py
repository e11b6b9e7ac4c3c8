"""Decoders that do not step on every batch: what they do when they do not, and when they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.distributed.engines import Turn
from msdiff_dist.recipe import recipe_from
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of, trained

pytestmark = pytest.mark.distributed

SOMETIMES = {"stages__min_samples_per_step": 20, "stages__sampling": [3, 1, 2]}
ONE_STAGE = {"stages__batch": "one_stage", "stages__min_samples_per_step": 30}


def decoders_of(run: object) -> dict[str, torch.Tensor]:
    engines = run.engines.stages  # type: ignore[attr-defined]
    return {f"{k}.{n}": p.detach().clone() for k, e in engines.items() for n, p in e.module.named_parameters()}


def gathered(rank: int, path: Path) -> float:
    """Two batches of 12, of which the second steps on both, beside one batch of the same 24 samples."""
    frozen = {"train__freeze": ["shared"]}
    whole = open_run(rank, 1, recipe_of(ADAM, train__gradient_accumulation_steps=2, **frozen), path / "whole")
    parts = open_run(rank, 1, recipe_of(ADAM, stages__min_samples_per_step=16, **frozen), path / "parts")
    before = decoders_of(parts)
    for number, micro in enumerate(whole.feed.next_batch()):
        batch = whole.prepare(micro)
        for run, size in ((whole, 24), (parts, 12)):
            run.engines.forward_backward(
                batch.inputs, micro.rows, lambda k, output, rows, n=size: (output.float() - 1).square().sum() / n
            )
        turns = [Turn(4, 4 * number, steps=bool(number)) for _ in range(3)]
        gradients = parts.engines.reduce(parts.engines.agreement(turns))
        assert bool(gradients.norm > 0) == bool(number), "the norm is that of parts that step"
        gradients.step(1e-3)
        if not number:
            assert all(torch.equal(w, before[name]) for name, w in decoders_of(parts).items())
    whole.engines.reduce(whole.engines.agreement()).step(1e-3)
    for run in (whole, parts):
        run.feed.close()
    expected = decoders_of(whole)
    assert max(float((w - before[name]).abs().max()) for name, w in expected.items()) > 1e-4
    return max(float((w - expected[name]).abs().max()) for name, w in decoders_of(parts).items())


def test_gathered_batches_are_one_large_batch(tmp_path: Path) -> None:
    (difference,) = run_distributed(gathered, 1, tmp_path)
    assert difference < 1e-6


def one_stage_steps(rank: int, world_size: int, path: Path) -> list[list[int]]:
    """Steps of batches of one stage each: nothing of the other decoders moves."""
    mapping = recipe_of({**ADAM, "weight_decay": 0.5}, stages__batch="one_stage", stages__sampling=[2, 1, 1])
    found = []
    with open_run(rank, world_size, mapping, path) as run:
        for _ in range(6):
            before = run.saver._copy.take()
            before = {key: value.clone() for key, value in before.items()}
            samples = run.step(1e-3).samples_per_stage
            after = run.saver._copy.take()
            moved = {key.split("/")[1].split("@")[0] for key, v in before.items() if not torch.equal(v, after[key])}
            parts = {".".join(name.split(".")[:2]) for name in moved if name.startswith("stages.")}
            assert parts <= {f"stages.{k}" for k, n in enumerate(samples) if n}
            assert parts or not all(k in run.engines.stages for k, n in enumerate(samples) if n)
            assert any(name.startswith("shared.") for name in moved)
            found.append(samples)
    return found


def test_only_the_decoder_of_the_stage_moves(tmp_path: Path) -> None:
    first, second = run_distributed(one_stage_steps, 2, 2, tmp_path)
    assert first == second
    assert all(sorted(samples) == [0, 0, 24] for samples in first)
    assert len({tuple(samples) for samples in first}) > 1


@pytest.mark.parametrize("changes", [SOMETIMES, ONE_STAGE], ids=["gathering", "one stage"])
def test_resumes_at_any_step_on_other_ranks(tmp_path: Path, changes: dict[str, object]) -> None:
    """A run that stops at every step, each time on other ranks, and one that never stops."""
    ((reference, _),) = run_distributed(trained, 1, 1, recipe_of(ADAM, **changes), tmp_path / "whole", [6])
    losses: list[float] = []
    for step, world_size in enumerate((2, 1, 3, 1, 3, 1), start=1):
        layout = {"parallel__placement": [[0], [0, 1], [1, 2]]} if world_size == 3 else {}
        mapping = recipe_of(ADAM, **changes, **layout)
        losses += run_distributed(trained, world_size, world_size, mapping, tmp_path / "parts", [step])[0][0]
    assert losses == pytest.approx(reference, rel=1e-5)
    whole, parts = (
        json.loads((tmp_path / name / "checkpoints/step_00000006/checkpoint.json").read_text())["stages"]
        for name in ("whole", "parts")
    )
    assert parts == whole
    assert any(parts["gathered"]), "gradients wait in the last checkpoint"
    assert max(parts["steps"]) >= 1


ADAPTIVE = [
    pytest.param({"by": "gradient_variance", "every": 8, "min_share": 0.17, "rate": 1.0}, True, 10, id="variance"),
    pytest.param({"by": "progress", "every": 8, "min_share": 0.17}, False, 18, id="progress"),
]


def adapting(rank: int, world_size: int, mapping: dict[str, Any], path: Path, stops: list[int]) -> list[Any]:
    with open_run(rank, world_size, mapping, path) as run:
        found = []
        while run.state.step < stops[-1]:
            outcome = run.step(5e-4)
            found.append((outcome.loss, outcome.samples_per_stage, run.petaflops))
            run.save_if_due(now=run.state.step in stops)
    return found


@pytest.mark.parametrize(("adaptive", "weighted", "stop"), ADAPTIVE)
def test_adaptive_shares(tmp_path: Path, adaptive: dict[str, object], weighted: bool, stop: int) -> None:
    """One process beside three ranks, then four, which resume between a decision and the step from which it holds."""
    changes = {"stages__adaptive": adaptive, "stages__importance_weights": weighted}
    last = stop + 6
    (whole,) = run_distributed(adapting, 1, 1, recipe_of(ADAM, **changes), tmp_path / "whole", [last])
    parts: list[Any] = []
    for end, placement in ((stop, [[0], [0, 1], [1, 2]]), (last, [[0], [0], [1], [2]])):
        mapping = recipe_of(ADAM, **changes, parallel__placement=placement)
        ranks = run_distributed(adapting, len(placement), len(placement), mapping, tmp_path / "parts", [end])
        assert all(found == ranks[0] for found in ranks)
        parts += ranks[0]
    samples = [found[1] for found in whole]
    assert [found[1] for found in parts] == samples
    assert [found[0] for found in parts] == pytest.approx([found[0] for found in whole], rel=1e-5)
    changed = [step for step in range(1, last) if samples[step] != samples[step - 1]]
    assert changed == [stop + 2], "from the fifth step after the decision on"
    assert all(sum(of_step) == 24 and min(of_step) >= 4 for of_step in samples)
    # Operations are those of the samples that there were.
    costs = plan_run(recipe_from(recipe_of(ADAM)), 1).cost_K
    assert whole[-1][2] == pytest.approx(6e-15 * float(np.dot(np.sum(samples, axis=0), costs)))
    assert parts[-1][2] == whole[-1][2]
