"""The stream of one lane: raw samples, window by window, from any position on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from msdiff_dist.data.access import DEFAULT_ACCESS, Access
from msdiff_dist.data.damage import Damage, DamageReport
from msdiff_dist.data.index import FIELD, STRICT, Shard
from msdiff_dist.data.order import StreamOrder
from msdiff_dist.data.shard_writer import INDEX_NAME
from msdiff_dist.data.tar_members import TarError, samples
from msdiff_dist.errors import DataError

RawSample = dict[str, Any]


def lane_stream(
    shards: Sequence[Shard],
    order: StreamOrder,
    lane: int,
    g: int,
    access: Access = DEFAULT_ACCESS,
    damage: DamageReport = STRICT,
) -> Iterator[RawSample]:
    """The lane's undecoded samples from sample number g of the order on, without end.

    Opens only the shard in which the current window starts and those after it. While a window is given out, the next
    one is read sample by sample, so that reading is spread evenly and about one window is held in memory.

    Raises:
        DataError: while reading, more damage than `damage` bears.
    """
    windows = order.windows(lane, g)
    first = next(windows)
    source = _reading_order(_Reader(shards, access, damage), order, lane, first.epoch, first.start)
    ahead: deque[RawSample] = deque()
    for window in itertools.chain([first], windows):
        while len(ahead) < window.size:
            ahead.append(next(source))
        held: list[RawSample | None] = [ahead.popleft() for _ in range(window.size)]
        for at in window.order[window.skip :].tolist():
            sample, held[at] = held[at], None
            assert sample is not None
            yield sample
            if len(ahead) < order.shuffle:
                ahead.append(next(source))


def _reading_order(reader: _Reader, order: StreamOrder, lane: int, epoch: int, start: int) -> Iterator[RawSample]:
    """The lane's samples shard after shard, epoch after epoch, from position `start` of `epoch` on."""
    for epoch in itertools.count(epoch):  # noqa: B020
        for number in order.epoch(epoch).shards[lane]:
            if start < order.counts[number]:
                yield from itertools.islice(reader.places(number), start, None)
            start = max(start - order.counts[number], 0)


class _Reader:
    """Reads shards; the places of samples that a damaged one has lost are filled, always alike."""

    def __init__(self, shards: Sequence[Shard], access: Access, damage: DamageReport) -> None:
        self._shards, self._access, self._damage = shards, access, damage

    def places(self, number: int) -> Iterator[RawSample]:
        """As many samples as the shard was counted to hold: if it lost some, its own again from the first on; if it
        lost all, those of the shards after it."""
        places, given, source = self._shards[number].num_samples, 0, number
        while given < places:
            before = given
            for sample in self._readable(source):
                if given == places:
                    break
                given += 1
                yield sample
            if given == before:
                source = (source + 1) % len(self._shards)
                if source == number:
                    raise DataError(FIELD, self._shards[number].path, "nor any other shard can be read", "Repair them.")

    def _readable(self, number: int) -> Iterator[RawSample]:
        """The samples of a shard up to its end or the first damage."""
        shard, found = self._shards[number], 0

        def duplicate(key: str, what: str) -> None:
            error = DataError(FIELD, shard.path, f"sample {key!r}: {what}", "Make the shard again.")
            self._damage.add(Damage(shard.path, key, what), error)

        try:
            for found, sample in enumerate(samples(shard.path, self._access, duplicate), start=1):
                if found > shard.num_samples:
                    break
                yield sample
        except (TarError, OSError) as e:
            problem, remedy = f"cannot be read after {found} samples ({e})", "Copy or make the shard again."
        else:
            if found == shard.num_samples:
                return
            held = "more" if found > shard.num_samples else found
            problem = f"holds {held} samples, but {shard.num_samples} were counted"
            remedy = f"Make it again, or delete the {INDEX_NAME} beside it if stale."
        if shard.problem is None:  # else it was told of when shards were counted
            self._damage.add(Damage(shard.path, None, problem), DataError(FIELD, shard.path, problem, remedy))
