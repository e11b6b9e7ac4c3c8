"""The stream of one lane: undecoded samples, window by window, from any position on.

`order.py` says which samples a window holds and in which order it gives them; here they are read. A window's samples
are read in the order of the shards and put where their turn will be.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from msdiff_dist.data.access import DEFAULT_ACCESS, Access
from msdiff_dist.data.corruption import Corruption, CorruptionReport
from msdiff_dist.data.index import FIELD, INDEX_NAME, STRICT, Shard
from msdiff_dist.data.latent_blocks import Chunk
from msdiff_dist.data.order import Ints, StreamOrder, Window, grouped
from msdiff_dist.data.tar_members import TarError, chunks
from msdiff_dist.errors import DataError

Rows = tuple[Chunk, range]
"""Some rows of a chunk."""


@dataclass(frozen=True)
class Picked:
    """Samples taken from one chunk, and their places among all that one call of `take` returned.

    Attributes:
        place_n: row i of `chunk` is the sample in place place_n[i].
    """

    chunk: Chunk
    place_n: Ints


class LaneStream:
    """The lane's undecoded samples from sample number g of the order on, without end.

    Opens only the shard in which the current window starts and those after it. While one window is given, the next is
    read at the same pace. So reading is spread evenly, and at most two windows are held in memory.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        order: StreamOrder,
        lane: int,
        g: int,
        access: Access = DEFAULT_ACCESS,
        corruption: CorruptionReport = STRICT,
    ) -> None:
        self._windows = order.windows(lane, g)
        first = next(self._windows)
        self._source = _reading_order(_Reader(shards, access, corruption), order, lane, first.epoch, first.start)
        self._given, self._at = _WindowBuffer(first), first.skip  # the window being given, and the next place to give
        self._coming = _WindowBuffer(next(self._windows))
        self._rest: Rows | None = None  # rows of the latest chunk that lie past the window it was read for

    def take(self, most: int) -> list[Picked]:
        """The next `most` samples, or fewer where a window ends, but at least one.

        Raises:
            DataError: there is more corruption than `corruption` allows.
        """
        if self._at == self._given.size:
            self._given, self._at = self._coming, 0
            self._coming = _WindowBuffer(next(self._windows))
        # A window must be complete before any of it is given: its first place may hold the last sample read. From the
        # next one, as many samples are read as this one has given.
        self._read(self._given, self._given.size)
        self._read(self._coming, self._at)
        start, self._at = self._at, min(self._at + most, self._given.size)
        return self._given.take(start, self._at)

    def _read(self, window: _WindowBuffer, samples: int) -> None:
        """Read on until the window holds `samples` samples, or all of its own if they are fewer."""
        while window.filled < min(samples, window.size):
            chunk, rows = self._rest or next(self._source)
            room = window.size - window.filled
            window.put(chunk, rows[:room])
            self._rest = (chunk, rows[room:]) if len(rows) > room else None


class _WindowBuffer:
    """A window as it is read.

    Samples of blocks are copied into columns at the places of their turns, so that most `take`s are one slice. Single
    samples, and blocks whose columns differ from the first block's, are kept as they are.
    """

    def __init__(self, window: Window) -> None:
        self.size, self.filled = window.size, 0
        # `order` gives the number in reading order for each place. The argsort of a permutation is its inverse: the
        # place for each number in reading order.
        self._place_n = np.argsort(window.order)
        self._chunks: list[Chunk] = [{}]  # number 0 holds the blocks' samples, each in the row of its place
        self._chunk_n, self._row_n = np.zeros(self.size, np.int64), np.arange(self.size)  # where each place's sample is
        self._remaining = [0]  # samples of each chunk that are not yet given

    def put(self, chunk: Chunk, rows: range) -> None:
        """Add the next samples in reading order."""
        place_n = self._place_n[self.filled : self.filled + len(rows)]
        self.filled += len(rows)
        number = 0
        if len(chunk["__key__"]) > 1 and self._fits(chunk):
            for name, column in chunk.items():
                self._chunks[0][name][place_n] = column[rows.start : rows.stop]
        else:
            number = len(self._chunks)
            self._chunks.append(chunk)
            self._remaining.append(0)
            self._chunk_n[place_n], self._row_n[place_n] = number, rows
        self._remaining[number] += len(rows)

    def _fits(self, block: Chunk) -> bool:
        """Whether the block's columns are those of chunk 0, which the first block decides."""
        if not self._chunks[0]:
            self._chunks[0] = {n: np.empty((self.size, *c.shape[1:]), c.dtype) for n, c in block.items()}
        columns = self._chunks[0]
        return columns.keys() == block.keys() and all(
            columns[n].dtype == c.dtype and columns[n].shape[1:] == c.shape[1:] for n, c in block.items()
        )

    def take(self, start: int, stop: int) -> list[Picked]:
        """The samples in places start to stop - 1. A chunk is released when its last sample is given."""
        picked = []
        for number, place_n in grouped(self._chunk_n[start:stop]):
            # Rows of chunk 0 are places. If it holds all that is asked for, a slice gives views and copies nothing.
            rows = self._row_n[start:stop][place_n] if number or len(place_n) < stop - start else slice(start, stop)
            chunk = self._chunks[number]
            picked.append(Picked({name: column[rows] for name, column in chunk.items()}, place_n))
            self._remaining[number] -= len(place_n)
            if not self._remaining[number]:
                self._chunks[number] = {}
        return picked


def first_sample(shards: Sequence[Shard], access: Access, corruption: CorruptionReport) -> Chunk:
    """The first sample of a source, as its lanes read it: a chunk of one row.

    Raises:
        DataError: it cannot be read, and `corruption` allows no more.
    """
    first = next(number for number, shard in enumerate(shards) if shard.num_samples)
    chunk, rows = next(_Reader(shards, access, corruption).places(first))
    return {name: column[rows.start : rows.start + 1] for name, column in chunk.items()}


def _reading_order(reader: _Reader, order: StreamOrder, lane: int, first_epoch: int, start: int) -> Iterator[Rows]:
    """The lane's samples shard after shard, epoch after epoch, from position `start` of `first_epoch` on."""
    for epoch in itertools.count(first_epoch):
        for number in order.epoch(epoch).shards[lane]:
            # `start` samples are still to be skipped: whole shards unopened, then rows. After that it stays 0.
            if start >= order.counts[number]:
                start -= order.counts[number]
                continue
            for chunk, rows in reader.places(number):
                if start < len(rows):
                    yield chunk, rows[start:]
                start = max(start - len(rows), 0)


class _Reader:
    """Reads shards, and fills the places of samples that a corrupt shard has lost.

    What fills them depends on the shards alone, so every rank, epoch and resumed run reads the same.
    """

    def __init__(self, shards: Sequence[Shard], access: Access, corruption: CorruptionReport) -> None:
        self._shards, self._access, self._corruption = shards, access, corruption

    def places(self, number: int) -> Iterator[Rows]:
        """As many samples as the shard was counted to hold of those that are used.

        A shard that has lost some repeats its own from the first on. One that has lost all gives those of the next
        shard that can be read.
        """
        places, given, source = self._shards[number].used, 0, number
        while given < places:
            before = given
            for chunk, rows in self._used(source):
                if given == places:
                    break
                rows = rows[: places - given]
                given += len(rows)
                yield chunk, rows
            if given == before:
                source = (source + 1) % len(self._shards)
                if source == number:
                    raise DataError(
                        FIELD, self._shards[number].path, "neither this nor any other shard can be read", "Repair them."
                    )

    def _used(self, number: int) -> Iterator[Rows]:
        """The samples of `_readable` that are used."""
        shard = self._shards[number]
        if shard.portion is None:
            yield from self._readable(number)
            return
        keep_n = shard.used_n
        first = 0
        for chunk, rows in self._readable(number):
            edges = np.flatnonzero(np.diff(keep_n[first : first + len(rows)], prepend=False, append=False))
            for start, stop in edges.reshape(-1, 2).tolist():
                yield chunk, rows[start:stop]
            first += len(rows)

    def _readable(self, number: int) -> Iterator[Rows]:
        """The samples of a shard up to its end or the first corruption."""
        shard, found = self._shards[number], 0

        def duplicate(key: str, what: str) -> None:
            error = DataError(FIELD, shard.path, f"sample {key!r}: {what}", "Make the shard again.")
            self._corruption.add(Corruption(shard.path, key, what), error)

        try:
            for chunk in chunks(shard.path, self._access, duplicate):
                n = len(chunk["__key__"])
                rows = range(min(n, shard.num_samples - found))
                if rows:
                    yield chunk, rows
                found += n
                if found > shard.num_samples:
                    break
        except (TarError, OSError) as e:
            problem, remedy = f"cannot be read after {found} samples ({e})", "Copy or make the shard again."
        else:
            if found == shard.num_samples:
                return
            held = "more" if found > shard.num_samples else found
            problem = f"holds {held} samples, but {shard.num_samples} were counted"
            remedy = f"Make it again, or delete the {INDEX_NAME} beside it if stale."
        if shard.problem is None:  # else it was reported when samples were counted
            self._corruption.add(Corruption(shard.path, None, problem), DataError(FIELD, shard.path, problem, remedy))
