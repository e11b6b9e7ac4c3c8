"""Flat gradients are exact sums in fp32 over ranks and micro batches, and flat weights arrive everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from msdiff_dist.distributed.flat_gradients import FlatPart
from msdiff_dist.testing import run_distributed

pytestmark = pytest.mark.distributed

MICRO_BATCHES = 2
SMALL = 2.0**-9  # 1 + SMALL is 1 in bf16


def flat_part(
    group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, reduce_each: bool
) -> tuple[FlatPart, Tensor, list[Any]]:
    """Three parameters, of which the middle one is laid out with its last dimension first, and padding to 12."""
    weights = torch.arange(12.0).to(device, dtype)
    views = [weights[:4].view(2, 2), weights[4:8].view(2, 2).t(), weights[8:11].view(3)]
    parameters = [nn.Parameter(view) for view in views]
    return FlatPart(weights, parameters, group, reduce_each), weights, parameters


def backward(rank: int, micro_batch: int, parameters: list[Any]) -> None:
    """Gradients of 1 from rank 0's first micro batch and of SMALL from every other; none for the last parameter."""
    scale = 1.0 if (rank, micro_batch) == (0, 0) else SMALL
    first, second, _ = parameters
    factors = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=second.device)
    ((first * scale).sum() + (second * scale * factors).sum()).backward()


def ranges_of_rank(rank: int, device: torch.device) -> dict[str, list[float]]:
    """The gradient of this rank's range, and all weights after every rank has published its range times 10."""
    everyone: Any = dist.group.WORLD
    alone: Any = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for reduce_each in (False, True):
            for name, group in {"world": everyone, "alone": alone}.items():
                part, weights, parameters = flat_part(group, device, dtype, reduce_each)
                for micro_batch in range(MICRO_BATCHES):
                    part.open_gradients()
                    backward(rank, micro_batch, parameters)
                    part.close_gradients(is_last=micro_batch == MICRO_BATCHES - 1)
                gradient = part.take_gradient()
                assert gradient.dtype == torch.float32
                assert all(p.grad is None for p in parameters)
                own = weights.chunk(dist.get_world_size(group))[dist.get_rank(group)]
                part.publish(own.float() * 10)
                part.wait_for_weights()
                key = f"{dtype} {reduce_each} {name}"
                found[key] = gradient.tolist() + weights.tolist()
    return found


def check(everywhere: list[dict[str, list[float]]]) -> None:
    """That the ranks found the exact sums and all weights."""
    ranks = len(everywhere)
    of_world = 1 + (ranks * MICRO_BATCHES - 1) * SMALL
    of_rank = [1 + (MICRO_BATCHES - 1) * SMALL, *[MICRO_BATCHES * SMALL] * (ranks - 1)]
    pattern = torch.tensor([1.0, 1, 1, 1, 1, 3, 2, 4, 0, 0, 0, 0])  # the second one's gradient lies as its weights do
    published = [10.0 * i for i in range(12)]
    for rank, found in enumerate(everywhere):
        assert len(found) == 8
        for key, values in found.items():
            whole = pattern * (of_world if "world" in key else of_rank[rank])
            expected = whole.chunk(ranks)[rank] if "world" in key else whole
            assert values == [*expected.tolist(), *published], key


def test_sums_are_exact_and_weights_arrive() -> None:
    check(run_distributed(ranges_of_rank, 3, torch.device("cpu")))
