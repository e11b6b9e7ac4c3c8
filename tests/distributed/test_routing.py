"""Samples arrive unchanged, each once, at a rank that holds their stage, while other collectives run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from msdiff_dist.data.step_samples import StepSamples
from msdiff_dist.distributed.placement import Placement, StageSets, plan
from msdiff_dist.distributed.router import Assignment, RoutedBatch, Router
from msdiff_dist.testing import run_distributed

pytestmark = pytest.mark.distributed

QUOTAS, ACCUMULATION, STEPS, SHAPE = np.array([9, 7, 6]), 2, 3, (3, 4, 4)
BATCH = int(QUOTAS.sum())


def whole_batch(step: int, dtype: torch.dtype, with_context: bool) -> tuple[torch.Tensor, ...]:
    """x, label and context of all samples: any bit pattern must arrive."""
    generator = torch.Generator().manual_seed(step)
    bits = torch.randint(
        0, 256, (BATCH, *SHAPE[:-1], SHAPE[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator
    )
    label = torch.randint(-(2**60), 2**60, (BATCH,), generator=generator)
    context = torch.randn(BATCH, 2, 5, generator=generator).to(torch.float16)
    return (bits.view(dtype), label, context) if with_context else (bits.view(dtype),)


def assignment_of(step: int, placement: Placement) -> Assignment:
    rng = np.random.default_rng(step)
    stage_B = rng.permutation(np.repeat(np.arange(3), QUOTAS))
    micro_B = np.empty_like(stage_B)
    for k, quota in enumerate(QUOTAS):
        ends = quota * np.arange(ACCUMULATION + 1) // ACCUMULATION
        micro_B[stage_B == k] = np.repeat(np.arange(ACCUMULATION), np.diff(ends))
    readers = max(placement.world_size - step, 1)  # fewer ranks read in each step; in the end only rank 0
    return Assignment(stage_B=stage_B, micro_B=micro_B, source_B=rng.integers(0, readers, BATCH), placement=placement)


def placement_of(world_size: int, explicit: StageSets | None) -> Placement:
    m = np.arange(ACCUMULATION)[:, None]
    return plan(QUOTAS * (m + 1) // ACCUMULATION - QUOTAS * m // ACCUMULATION, [3.0, 2.0, 1.0], world_size, explicit)


def assert_arrived(
    routed: RoutedBatch, step: int, dtype: torch.dtype, with_context: bool, assignment: Assignment
) -> None:
    np.testing.assert_array_equal(routed.stage_n, assignment.stage_B[routed.index_n])
    order = list(zip(routed.stage_n.tolist(), routed.index_n.tolist(), strict=True))
    assert order == sorted(order)
    expected = [part[routed.index_n] for part in whole_batch(step, dtype, with_context)]
    arrived = [part for part in (routed.x_nCHW, routed.label_n, routed.context_nTC) if part is not None]
    assert len(arrived) == len(expected)
    for a, e in zip(arrived, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert torch.equal(a.reshape(-1).view(torch.uint8), e.reshape(-1).view(torch.uint8))


def exchange(
    rank: int, explicit: StageSets | None, dtype: torch.dtype, with_context: bool
) -> tuple[list[int], int, int]:
    """Route three steps with all their exchanges under way at once; return what arrived and the bytes sent."""
    placement = placement_of(dist.get_world_size(), explicit)
    router = Router(dist.new_group(), placement, rank, torch.device("cpu"))
    pending = []
    crossing = 0
    for step in range(STEPS):
        assignment = assignment_of(step, placement)
        mine = np.flatnonzero(assignment.source_B == rank)
        x, label, context = [
            part[mine] for part in (*whole_batch(step, dtype, with_context), *[torch.empty(BATCH)] * 2)
        ][:3]
        samples = StepSamples(
            batch=step,
            index_n=mine,
            x_nCHW=x,
            label_n=label if with_context else None,
            context_nTC=context if with_context else None,
            captions=None,
            keys=[""] * len(mine),
        )
        crossing += int((assignment.dest_B[mine] != rank).sum())
        packed = [router.pack(assignment, m, samples) for m in range(ACCUMULATION)]
        pending += [(step, m, assignment, router.start(outgoing)) for m, outgoing in enumerate(packed)]
        del x, label, context, samples
        dist.all_reduce(torch.zeros(1000))  # training continues in another group
    seen = []
    for step, micro, assignment, exchange in pending:
        routed = exchange.wait()
        assert_arrived(routed, step, dtype, with_context, assignment)
        counts = np.bincount(routed.stage_n, minlength=3)
        np.testing.assert_array_equal(counts, placement.samples_AWK[micro, rank])
        seen += [step * BATCH + int(i) for i in routed.index_n]
    return seen, router.bytes_sent, crossing


@pytest.mark.parametrize(
    ("world_size", "explicit", "dtype", "with_context"),
    [
        (2, None, torch.uint8, True),
        (3, ((0,), (1,), (2,)), torch.bfloat16, False),
        (3, ((0, 1, 2),) * 3, torch.float16, True),
        (4, None, torch.float32, True),
        (4, ((2,), (0, 1), (0,), (1, 2)), torch.float32, False),
    ],
)
def test_samples_arrive_unchanged_exactly_once(
    world_size: int, explicit: StageSets | None, dtype: torch.dtype, with_context: bool
) -> None:
    results = run_distributed(exchange, world_size, explicit, dtype, with_context)
    assert sorted(i for seen, _, _ in results for i in seen) == list(range(STEPS * BATCH))
    row_bytes = np.prod(SHAPE) * dtype.itemsize + (8 + 2 * 5 * 2 if with_context else 0)
    for _, sent, crossing in results:
        assert sent == crossing * row_bytes
