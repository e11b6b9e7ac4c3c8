"""Peak memory of ranks, added up by hand for a model of round numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from msdiff_dist.distributed.engine_costs import Workload
from msdiff_dist.distributed.memory import RankBytes, batch_bytes, rank_bytes_W
from msdiff_dist.distributed.placement import Placement, StageSets, plan
from tests.unit.distributed.traces import model_trace

FP32 = 4


def workload(**changes: Any) -> Workload:
    fields = {"cost_K": [1.0, 1.0], "shared_params": 0, "stage_params_K": [0, 0], "payload_bytes": 0, "on_gpus": True}
    return Workload(**(fields | changes))


def placed(stages: StageSets, samples: int, accumulation: int = 1) -> Placement:
    """Every stage has so many samples in each micro batch."""
    return plan(np.full((accumulation, 2), samples), [1.0, 1.0], len(stages), stages)


def of_rank_0(placement: Placement, work: Workload) -> RankBytes:
    return rank_bytes_W(placement, work, model_trace(2))[0]


def test_activations_are_those_of_the_encoder_and_of_one_stage_at_a_time() -> None:
    # The encoder keeps 300 bytes a sample and the gradients of its features take 100; the stage peaks at 650.
    assert of_rank_0(placed(((0,), (1,)), 8), workload()).activations == 8 * (300 + 100 + 650)
    # Both stages on one rank: twice the samples in the encoder, one stage after the other.
    assert of_rank_0(placed(((0, 1),), 8), workload()).activations == 16 * (300 + 100) + 8 * 650


def test_state_is_sharded() -> None:
    work = workload(shared_params=800, stage_params_K=[600, 0], precision="bf16", averages=2)
    state = of_rank_0(placed(((0,), (0,), (1,), (1,)), 8), work)
    assert state.weights == (800 + 600) * 2
    assert state.optimizer == (800 // 4 + 600 // 2) * 3 * FP32
    assert state.averages == (800 // 4 + 600 // 2) * 2 * FP32


@pytest.mark.parametrize("on_gpus", [True, False])
@pytest.mark.parametrize("zero", [1, 2])
def test_gradients_at_the_peak(zero: int, on_gpus: bool) -> None:
    work = workload(shared_params=8, stage_params_K=[6000, 0], zero_shared=zero, zero_decoders=zero, on_gpus=on_gpus)
    # The stage's activations are the most by far: at that moment its own buffer is there, and in later micro batches
    # that of the encoder.
    stages: StageSets = ((0,), (0,), (1,), (1,))
    assert of_rank_0(placed(stages, 1000), work).gradients == 6000 * FP32
    received = {1: 0, 2: 2 if on_gpus else 8}[zero]  # the sums of this rank's range of the last micro batch
    kept = {1: 0, 2: 6000 // 2 + 8 // 4}[zero]  # and of all micro batches before
    expected = (6000 + 8 + received + kept) * FP32
    assert of_rank_0(placed(stages, 1000, accumulation=3), work).gradients == expected


def test_a_large_model_peaks_after_the_passes() -> None:
    work = workload(shared_params=10**6, stage_params_K=[10**6, 10**6])
    peak = of_rank_0(placed(((0,), (0,), (1,), (1,)), 8), work)
    assert peak.activations == 0
    assert peak.gradients == (10**6 + 10**6 // 4 + 10**6 + 10**6 // 2) * FP32
    alone = of_rank_0(placed(((0, 1),), 8), work)
    assert alone.gradients == 3 * 10**6 * FP32


def test_total_and_buffers() -> None:
    work = workload(payload_bytes=100, latent_values=5, shared_params=8)
    peak = of_rank_0(placed(((0,), (1,)), 8), work)
    assert peak.buffers == batch_bytes(8, work) > 8 * 100
    fields = peak.fields()
    assert fields.pop("total") == sum(fields.values()) == peak.total


def test_zero_3_shards_weights_and_gathers_them() -> None:
    stages: StageSets = ((0,), (0,), (1,), (1,))
    one, three = (
        of_rank_0(placed(stages, 8), workload(shared_params=8000, zero_shared=z, on_gpus=False)) for z in (1, 3)
    )
    assert three.weights == 8000 // 4 * FP32 < one.weights
    assert three.buffers > one.buffers


def test_frozen_weights_are_all_that_a_frozen_part_keeps() -> None:
    stages: StageSets = ((0,), (0,), (0, 1), (1,))
    work = workload(
        shared_params=800, stage_params_K=[600, 400], shared_frozen=800, stage_frozen_K=[200, 400], precision="bf16"
    )
    rank_0, _, _, rank_3 = rank_bytes_W(placed(stages, 9), work, model_trace(2))
    assert rank_0.weights == (800 + 600) * 2
    assert rank_0.optimizer == -(-400 // 3) * 3 * FP32, "of the 400 parameters that train, over three ranks"
    assert rank_3.weights == (800 + 400) * 2
    assert rank_3.optimizer == rank_3.averages == rank_3.gradients == 0
    # On CPUs the fp32 ranges of frozen weights lie in the same memory.
    on_cpus = rank_bytes_W(placed(stages, 9), dataclasses.replace(work, on_gpus=False), model_trace(2))[3]
    assert on_cpus.weights == rank_3.weights + (800 // 4 + 400 // 2) * FP32


def test_a_part_of_which_some_trains_is_gathered_as_a_whole_under_zero_3() -> None:
    stages: StageSets = ((0,), (0,), (1,), (1,))
    work = workload(shared_params=8000, shared_frozen=6000, zero_shared=3)
    some = of_rank_0(placed(stages, 8), work)
    assert some.weights == 8000 // 4 * FP32
    assert some.optimizer == 2000 // 4 * 3 * FP32
    frozen = of_rank_0(placed(stages, 8), dataclasses.replace(work, shared_frozen=8000))
    assert (frozen.weights, frozen.optimizer) == (8000 * FP32, 0)
