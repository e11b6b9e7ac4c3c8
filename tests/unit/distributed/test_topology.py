"""Groups on nodes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiff_dist.distributed.engine_costs import Workload
from msdiff_dist.distributed.placement import Placement, plan
from msdiff_dist.distributed.plan_report import (
    reduced_between_nodes,
    reduced_bytes,
    replicated_between_nodes,
)
from msdiff_dist.distributed.topology import arrange, nodes_spanned, ring_crossings, ring_share_between_nodes


def line(*sizes: int) -> Placement:
    """Disjoint groups of these sizes, one sample a rank."""
    samples_WK = np.repeat(np.eye(len(sizes), dtype=np.int64), sizes, axis=0)
    return Placement(tuple((int(row.argmax()),) for row in samples_WK), samples_WK[None])


@pytest.mark.parametrize(
    ("ranks", "spanned", "crossings"),
    [(range(4), 1, 0), (range(3, 5), 2, 2), (range(2, 10), 3, 3), ([0, 4, 5, 8], 3, 3), ([1], 1, 0), (range(16), 4, 4)],
)
def test_rings_cross_between_nodes_of_four(ranks: list[int], spanned: int, crossings: int) -> None:
    assert nodes_spanned(ranks, 4) == spanned
    assert ring_crossings(list(ranks), 4) == crossings


def test_groups_that_fit_a_node_are_not_split() -> None:
    placement = line(3, 4, 1)
    assert [nodes_spanned(placement.group(k), 4) for k in range(3)] == [1, 2, 1]
    better = arrange(placement, 4, [5, 5, 5])
    assert [nodes_spanned(better.group(k), 4) for k in range(3)] == [1, 1, 1]


def test_where_one_group_must_be_split_it_is_the_smallest_decoder() -> None:
    better = arrange(line(3, 3, 2), 4, [9, 9, 1])
    assert [nodes_spanned(better.group(k), 4) for k in range(3)] == [1, 1, 2]


def test_one_node_changes_nothing() -> None:
    placement = line(3, 2, 1)
    assert arrange(placement, 8, [1, 2, 3]) is placement


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    ranks_per_node=st.integers(1, 8),
    data=st.data(),
)
def test_no_order_of_the_groups_sends_less(sizes: list[int], ranks_per_node: int, data: st.DataObject) -> None:
    params = data.draw(st.lists(st.integers(1, 100), min_size=len(sizes), max_size=len(sizes)))
    best = arrange(line(*sizes), ranks_per_node, params)
    assert sorted(best.stages_of_rank) == sorted(line(*sizes).stages_of_rank)

    def crossing(groups: list[list[int]], order: tuple[int, ...]) -> float:
        return sum(ring_share_between_nodes(g, ranks_per_node) * params[k] for g, k in zip(groups, order, strict=True))

    found = [list(best.group(k)) for k in range(len(sizes))]
    least = crossing(found, tuple(range(len(sizes))))
    for order in itertools.permutations(range(len(sizes))):
        ends = np.cumsum([0, *(sizes[k] for k in order)])
        groups = [list(range(a, b)) for a, b in itertools.pairwise(ends.tolist())]
        assert least <= crossing(groups, order) + 1e-9


def test_shared_ranks_keep_the_line() -> None:
    placement = plan(np.array([[40, 30, 30]]), [3.0, 1.0, 1.0], 4)
    turned = arrange(placement, 2, [10, 20, 30])
    assert turned.stages_of_rank in (placement.stages_of_rank, placement.stages_of_rank[::-1])
    assert np.array_equal(turned.samples_WK.sum(axis=0), placement.samples_WK.sum(axis=0))


def test_bytes_between_nodes_against_counting_every_link() -> None:
    """Two nodes of four; stage 0 on the first five ranks: a ring of 8, one of 5 over both nodes, one of 3 in one."""
    placement, work = (
        line(5, 3),
        Workload(cost_K=[1.0, 1.0], shared_params=800, stage_params_K=[500, 300], payload_bytes=8),
    )
    shared, first = 2 * 2 * 800 * 7 / 8, 2 * 2 * 500 * 4 / 5  # two passes, two links between nodes
    assert reduced_between_nodes(placement, work, 4) == pytest.approx((shared + first) * 4)
    assert reduced_bytes(placement, work) == 2 * (7 * 800 + 4 * 500 + 2 * 300) * 4
    assert replicated_between_nodes(placement, work, 4) == pytest.approx(2 * 2 * 1600 * 7 / 8 * 4)
    assert reduced_between_nodes(placement, work, 1) == pytest.approx(reduced_bytes(placement, work))
    assert reduced_between_nodes(placement, work, 8) == 0
