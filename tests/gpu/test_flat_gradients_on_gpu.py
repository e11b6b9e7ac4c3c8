"""Reductions and gathers of NCCL: sums exact in fp32, and weights that arrive."""

from __future__ import annotations

import pytest
import torch

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.distributed.environment import process_group
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.distributed.spawn import run_ranks
from tests.distributed.test_flat_gradients import check, ranges_of_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def on_gpu(rank: int) -> dict[str, list[float]]:
    with process_group(WaitLimits(step_s=60, start_s=60)) as environment:
        return ranges_of_rank(rank, environment.device)


def test_sums_are_exact_and_weights_arrive() -> None:
    check(run_ranks(on_gpu, 2, preload=PRELOAD, timeout=120))
