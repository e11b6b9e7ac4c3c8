from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from msdiff_dist.distributed.engine_costs import Workload
from msdiff_dist.distributed.gpus import GPUS
from msdiff_dist.distributed.memory import rank_bytes_W
from msdiff_dist.distributed.placement import Placement, StageSets, plan
from msdiff_dist.distributed.plan_report import plan_report, reduced_bytes, render, samples_crossing
from msdiff_dist.distributed.router import Assignment
from tests.unit.distributed.traces import model_trace

COSTS = [4.0, 2.0, 1.0]
OVERLAPPING: StageSets = ((0,), (0, 1), (1, 2), (2,))


def placed(quotas: list[int], world_size: int, accumulation: int = 1, explicit: StageSets | None = None) -> Placement:
    m = np.arange(accumulation)[:, None]
    return plan(
        np.array(quotas) * (m + 1) // accumulation - np.array(quotas) * m // accumulation, COSTS, world_size, explicit
    )


def workload(**changes: Any) -> Workload:
    return Workload(
        **{"cost_K": COSTS, "shared_params": 1000, "stage_params_K": [600, 300, 90], "payload_bytes": 10} | changes
    )


def test_report_of_a_placement() -> None:
    placement = placed([8, 8, 8], 3, explicit=((0,), (1,), (2,)))
    report = plan_report(placement, workload(), model_trace(3), warnings=["watch out"])
    assert json.loads(json.dumps(report)) == report
    assert report["world_size"] == 3
    assert report["global_batch_size"] == 24
    assert report["balance"] == pytest.approx(7 / 3 / 4)
    assert [s["work_share"] for s in report["stages"]] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert [s["ranks"] for s in report["stages"]] == [[0], [1], [2]]
    assert [r["rank"] for r in report["ranks"]] == [0, 1, 2]
    assert [r["samples"] for r in report["ranks"]] == [{"0": 8}, {"1": 8}, {"2": 8}]
    assert [r["load"] for r in report["ranks"]] == pytest.approx([12 / 7, 6 / 7, 3 / 7], abs=1e-4)
    assert report["warnings"] == ["watch out"]
    assert set(report["bytes_per_step"]) == {"routed", "reduced"}


@pytest.mark.parametrize(
    ("precision", "zero_shared", "bytes_of_rank_0"),
    [
        ("fp32", 1, 1000 * 4 + 250 * 16 + 600 * 4 + 300 * 16),
        ("bf16", 2, 1000 * 2 + 250 * 16 + 600 * 2 + 300 * 16),
        ("fp32", 3, 250 * 20 + 600 * 4 + 300 * 16),
        ("bf16", 3, 250 * 18 + 600 * 2 + 300 * 16),
    ],
)
def test_state_bytes(precision: str, zero_shared: int, bytes_of_rank_0: int) -> None:
    placement = placed([8, 8, 8], 4, explicit=OVERLAPPING)
    bytes_W = rank_bytes_W(placement, workload(precision=precision, zero_shared=zero_shared), model_trace(3))
    state_W = [of_rank.state for of_rank in bytes_W]
    assert state_W[0] == bytes_of_rank_0
    assert state_W[1] - state_W[0] == 300 * (2 if precision == "bf16" else 4) + 150 * 16


def test_reduced_bytes() -> None:
    placement = placed([8, 8, 8], 4, accumulation=2, explicit=OVERLAPPING)
    stages = 600 + 300 + 90  # every group has two ranks
    assert reduced_bytes(placement, workload()) == 4 * (3 * 1000 * 2 + stages * 2)
    assert reduced_bytes(placement, workload(zero_shared=3, zero_decoders=2)) == 4 * (3 * 1000 * 6 + stages * 3)
    # Gradients are reduced in fp32, parameters are gathered in the training precision.
    assert reduced_bytes(placement, workload(precision="bf16")) == (4 + 2) * (3 * 1000 + stages)
    assert reduced_bytes(placed([8, 8, 8], 1), workload(precision="bf16")) == 0


@pytest.mark.parametrize(
    ("quotas", "world_size"), [([16, 16, 16], 4), ([30, 7, 11], 5), ([12, 12, 12], 2), ([9, 3, 5], 1)]
)
def test_expected_crossings_are_the_mean_of_the_router(quotas: list[int], world_size: int) -> None:
    placement, batch = placed(quotas, world_size), sum(quotas)
    rng = np.random.default_rng(0)
    source_B = np.arange(batch) % world_size
    crossings = []
    for _ in range(1500):
        stage_B = rng.permutation(np.repeat(np.arange(3), quotas))
        assignment = Assignment(stage_B=stage_B, micro_B=np.zeros_like(stage_B), source_B=source_B, placement=placement)
        crossings.append((assignment.dest_B != source_B).sum())
    error = np.std(crossings) / np.sqrt(len(crossings))
    assert samples_crossing(placement) == pytest.approx(np.mean(crossings), abs=4 * error + 1e-9)


def test_report_for_a_gpu() -> None:
    placement = placed([8, 8, 8], 3, explicit=((0,), (1,), (2,)))
    report = plan_report(placement, workload(), model_trace(3), gpu=GPUS["h100-80g"])
    assert json.loads(json.dumps(report)) == report
    assert report["gpu"]["fits"]
    assert 0 < report["gpu"]["mfu"] < 1
    assert report["gpu"]["images_per_second"] == pytest.approx(24 / report["step_seconds"])
    assert max(r["compute_seconds"] for r in report["ranks"]) < report["step_seconds"]
    console = Console(width=80, file=io.StringIO())
    console.print(render(report, "recipe"))
    printed = console.file.getvalue()
    assert "h100-80g: fits" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_tables_compress_large_worlds() -> None:
    for world_size, rows in [(5, 5), (640, 3)]:
        report = plan_report(placed([32 * world_size] * 3, world_size), workload(), model_trace(3))
        console = Console(width=120, file=io.StringIO())
        console.print(render(report, "recipe"))
        lines = console.file.getvalue().splitlines()
        first = next(i for i, line in enumerate(lines) if " rank " in line)
        assert sum(line.startswith("│") for line in lines[first:]) == rows
        assert any(f"of {world_size} ranks" in line for line in lines)


def test_frozen_parts_and_stages_without_samples() -> None:
    placement = placed([8, 0, 8], 4, explicit=((0,), (0,), (2,), (2,)))
    work = workload(shared_frozen=1000, stage_frozen_K=[0, 300, 40])
    report = plan_report(placement, work, model_trace(3), ranks_per_node=2, gpu=GPUS["h100-80g"])
    assert report["frozen"] == {"shared": 1000, "stages": [0, 300, 40], "parameters": 1990, "trained": 650}
    assert report["stages"][1] == {"work_share": 0.0, "ranks": [], "samples": 0}
    assert report["nodes"]["of_stage"] == [1, 0, 1]
    # Groups of two ranks send each value once to reduce it and once to gather it, in fp32.
    assert report["bytes_per_step"]["reduced"] == (600 + 50) * (4 + 4)
    assert report["nodes"]["reduced_between"] == 0
    file = io.StringIO()
    Console(file=file, width=200).print(render(report, "title"))
    assert "no samples are drawn of stage 1: they would train nothing" in file.getvalue()
    assert plan_report(placed([8] * 3, 3), workload(), model_trace(3))["frozen"] is None
