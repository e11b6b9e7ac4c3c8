"""The line of work: the stages' work laid out along a line, of which each rank takes a range.

Samples are whole, and a rank that holds a stage takes at least `least` samples of it, one for each micro batch.
"""

from __future__ import annotations

import heapq

import numpy as np

# Many ranks of a line have equal shares. They are kept as one entry, so that thousands of ranks are planned quickly.
Share = dict[int, int]  # of one rank: stage -> number of samples
Neighbours = tuple[int, Share]  # (number of neighbouring ranks, the share of each of them)


def lightest_line(quotas: list[int], costs: list[float], least: int, world_size: int) -> np.ndarray | None:
    """Samples per rank and stage, [W, K]: the line whose heaviest rank is lightest; None if the samples are too few.

    Args:
        quotas, costs: of each stage, its number of samples and the cost of one, in any unit.
        least: the least number of samples of a stage that a rank may take.
    """
    # The larger the load of a rank may be, the fewer ranks are needed. So the least load for `world_size` ranks is
    # found by bisection between the mean load, which no line can beat, and all work on one rank.
    work = sum(q * c for q, c in zip(quotas, costs, strict=True))
    low, high = max(work / world_size, least * max(costs)), work
    best = _filled(quotas, costs, least, high)
    assert best is not None
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        runs = _filled(quotas, costs, least, middle)
        if runs is not None and sum(count for count, _ in runs) <= world_size:
            best, high = runs, middle
        else:
            low = middle
    runs = _spread(best, costs, least, world_size)
    if runs is None:
        return None
    samples_RK = np.zeros((len(runs), len(quotas)), dtype=np.int64)
    for n_K, (_, share) in zip(samples_RK, runs, strict=True):
        n_K[list(share)] = list(share.values())
    return samples_RK.repeat([count for count, _ in runs], axis=0)


def _filled(quotas: list[int], costs: list[float], least: int, load: float) -> list[Neighbours] | None:
    """Fill rank after rank up to `load`, stage after stage. None if a rank would hold less than `least` of a stage."""
    runs: list[Neighbours] = []
    load *= 1 + 1e-12  # so that a load of exactly n samples is not one short by rounding
    held: Share = {}  # the share of the last rank, to which more may be added
    room = load  # the load that the last rank can still take
    for k, (left, cost) in enumerate(zip(quotas, costs, strict=True)):
        # The last rank takes the first samples of this stage too, if they are enough for one in every micro batch. If
        # the rest were too few for the next rank, it takes so many fewer.
        if held:
            take = min(left, int(room / cost))
            if 0 < left - take < least:
                take = left - least
            if take >= least:
                held[k] = take
                left -= take
                room -= take * cost
            if not left:
                continue
            runs.append((1, held))
        # The rest fills ranks of this stage alone. The last of them, which may take samples of the next stage too, gets
        # what the full ones leave over, and at least `least`.
        ranks = -(-left // int(load / cost))
        last = max(least, left - (ranks - 1) * int(load / cost))
        if left - last < least * (ranks - 1):
            return None
        if ranks > 1:
            n, more = divmod(left - last, ranks - 1)
            runs += [(count, {k: m}) for count, m in ((more, n + 1), (ranks - 1 - more, n)) if count]
        held, room = {k: last}, load - last * cost
    return [*runs, (1, held)]


def _spread(runs: list[Neighbours], costs: list[float], least: int, world_size: int) -> list[Neighbours] | None:
    """Split the heaviest shares until every rank has one; None if no share can be split any more."""

    def entry(count: int, share: Share) -> tuple[float, list[tuple[int, int]], int]:
        # In the heap's order: the heaviest share first, then by content, so that every rank of a job finds the same.
        return -sum(n * costs[k] for k, n in share.items()), list(share.items()), count

    missing = world_size - sum(count for count, _ in runs)
    heap, whole = [entry(*run) for run in runs], list[Neighbours]()
    heapq.heapify(heap)
    while missing:
        if not heap:
            return None
        _, ((k, n), *others), count = heapq.heappop(heap)
        if others:
            halves = [{k: n}, dict(others)]
        elif n >= 2 * least:
            halves = [{k: n // 2}, {k: n - n // 2}]
        else:
            whole.append((count, {k: n}))
            continue
        # Only as many of the equal ranks are split as ranks are missing.
        split = min(count, missing)
        missing -= split
        for size, share in [(split, halves[0]), (split, halves[1]), (count - split, {k: n, **dict(others)})]:
            if size:
                heapq.heappush(heap, entry(size, share))
    runs = whole + [(count, dict(items)) for _, items, count in heap]
    return sorted(runs, key=lambda run: (min(run[1]), max(run[1])))
