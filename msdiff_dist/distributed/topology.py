"""Nodes: which parts of the line of ranks share one, and the bytes that must pass between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from msdiff_dist.distributed.placement import Placement

MOST_ORDERS = 6  # stages whose every order on the line is tried


def nodes_spanned(ranks: Sequence[int], ranks_per_node: int) -> int:
    """Nodes on which a group of ranks has members."""
    return len({rank // ranks_per_node for rank in ranks})


def ring_crossings(ranks: Sequence[int], ranks_per_node: int) -> int:
    """Links of the ring through an ascending group of ranks that lead from one node to another."""
    nodes = [rank // ranks_per_node for rank in ranks]
    return sum(a != b for a, b in zip(nodes, [*nodes[1:], nodes[0]], strict=True))


def ring_share_between_nodes(ranks: Sequence[int], ranks_per_node: int) -> float:
    """Values that cross between nodes in one ring pass over a group, per value reduced or gathered.

    Each of the ring's g links carries (g - 1) / g of the values.
    """
    return ring_crossings(ranks, ranks_per_node) * (len(ranks) - 1) / len(ranks)


def arrange(placement: Placement, ranks_per_node: int, params_K: Sequence[int]) -> Placement:
    """The same placement with its ranks in the order that sends the fewest gradients between nodes.

    Any order is a valid placement. Groups that share no rank may stand in any order on the line; a line with shared
    ranks may be turned round. Of equally good orders the first is taken, so every rank finds the same one.
    """
    if placement.world_size <= ranks_per_node:
        return placement

    def crossing(candidate: Placement) -> float:
        shares = [ring_share_between_nodes(candidate.group(k), ranks_per_node) for k in range(candidate.num_stages)]
        return float(np.dot(shares, params_K))

    return min(_orders(placement), key=crossing)


def _orders(placement: Placement) -> Iterator[Placement]:
    groups = [placement.group(k) for k in range(placement.num_stages)]
    if all(len(held) == 1 for held in placement.stages_of_rank) and len(groups) <= MOST_ORDERS:
        orders: Iterable[list[int]] = (list(itertools.chain(*order)) for order in itertools.permutations(groups))
    else:
        line = list(range(placement.world_size))
        orders = (line, line[::-1])
    for order in orders:
        yield Placement(tuple(placement.stages_of_rank[w] for w in order), placement.samples_AWK[:, order])
