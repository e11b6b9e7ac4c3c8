"""The samples that this rank trains on, one micro batch after another.

A rank reads the samples of its lanes. The router takes each to a rank of its stage. While one micro batch is computed,
the samples of the next are exchanged, and a thread makes the one after it ready: it reads, draws stages, times, noise
and all other random numbers, and packs. So between two micro batches the host has nothing to do but to start them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from msdiff_dist.data.corruption import Corruption
from msdiff_dist.data.step_samples import StepSamples
from msdiff_dist.distributed.progress import EXCHANGE, READ, Progress
from msdiff_dist.distributed.router import Assignment, Outgoing, PendingBatch, RoutedBatch, Router
from msdiff_dist.training.ahead import Ahead
from msdiff_dist.training.batch_plans import BatchPlans
from msdiff_dist.training.draws import Drawing, Draws


class Reader(Protocol):
    """Reads this rank's samples of one global batch after another, as `data.loader.StepLoader` does."""

    def open(self) -> None:
        """Start to read."""

    def __next__(self) -> StepSamples:
        """This rank's samples of the next global batch."""

    def source_rank(self, batch: int) -> np.ndarray:
        """The rank that reads each sample of a global batch, [global_batch_size]."""

    def close(self) -> None:
        """End reading."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro batch of this rank, sorted by stage, then by index.

    Attributes:
        batch: number of the global batch, from 0.
        samples: the samples that were routed to this rank.
        drawn: their times, noise and other random numbers.
        rows: the rows of each held stage of which the batch has samples; none on a rank that computes nothing.
        corruption: corrupt shards and samples that this rank met for the first time while it read the global batch;
            they come with the first of its micro batches.
    """

    batch: int
    samples: RoutedBatch
    drawn: Draws
    rows: dict[int, slice]
    corruption: tuple[Corruption, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """One micro batch as the thread hands it over. `read` is what this rank read of its global batch; `outgoing` is
    still to be exchanged."""

    batch: int
    read: StepSamples
    outgoing: Outgoing
    drawn: Draws
    corruption: tuple[Corruption, ...]


@dataclass
class FeedSeconds:
    """Seconds spent waiting for micro batches to be read, drawn and packed (`data`), and spent on exchanges or waiting
    for them (`routing`)."""

    data: float = 0.0
    routing: float = 0.0


class Feed:
    """Gives the micro batches of one global batch after another.

    Collective: every rank asks for the same micro batches in the same order.

    Args:
        batches: how many samples of each stage every global batch has, and where they are computed.
        drawing: draws the random numbers of a micro batch.
        seed: seed of stages and times.
        accumulation: micro batches per global batch.
        start_batch: number of the first global batch, from 0, which is the number of steps done before.
        progress: is told when this rank reads and exchanges samples; None: nobody asks.
    """

    def __init__(
        self,
        loader: Reader,
        batches: BatchPlans,
        router: Router,
        drawing: Drawing,
        *,
        seed: int,
        accumulation: int,
        start_batch: int,
        progress: Progress | None = None,
    ) -> None:
        self._loader, self._batches, self._router, self._drawing = loader, batches, router, drawing
        self._seed, self._accumulation, self._start_batch = seed, accumulation, start_batch
        self._ahead = Ahead(self._prepared(), depth=1)
        self._micro_batches = self._arrivals()
        self._progress = progress or Progress()
        self.seconds = FeedSeconds()
        self._under_way: PendingBatch | None = None
        # What this rank read, by number of the global batch: of the one being computed, and of the one exchanged ahead.
        self._read: dict[int, StepSamples] = {}

    def take_seconds(self) -> FeedSeconds:
        """Seconds waited since the last call."""
        taken, self.seconds = self.seconds, FeedSeconds()
        return taken

    def next_batch(self) -> Iterator[MicroBatch]:
        """This rank's micro batches of the next global batch, each when it is asked for."""
        return itertools.islice(self._micro_batches, self._accumulation)

    def keys_of(self, batch: int, indices: Collection[int]) -> dict[int, str]:
        """Keys, by index, of the samples that this rank read of the global batch that is computed or exchanged now.

        Args:
            indices: the wanted indices in the global batch.
        """
        read = self._read[batch]
        return {i: key for i, key in zip(read.index_n.tolist(), read.keys, strict=True) if i in indices}

    def close(self, finish: bool = True) -> None:
        """End the thread and the loader's workers.

        Args:
            finish: wait for the exchange under way; not if the other ranks may be gone.
        """
        if self._under_way and finish:
            self._under_way.wait()
        self._under_way = None
        self._ahead.close()
        self._loader.close()

    def _arrivals(self) -> Iterator[MicroBatch]:
        # The exchange of the next micro batch is started before the current one is handed out, so that it runs while
        # the current one is computed. Further ahead would cost memory and hide no more.
        self._loader.open()  # here, because signals to its workers are a matter of the main thread
        current, pending = self._start_exchange()
        while True:
            start = time.perf_counter()
            self._progress.enter(EXCHANGE)
            samples = pending.wait()
            self.seconds.routing += time.perf_counter() - start
            self._under_way = None
            following, pending = self._start_exchange()
            yield MicroBatch(
                batch=current.batch,
                samples=samples,
                drawn=current.drawn,
                rows=_stage_rows(samples.stage_n),
                corruption=current.corruption,
            )
            current = following

    def _start_exchange(self) -> tuple[_Ready, PendingBatch]:
        """The next micro batch of the thread, and its exchange, which has begun."""
        start = time.perf_counter()
        self._progress.enter(READ)
        ready = next(self._ahead)
        taken = time.perf_counter()
        self._read = {b: read for b, read in self._read.items() if b == ready.batch - 1} | {ready.batch: ready.read}
        self._under_way = self._router.start(ready.outgoing)
        self.seconds.data += taken - start
        self.seconds.routing += time.perf_counter() - taken
        return ready, self._under_way

    def _prepared(self) -> Iterator[_Ready]:
        """One micro batch after another, read, drawn and packed. Runs in the thread, without any collective."""
        if self._router.device.type == "cuda":  # every thread has a current device of its own
            torch.cuda.set_device(self._router.device)
        for batch in itertools.count(self._start_batch):
            read = next(self._loader)
            plan = self._batches.of(batch)
            draw = plan.quotas.draw(self._seed, batch, self._accumulation)
            assignment = Assignment(
                stage_B=draw.stage_B,
                micro_B=draw.micro_B,
                source_B=self._loader.source_rank(batch),
                placement=plan.placement,
            )
            for micro in range(self._accumulation):
                outgoing = self._router.pack(assignment, micro, read)
                index_n = outgoing.index_n
                drawn = self._drawing(batch, index_n, draw.t_B[index_n])
                corruption = () if micro else read.corruption
                yield _Ready(batch=batch, read=read, outgoing=outgoing, drawn=drawn, corruption=corruption)


def _stage_rows(stage_n: np.ndarray) -> dict[int, slice]:
    """The rows of each stage, given the ascending stages of the rows."""
    stages, starts, counts = np.unique(stage_n, return_index=True, return_counts=True)
    return {int(k): slice(int(s), int(s + n)) for k, s, n in zip(stages, starts, counts, strict=True)}
