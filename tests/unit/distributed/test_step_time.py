"""Times of kernels, rings and steps, against closed forms."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from msdiff_dist.distributed.engine_costs import Workload
from msdiff_dist.distributed.gpus import GPUS, Gpu
from msdiff_dist.distributed.placement import plan
from msdiff_dist.distributed.step_time import kernel_seconds, ring_seconds, step_time
from msdiff_dist.models.trace import ModelTrace
from tests.unit.distributed.traces import part_trace

# Round numbers, and nothing lost on the way.
GPU: Gpu = dataclasses.replace(
    GPUS["h100-80g"], tflops=100, tf32_tflops=50, fp32_tflops=10, bandwidth=1000, link=100, network=10,
    compute_efficiency=1, bandwidth_efficiency=1, link_efficiency=1, kernel_us=0, dispatch_us=0, hop_us=0,
)  # fmt: skip


def workload(**changes: Any) -> Workload:
    fields = {"cost_K": [1.0, 1.0], "shared_params": 0, "stage_params_K": [0, 0], "payload_bytes": 0, "on_gpus": True}
    return Workload(**(fields | {"precision": "bf16", "channels_last": True} | changes))


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic() -> None:
    much, little = part_trace([], 0, flops=10**9).kernels, part_trace([], 0, flops=1).kernels
    assert kernel_seconds(much, 8, GPU, workload()) == pytest.approx(8e9 / 100e12)
    assert kernel_seconds(much, 8, GPU, workload(precision="fp32", tf32=True)) == pytest.approx(8e9 / 50e12)
    assert kernel_seconds(much, 8, GPU, workload(precision="fp32")) == pytest.approx(8e9 / 10e12)
    assert kernel_seconds(little, 8, GPU, workload()) == pytest.approx(8 * 10 / 1e12)
    # Images that change their memory format are read and written once more.
    assert kernel_seconds(little, 8, GPU, workload(channels_last=False)) == pytest.approx(8 * (10 + 2 * 4) / 1e12)
    slow_host = dataclasses.replace(GPU, dispatch_us=10, kernel_us=2)
    assert kernel_seconds(little, 8, slow_host, workload()) == pytest.approx(10e-6)
    assert kernel_seconds(much, 8, slow_host, workload()) == pytest.approx(8e9 / 100e12 + 2e-6)


def test_rings() -> None:
    assert ring_seconds(10**9, [3], GPU, 8) == 0
    assert ring_seconds(10**9, range(4), GPU, 8) == pytest.approx(3 / 4 * 1e9 / 100e9)
    # Two nodes of four: four network cards each. One rank on each of two nodes: one card each.
    assert ring_seconds(10**9, range(8), GPU, 4) == pytest.approx(7 / 8 * 1e9 / 40e9)
    assert ring_seconds(10**9, [0, 4], GPU, 4) == pytest.approx(1 / 2 * 1e9 / 10e9)
    assert ring_seconds(0, range(5), dataclasses.replace(GPU, hop_us=3), 8) == pytest.approx(4 * 3e-6)


def test_a_step() -> None:
    trace = ModelTrace(
        shared=part_trace([], 0, flops=6 * 10**9),
        stages=(part_trace([], 0, flops=6 * 10**9), part_trace([], 0, flops=3 * 10**9)),
    )
    # Costs are multiply-adds of the forward pass: 6 operations each.
    work = workload(cost_K=[2e9, 1.5e9], shared_params=10**6, stage_params_K=[10**6, 10**6])
    placement = plan(np.array([[20, 20]]), work.cost_K, 4, ((0,), (0,), (1,), (1,)))
    time = step_time(placement, work, trace, GPU, None)
    assert time.compute_W == pytest.approx([10 * 12e9 / 100e12] * 2 + [10 * 9e9 / 100e12] * 2)
    # A stage's reduction hides behind the encoder's backward pass, its gather behind the forward pass.
    reduction, gather = (3 / 4 * 1e6 * size / 100e9 for size in (4, 2))
    optimizer = (1e6 / 4 + 1e6 / 2) * (4 * 7 + 2 + 12 + 4) / 1e12
    assert time.optimizer == pytest.approx(optimizer)
    assert time.step == pytest.approx(time.compute_W.max() + reduction + gather + optimizer)
    assert time.exposed == pytest.approx(reduction + gather)
    assert time.communication == pytest.approx(reduction + gather + (4 + 2) * 1e6 / 2 / 100e9)
    flops = 6 * (20 * 2e9 + 20 * 1.5e9)
    assert time.utilisation(GPU, work) == pytest.approx(flops / (4 * 100e12 * time.step))
    # A slow link between nodes is not hidden.
    slow = step_time(placement, work, trace, dataclasses.replace(GPU, network=0.01), 1)
    assert slow.exposed > 1e6 * 4 / 2 / 0.01e9
