"""The order of samples: pure functions of (shard sizes, lanes, window, seed). No files, no ranks, no workers.

Epoch e permutes the shards by (seed, e) and deals each to the lane with fewest samples so far. A lane reads its shards
one after the other, in windows of `shuffle` samples; each window is permuted by (seed, e, lane, window). The epoch's
order takes one sample of each lane that still has some, round after round. Sample number g is sample g % N of epoch
g // N. So every epoch holds each of the N samples exactly once, and a batch may span two epochs.

The number g counts the samples of one set of shards. It is the global sample number of the run if that has one source;
of several sources, each has its own numbers (`mixture.py`). A position p counts in an epoch's order; a position in a
lane's order counts in that lane alone.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msdiff_dist.randomness import generator

Ints = NDArray[np.int64]


def grouped(value_n: Ints) -> list[tuple[int, Ints]]:
    """(value, places of it in value_n) for each value that occurs; values and places ascend."""
    if not len(value_n):
        return []
    if (value_n == value_n[0]).all():  # as if all come from blocks of latents: no need to sort
        return [(int(value_n[0]), np.arange(len(value_n)))]
    place_n = np.argsort(value_n, kind="stable")
    edges = np.flatnonzero(np.diff(value_n[place_n])) + 1
    bounds = [0, *edges.tolist(), len(place_n)]
    return [(int(value_n[place_n[a]]), place_n[a:b]) for a, b in itertools.pairwise(bounds)]


class EpochPlan:
    """Which lane reads which shards in one epoch, and how the lanes take turns.

    Attributes:
        shards: per lane, its shards in reading order.
        sizes_L: samples per lane.
    """

    def __init__(self, counts: Sequence[int], lanes: int, seed: int, epoch: int) -> None:
        fewest = [(0, lane) for lane in range(lanes)]
        self.shards: list[list[int]] = [[] for _ in range(lanes)]
        self.sizes_L: Ints = np.zeros(lanes, dtype=np.int64)
        # Each shard goes to the lane with fewest samples: lanes end within one shard of each other, whatever the sizes
        # of the shards, so that near the end of an epoch as many lanes as possible still take turns.
        for shard in generator(seed, "shard order", epoch).permutation(len(counts)).tolist():
            size, lane = fewest[0]
            heapq.heapreplace(fewest, (size + counts[shard], lane))
            self.shards[lane].append(shard)
            self.sizes_L[lane] += counts[shard]
        # A lane drops out of the rounds when its samples are used up. Between two successive lane sizes the same lanes
        # take turns, so the epoch's order is a few segments, each of whole rounds of its lanes. In a segment, lane and
        # round of a position are remainder and quotient.
        edges = np.unique(np.concatenate([[0], self.sizes_L]))
        self._round_of_segment = edges[:-1]
        self._lanes_of_segment = [np.flatnonzero(self.sizes_L > edge) for edge in edges[:-1]]
        widths = np.array([len(lanes) for lanes in self._lanes_of_segment], dtype=np.int64)
        self._segment_starts = np.concatenate([[0], np.cumsum(np.diff(edges) * widths)]).astype(np.int64)

    def locate(self, p_n: Ints) -> tuple[Ints, Ints]:
        """Map positions in the epoch's order, each in [0, N), to (lane [n], position in the lane's order [n])."""
        segment_n = np.searchsorted(self._segment_starts, p_n, side="right") - 1
        lane_n, position_n = np.empty_like(p_n), np.empty_like(p_n)
        for segment in np.unique(segment_n):
            here = segment_n == segment
            lanes = self._lanes_of_segment[segment]
            rounds, turn = np.divmod(p_n[here] - self._segment_starts[segment], len(lanes))
            lane_n[here] = lanes[turn]
            position_n[here] = self._round_of_segment[segment] + rounds
        return lane_n, position_n

    def taken_before(self, p: int) -> Ints:
        """Samples that each lane gives before position p in [0, N] of the epoch's order, int64 [lanes]."""
        if p >= self._segment_starts[-1]:
            return self.sizes_L.copy()
        segment = int(np.searchsorted(self._segment_starts, p, side="right")) - 1
        lanes = self._lanes_of_segment[segment]
        rounds, turn = divmod(p - int(self._segment_starts[segment]), len(lanes))
        # Lanes that have dropped out gave all their samples; the others one per round, and the first `turn` one more.
        taken_L: Ints = np.minimum(self.sizes_L, self._round_of_segment[segment] + rounds)
        taken_L[lanes[:turn]] += 1
        return taken_L


@dataclass(frozen=True, kw_only=True)
class Window:
    """A slice of a lane that is read together and given in permuted order.

    Attributes:
        start: position of its first sample in the lane's reading order of the epoch.
        order: [size], offsets from `start` in the order in which the samples are given.
        skip: how many samples, in the order given, came before the point at which reading starts.
    """

    epoch: int
    start: int
    order: Ints
    skip: int

    @property
    def size(self) -> int:
        return len(self.order)


class StreamOrder:
    """The infinite order of samples of a set of shards.

    Args:
        counts: samples of each shard; at least one is above 0.
        shuffle: samples per window; 0 and 1 keep the order of the shards.
    """

    def __init__(self, counts: Sequence[int], lanes: int, shuffle: int, seed: int) -> None:
        assert sum(counts) > 0, "an empty data set has no order"
        self.counts = tuple(int(n) for n in counts)
        self.num_samples = sum(self.counts)
        self.lanes, self.shuffle, self.seed = lanes, max(shuffle, 1), seed
        self._plans: dict[int, EpochPlan] = {}

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of one epoch. The latest few are kept, because lanes read ahead into the next epoch."""
        if epoch not in self._plans:
            if len(self._plans) == 4:
                self._plans.pop(min(self._plans))
            self._plans[epoch] = EpochPlan(self.counts, self.lanes, self.seed, epoch)
        return self._plans[epoch]

    def locate(self, g_n: Ints) -> tuple[Ints, Ints, Ints]:
        """Map sample numbers [n] to (epoch [n], lane [n], position in the lane's order of that epoch [n])."""
        epoch_n, p_n = np.divmod(np.asarray(g_n, dtype=np.int64), self.num_samples)
        lane_n, position_n = np.empty_like(p_n), np.empty_like(p_n)
        for epoch in np.unique(epoch_n):
            here = epoch_n == epoch
            lane_n[here], position_n[here] = self.epoch(int(epoch)).locate(p_n[here])
        return epoch_n, lane_n, position_n

    def lanes_of(self, g_n: Ints) -> Ints:
        """The lane that gives each sample number, [n]."""
        return self.locate(g_n)[1]

    def windows(self, lane: int, g: int) -> Iterator[Window]:
        """The lane's windows from sample number g on, epoch after epoch without end."""
        epoch, p = divmod(g, self.num_samples)
        taken = int(self.epoch(epoch).taken_before(p)[lane])
        while True:
            size = int(self.epoch(epoch).sizes_L[lane])
            for number in range(taken // self.shuffle, -(-size // self.shuffle)):
                start = number * self.shuffle
                length = min(self.shuffle, size - start)
                if taken < start + length:  # else the lane gave all its samples of this epoch before g
                    order = self._permutation(epoch, lane, number, length)
                    yield Window(epoch=epoch, start=start, order=order, skip=max(taken - start, 0))
            epoch, taken = epoch + 1, 0

    def _permutation(self, epoch: int, lane: int, number: int, length: int) -> Ints:
        if self.shuffle == 1:
            return np.arange(length)
        return generator(self.seed, "window order", epoch, lane, number).permutation(length)
