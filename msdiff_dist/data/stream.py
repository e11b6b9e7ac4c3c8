"""The stream of one lane: raw samples, window by window, from any position on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from msdiff_dist.data.access import DEFAULT_ACCESS, Access
from msdiff_dist.data.index import FIELD, Shard
from msdiff_dist.data.order import StreamOrder
from msdiff_dist.data.shard_writer import INDEX_NAME
from msdiff_dist.data.tar_members import TarError, samples
from msdiff_dist.errors import DataError

RawSample = dict[str, Any]


def lane_stream(
    shards: Sequence[Shard], order: StreamOrder, lane: int, g: int, access: Access = DEFAULT_ACCESS
) -> Iterator[RawSample]:
    """The lane's undecoded samples from sample number g of the order on, without end.

    Opens only the shard in which the current window starts and those after it. While a window is given out, the next
    one is read sample by sample, so that reading is spread evenly and about one window is held in memory.
    """
    windows = order.windows(lane, g)
    first = next(windows)
    source = _reading_order(shards, order, lane, first.epoch, first.start, access)
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


def _reading_order(
    shards: Sequence[Shard], order: StreamOrder, lane: int, epoch: int, start: int, access: Access
) -> Iterator[RawSample]:
    """The lane's samples shard after shard, epoch after epoch, from position `start` of `epoch` on."""
    for epoch in itertools.count(epoch):  # noqa: B020
        for number in order.epoch(epoch).shards[lane]:
            shard = shards[number]
            if start < shard.num_samples:
                yield from _shard_samples(shard, start, access)
            start = max(start - shard.num_samples, 0)


def _shard_samples(shard: Shard, skip: int, access: Access) -> Iterator[RawSample]:
    found = 0
    try:
        for found, sample in enumerate(samples(shard.path, access), start=1):
            if found > shard.num_samples:
                break
            if found > skip:
                yield sample
    except (TarError, OSError) as e:
        raise DataError(
            FIELD, shard.path, f"cannot be read after {found} samples ({e})", "Copy or make the shard again."
        ) from e
    if found != shard.num_samples:
        problem = (
            f"holds {'more' if found > shard.num_samples else found} samples, but {shard.num_samples} were counted"
        )
        raise DataError(FIELD, shard.path, problem, f"Make it again, or delete the {INDEX_NAME} beside it if stale.")
