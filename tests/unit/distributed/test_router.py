from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdiff_dist.distributed.placement import plan
from msdiff_dist.distributed.router import Assignment, _packed, _unpacked


@st.composite
def assignments(draw: st.DrawFn) -> Assignment:
    accumulation, num_stages = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    quotas = draw(st.lists(st.integers(accumulation, 40), min_size=num_stages, max_size=num_stages))
    world_size = draw(st.integers(1, min(12, sum(q // accumulation for q in quotas))))
    m = np.arange(accumulation)[:, None]
    quotas_AK = np.array(quotas) * (m + 1) // accumulation - np.array(quotas) * m // accumulation
    placement = plan(quotas_AK, [1.0 + k for k in range(num_stages)], world_size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    stage_B = rng.permutation(np.repeat(np.arange(num_stages), quotas))
    micro_B = np.empty_like(stage_B)
    for k in range(num_stages):
        micro_B[stage_B == k] = np.repeat(np.arange(accumulation), quotas_AK[:, k])
    readers = rng.choice(world_size, draw(st.integers(1, world_size)), replace=False)  # some ranks may read nothing
    return Assignment(stage_B=stage_B, micro_B=micro_B, source_B=rng.choice(readers, len(stage_B)), placement=placement)


@given(assignments())
@settings(max_examples=150, deadline=None)
def test_every_rank_gets_its_planned_samples_once(assignment: Assignment) -> None:
    planned_AWK = assignment.placement.samples_AWK
    accumulation, world_size, num_stages = planned_AWK.shape
    seen: list[int] = []
    for micro in range(accumulation):
        for rank in range(world_size):
            index_n = assignment.received(rank, micro)
            assert (assignment.micro_B[index_n] == micro).all()
            counts = np.bincount(assignment.stage_B[index_n], minlength=num_stages)
            np.testing.assert_array_equal(counts, planned_AWK[micro, rank])
            seen += index_n.tolist()
    assert sorted(seen) == list(range(len(assignment.stage_B)))


@given(assignments())
@settings(max_examples=80, deadline=None)
def test_both_ends_agree_on_the_order_of_rows(assignment: Assignment) -> None:
    accumulation, world_size, _ = assignment.placement.samples_AWK.shape
    for micro in range(accumulation):
        for rank in range(world_size):
            arriving = []
            for source in range(world_size):
                sent = assignment.sent(source, micro)
                assert (np.diff(assignment.dest_B[sent]) >= 0).all(), "one block per destination"
                arriving += sent[assignment.dest_B[sent] == rank].tolist()
            assert assignment.received(rank, micro).tolist() == arriving


@given(assignments())
@settings(max_examples=80, deadline=None)
def test_samples_stay_on_their_reader_where_the_plan_allows(assignment: Assignment) -> None:
    planned_AWK = assignment.placement.samples_AWK
    for (micro, rank, stage), planned in np.ndenumerate(planned_AWK):
        here = (assignment.micro_B == micro) & (assignment.stage_B == stage) & (assignment.source_B == rank)
        kept = here & (assignment.dest_B == rank)
        assert kept.sum() == min(planned, here.sum())


@pytest.mark.parametrize("rows", [[], [2], [4, 0, 1]])
def test_rows_of_any_types_pack_and_unpack(rows: list[int]) -> None:
    parts = [torch.arange(15, dtype=torch.uint8).reshape(5, 3), torch.arange(5), torch.randn(5, 2, 7).bfloat16()]
    packed = _packed(parts, np.array(rows, dtype=np.int64))
    assert packed.shape == (len(rows), 3 + 8 + 28)
    formats = [None if part is None else (part.dtype, part.shape[1:]) for part in (parts[0], parts[1], None, parts[2])]
    x, label, nothing, context = _unpacked(packed, formats)
    assert nothing is None
    for part, arrived in zip(parts, (x, label, context), strict=True):
        assert arrived is not None
        assert arrived.dtype == part.dtype
        assert torch.equal(arrived, part[rows])
