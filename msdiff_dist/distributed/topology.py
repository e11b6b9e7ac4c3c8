"""Nodes: which ranks share one, and how many bytes must pass between nodes.

Ranks are numbered node by node, as torchrun does: rank r is on node r // ranks_per_node.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from msdiff_dist.distributed.placement import Placement

MOST_PERMUTED = 6  # up to so many disjoint groups every order on the line is tried, which is 720 orders


def nodes_spanned(ranks: Sequence[int], ranks_per_node: int) -> int:
    """Number of nodes on which a group of ranks has members."""
    return len({rank // ranks_per_node for rank in ranks})


def most_on_one_node(ranks: Sequence[int], ranks_per_node: int) -> int:
    """The largest number of a group's ranks that share a node."""
    return max(Counter(rank // ranks_per_node for rank in ranks).values())


def ring_crossings(ranks: Sequence[int], ranks_per_node: int) -> int:
    """Number of links between different nodes in the ring through a group of ranks in ascending order."""
    nodes = [rank // ranks_per_node for rank in ranks]
    return sum(a != b for a, b in zip(nodes, [*nodes[1:], nodes[0]], strict=True))


def ring_share_between_nodes(ranks: Sequence[int], ranks_per_node: int) -> float:
    """Values that pass between nodes when a group reduces or gathers round its ring, per value reduced or gathered.

    Each of the ring's g links carries (g - 1) / g of the values.
    """
    return ring_crossings(ranks, ranks_per_node) * (len(ranks) - 1) / len(ranks)


def arrange(placement: Placement, ranks_per_node: int, params_K: Sequence[int]) -> Placement:
    """The same placement with its ranks in the order that sends the fewest gradients between nodes.

    Any order of ranks is a valid placement. For groups that share no rank, every order of the groups is tried; for a
    line with shared ranks, the line and its reverse. Of equally good orders the first is taken, so that every rank
    finds the same one.

    Args:
        params_K: number of parameters of each stage's decoder that train.
    """
    if placement.world_size <= ranks_per_node:
        return placement

    def crossing(candidate: Placement) -> float:
        return sum(
            ring_share_between_nodes(group, ranks_per_node) * params
            for group, params in zip(map(candidate.group, range(candidate.num_stages)), params_K, strict=True)
            if group
        )

    return min(_orders(placement), key=crossing)


def _orders(placement: Placement) -> Iterator[Placement]:
    """The placement with its ranks in the orders to be tried, the present one first."""
    groups = [group for group in map(placement.group, range(placement.num_stages)) if group]
    if all(len(held) == 1 for held in placement.stages_of_rank) and len(groups) <= MOST_PERMUTED:
        orders: Iterable[list[int]] = (list(itertools.chain(*order)) for order in itertools.permutations(groups))
    else:
        line = list(range(placement.world_size))
        orders = (line, line[::-1])
    for order in orders:
        yield Placement(tuple(placement.stages_of_rank[w] for w in order), placement.samples_AWK[:, order])
