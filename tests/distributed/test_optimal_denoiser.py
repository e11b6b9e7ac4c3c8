"""The optimal denoiser of data that is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from msdiff_dist.stage_division.optimal_denoiser import draw_samples, optimal_noise
from msdiff_dist.testing import run_distributed

SIGMAS = torch.tensor([1e-3, 0.05, 0.3, 1.0, 5.0, 100.0], dtype=torch.float64)


def noise_of(rank: int, world_size: int) -> Tensor:
    data = torch.rand(103, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for first in range(10 * rank, len(data), 10 * world_size):
            yield first, data[first : first + 10]

    draws = draw_samples(blocks, len(data), 6, seed=0)
    return torch.cat([optimal_noise(blocks, draws.sample_Md, draws.noise_Md, SIGMAS), draws.mean_d[None]])


def spread(rank: int) -> Tensor:
    return noise_of(rank, 3)


@pytest.mark.distributed
def test_ranks_that_hold_parts_of_the_data_agree_with_one_that_holds_all() -> None:
    whole = noise_of(0, 1)
    for part in run_distributed(spread, 3):
        torch.testing.assert_close(part, whole, atol=1e-6, rtol=0)
