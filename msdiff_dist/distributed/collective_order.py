"""Whether the collectives of several ranks can complete in any order in which the ranks arrive.

Two conditions together are enough. All ranks of a group issue the same collectives in it, in the same order. And all
collectives of all groups can be put in one order that no rank departs from: then the first of them that has not
completed is the next one of each of its ranks, and completes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from msdiff_dist.distributed.collective_trace import Call

_Node = tuple[str, int]  # the n-th collective of a group, from 0


@dataclass(frozen=True, kw_only=True)
class RankCalls:
    """What one rank issues.

    Attributes:
        groups: what to call each group that the rank is in, by the group's name.
        calls: its collectives, in the order in which it issues them.
    """

    rank: int
    groups: Mapping[str, str]
    calls: Sequence[Call]


def find_disagreement(ranks: Sequence[RankCalls]) -> str | None:
    """What may keep the collectives from completing, naming the calls and ranks; None if nothing does."""
    return _within_groups(ranks) or _between_groups(ranks)


def _within_groups(ranks: Sequence[RankCalls]) -> str | None:
    first: dict[str, tuple[int, list[Call]]] = {}  # the first rank of each group, and its calls there
    for one in ranks:
        for group, title in one.groups.items():
            own = [call for call in one.calls if call.group == group]
            other, expected = first.setdefault(group, (one.rank, own))
            for n, (a, b) in enumerate(zip_longest(expected, own)):
                if a is None or b is None or (a.kind, a.what) != (b.kind, b.what):
                    said = [f"rank {rank} issues {call or 'nothing'}" for rank, call in ((other, a), (one.rank, b))]
                    return f"{title}, call {n + 1}: {', '.join(said)}"
    return None


def _between_groups(ranks: Sequence[RankCalls]) -> str | None:
    after: dict[_Node, dict[_Node, int]] = {}  # for each call those that some rank issues next, and which rank
    kinds: dict[_Node, Call] = {}
    titles: dict[str, str] = {}
    for one in ranks:
        titles |= one.groups
        numbers: dict[str, int] = {}
        nodes: list[_Node] = []
        for call in one.calls:
            nodes.append((call.group, numbers.get(call.group, 0)))
            numbers[call.group] = nodes[-1][1] + 1
            kinds[nodes[-1]] = call
        for node in nodes:
            after.setdefault(node, {})
        for a, b in pairwise(nodes):
            after[a].setdefault(b, one.rank)
    cycle = _cycle(after)
    if not cycle:
        return None

    def named(node: _Node) -> str:
        return f"call {node[1] + 1} of {titles[node[0]]} ({kinds[node]})"

    # Of the calls that one rank issues one after another, the first and the last are enough.
    edges = [(a, b, after[a][b]) for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
    steps: list[tuple[_Node, _Node, int]] = []
    for a, b, rank in edges:
        if steps and steps[-1][2] == rank:
            steps[-1] = (steps[-1][0], b, rank)
        else:
            steps.append((a, b, rank))
    return "; ".join(f"rank {rank} issues {named(a)} before {named(b)}" for a, b, rank in steps)


def _cycle(after: Mapping[_Node, Mapping[_Node, int]]) -> list[_Node]:
    """Nodes that follow each other round a cycle; empty if there is none."""
    # Nodes that nothing precedes are taken away until none is left, or only cycles and what follows them.
    preceding = dict.fromkeys(after, 0)
    for following in after.values():
        for node in following:
            preceding[node] += 1
    free = [node for node, count in preceding.items() if not count]
    while free:
        for node in after[free.pop()]:
            preceding[node] -= 1
            if not preceding[node]:
                free.append(node)
    left = [node for node, count in preceding.items() if count]
    if not left:
        return []
    # Every node that is left has one before it that is left too, so a walk backwards comes round.
    before = {b: a for a in left for b in after[a] if preceding[b]}
    node, seen = left[0], list[_Node]()
    while node not in seen:
        seen.append(node)
        node = before[node]
    return seen[seen.index(node) :][::-1]
