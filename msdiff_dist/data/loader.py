"""The samples that one rank reads of every global batch, step by step.

Each rank reads some of the lanes, and each of its workers some of those. All build the same schedule, so nothing is
communicated: a rank or worker knows which samples of a batch are its own.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.corruption import Corruption, CorruptionReport
from msdiff_dist.data.index import IndexFiles, Shard, find_shards
from msdiff_dist.data.latent_blocks import Chunk
from msdiff_dist.data.mixture import Mixture
from msdiff_dist.data.order import Ints, StreamOrder, grouped
from msdiff_dist.data.samples import Samples, decode, synthesize
from msdiff_dist.data.shared_memory import check_shared_memory
from msdiff_dist.data.step_samples import BatchBuffer, StepSamples, merged_parts
from msdiff_dist.data.stream import LaneStream, Picked, first_sample
from msdiff_dist.data.worker_processes import set_up_worker, start_fork_server
from msdiff_dist.errors import ConfigError, DataError, UserError
from msdiff_dist.randomness import generator


def load_index(config: DataConfig) -> list[list[Shard]]:
    """The shards of each source of a configuration and their sample counts; empty for kind `synthetic`.

    Raises:
        DataError: shards are missing or not what their index says, or more are corrupt than `config.max_bad`.
    """
    indexes, corruption = IndexFiles(config.access), CorruptionReport(config.max_bad)
    return [find_shards(source.shards, indexes, corruption) for source in config.mixed]


def check_first_samples(config: DataConfig, seed: int, index: Sequence[Sequence[Shard]]) -> None:
    """Decode the first sample of each source: what every sample lacks is found before a run starts.

    Raises:
        DataError: as reading it in training would, unless `config.max_bad` lets training skip it.
    """
    for shards in index:
        try:
            sample = first_sample(shards, config.access, CorruptionReport(config.max_bad))
            decode(sample, config, seed, np.zeros(1, np.int64))
        except DataError:
            if config.max_bad == 0:
                raise


class StepLoader:
    """Endless iterator over `StepSamples` from `start_batch` on; reads nothing and starts no worker before the first.

    Which samples a global batch holds depends only on the shards, `config.lanes`, `config.shuffle`, the seed and the
    batch size, not on ranks, workers or the batch at which reading starts. So the number of a global batch is all that
    is needed to resume there.

    Args:
        index: the result of `load_index`; None to load it.

    Raises:
        ConfigError: the lanes cannot be dealt evenly to the ranks, or workers have too little shared memory.
        DataError: shards or samples are missing, corrupt or of the wrong kind.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        index: Sequence[Sequence[Shard]] | None = None,
    ) -> None:
        if config.lanes % world_size:
            raise ConfigError(
                "data.lanes", config.lanes, f"is not a multiple of the {world_size} ranks",
                f"Set data.lanes to a multiple of {world_size}, or run on a number of ranks that divides it.",
            )  # fmt: skip
        index = load_index(config) if index is None else index
        # What was found corrupt when samples were counted is reported with the first step.
        self._found = tuple(Corruption(s.path, None, s.problem) for shards in index for s in shards if s.problem)
        self._schedule = _Schedule(config, index, seed, global_batch_size)
        self._world_size = world_size
        lanes = range(rank, config.lanes, world_size)
        self._workers = min(config.workers, len(lanes))
        if self._workers:
            check_shared_memory(self._workers, math.ceil(global_batch_size / world_size) * config.sample_bytes)
        self._dataset = _RankDataset(self._schedule, list(lanes), start_batch)
        self._iterator: Iterator[StepSamples | UserError] | None = None

    def source_rank(self, batch: int) -> Ints:
        """The rank that reads each sample of a global batch, [global_batch_size]; every rank can compute it."""
        return self._schedule.locate(batch)[1] % self._world_size

    def __iter__(self) -> StepLoader:
        return self

    def open(self) -> None:
        """Start the workers, if there are any, so that another thread than the main one may iterate. Idempotent."""
        if self._iterator is None:
            self._iterator = _start(self._dataset, self._workers)

    def __next__(self) -> StepSamples:
        self.open()
        assert self._iterator is not None
        # DataLoader takes items from its workers in turn, and each worker yields one part of every step.
        parts = []
        for _ in range(max(self._workers, 1)):
            part = next(self._iterator)
            if isinstance(part, UserError):
                self.close()
                raise part
            parts.append(part)
        merged = merged_parts(parts)
        found, self._found = self._found, ()
        return replace(merged, corruption=found + merged.corruption) if found else merged

    def close(self) -> None:
        """End the workers and the iteration. Idempotent."""
        self._iterator = iter(())  # DataLoader's iterator ends its workers when nothing refers to it

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Schedule:
    """Which source and lane give each sample of each global batch."""

    def __init__(self, config: DataConfig, index: Sequence[Sequence[Shard]], seed: int, global_batch_size: int) -> None:
        self.config, self.index, self.seed, self.global_batch_size = config, index, seed, global_batch_size
        self.mixture = Mixture([source.weight for source in config.mixed]) if config.mixed else None
        self.orders = [
            StreamOrder([s.used for s in shards], config.lanes, config.shuffle, _source_seed(seed, source))
            for source, shards in enumerate(index)
        ]

    def numbers(self, batch: int) -> Ints:
        """The global sample numbers of a global batch, [global_batch_size]."""
        return np.arange(batch * self.global_batch_size, (batch + 1) * self.global_batch_size, dtype=np.int64)

    def locate(self, batch: int) -> tuple[Ints, Ints]:
        """(source, lane) of each sample of a global batch, [global_batch_size] each."""
        g_B = self.numbers(batch)
        if self.mixture is None:  # synthetic samples have no shards: the lanes take turns
            return np.zeros_like(g_B), g_B % self.config.lanes
        source_B, number_B = self.mixture.locate(g_B)
        lane_B = np.empty_like(g_B)
        for source, order in enumerate(self.orders):
            here = source_B == source
            lane_B[here] = order.lanes_of(number_B[here])
        return source_B, lane_B

    def lane(self, source: int, lane: int, batch: int, corruption: CorruptionReport) -> _Lane:
        """A lane of one source, open at its first sample in global batch `batch` or later."""
        assert self.mixture is not None
        number = int(self.mixture.taken_before(batch * self.global_batch_size)[source])
        order = self.orders[source]
        stream = LaneStream(self.index[source], order, lane, number, self.config.access, corruption)
        return _Lane(stream, order.num_samples, self.config, self.seed, corruption)


def _source_seed(seed: int, source: int) -> int:
    # The first source keeps the run's seed: `sources` with one entry gives the samples that `shards` gives.
    return seed if source == 0 else int(generator(seed, "source", source).integers(2**63))


class _Lane:
    """Decodes a lane's samples.

    The next sample that can be decoded takes the place of one that cannot, and comes again in its own place. So what a
    place holds depends on the data alone, wherever reading starts.

    Args:
        most_tries: samples tried for one place before giving up: as many as the source has.
    """

    def __init__(
        self, stream: LaneStream, most_tries: int, config: DataConfig, seed: int, corruption: CorruptionReport
    ) -> None:
        self._stream, self._most_tries, self._corruption = stream, most_tries, corruption
        self._config, self._seed = config, seed
        self._ahead: deque[Chunk] = deque()  # samples taken from the stream whose places are still to be filled

    def take(self, g_n: Ints) -> Iterator[tuple[Ints, Samples]]:
        """The lane's next samples, in parts of (places in g_n, the samples of these places).

        Args:
            g_n: their global sample numbers, ascending.
        """
        done = 0
        while done < len(g_n):
            if not self._ahead:
                # Whole chunks are decoded at once. If that fails, their samples are decoded one by one below, where the
                # error comes again and is reported for the sample that caused it.
                picked = self._stream.take(len(g_n) - done)
                try:
                    parts = [(done + p.place_n, self._decode(p.chunk, g_n[done + p.place_n])) for p in picked]
                except DataError:
                    self._ahead.extend(_one_by_one(picked))
                else:
                    yield from parts
                    done += sum(len(p.place_n) for p in picked)
                    continue
            yield np.array([done]), self._next_decodable(g_n[done : done + 1])
            done += 1

    def _next_decodable(self, g_1: Ints) -> Samples:
        """The next sample, or else the first after it that can be decoded, as sample number g_1."""
        own = sample = self._ahead.popleft()
        for at in range(self._most_tries):
            try:
                return self._decode(sample, g_1)
            except DataError as e:
                corruption = Corruption(sample["__url__"][0], sample["__key__"][0], f"{e.field}: {e.problem}")
                self._corruption.add(corruption, e)
            # Samples looked at in place of `own` stay in the queue, for their own places.
            if at == len(self._ahead):
                self._ahead.extend(_one_by_one(self._stream.take(1)))
            sample = self._ahead[at]
        raise DataError("data.shards", own["__url__"][0], "no sample of the lane can be decoded", "Repair the shards.")

    def _decode(self, chunk: Chunk, g_n: Ints) -> Samples:
        return decode(chunk, self._config, self._seed, g_n)


def _one_by_one(picked: list[Picked]) -> list[Chunk]:
    """Each sample as a chunk of its own, in order of place."""
    single = [
        (place, {name: column[row : row + 1] for name, column in p.chunk.items()})
        for p in picked
        for row, place in enumerate(p.place_n)
    ]
    return [chunk for _, chunk in sorted(single, key=lambda one: one[0])]


class _RankDataset(IterableDataset["StepSamples | UserError"]):
    """Iterated in each worker, where it yields the worker's part of every step; a `UserError` is its last item."""

    def __init__(self, schedule: _Schedule, lanes: list[int], start_batch: int) -> None:
        self.schedule, self.lanes, self.start_batch = schedule, lanes, start_batch

    def __iter__(self) -> Iterator[StepSamples | UserError]:
        worker = get_worker_info()
        lanes = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        try:
            yield from self.parts(set(lanes))
        except UserError as e:
            # DataLoader would turn an error raised in a worker into a RuntimeError with its traceback as text. One that
            # is yielded arrives as it is.
            e.__traceback__ = e.__cause__ = e.__context__ = None
            yield e

    def parts(self, lanes: set[int]) -> Iterator[StepSamples]:
        """The samples of these lanes, of every source, step by step."""
        schedule = self.schedule
        corruption = CorruptionReport(schedule.config.max_bad)
        open_lanes: dict[int, _Lane] = {}  # by source * number of lanes + lane
        mine_L = np.isin(np.arange(schedule.config.lanes), list(lanes))
        for batch in itertools.count(self.start_batch):
            (source_B, lane_B), first = schedule.locate(batch), batch * schedule.global_batch_size
            index_n = np.flatnonzero(mine_L[lane_B])
            part = BatchBuffer(schedule.config, len(index_n))
            if schedule.mixture is None:
                part.put(np.arange(len(index_n)), synthesize(schedule.config, schedule.seed, first + index_n))
            else:
                for source_lane, at_n in grouped(source_B[index_n] * schedule.config.lanes + lane_B[index_n]):
                    # A lane is opened when its first sample comes. Its position at `start_batch` is that at `batch`,
                    # because no sample between them is of this lane.
                    if source_lane not in open_lanes:
                        source, lane = divmod(source_lane, schedule.config.lanes)
                        open_lanes[source_lane] = schedule.lane(source, lane, self.start_batch, corruption)
                    for where_n, samples in open_lanes[source_lane].take(first + index_n[at_n]):
                        part.put(at_n[where_n], samples)
            yield part.samples(batch, index_n, corruption.take())


def _start(dataset: _RankDataset, workers: int) -> Iterator[StepSamples | UserError]:
    if workers:
        start_fork_server(__name__)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # its guess at a good number of workers
        return iter(
            DataLoader(
                dataset,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=2 if workers else None,
                multiprocessing_context="forkserver" if workers else None,
                worker_init_fn=set_up_worker,
                generator=torch.Generator(),  # its own: must not draw from torch's global one
            )
        )
