"""The samples that this rank trains on, one micro batch after another.

A rank reads the samples of its lanes. The router takes each to a rank of its stage. The exchange of the next micro
batch runs while the current one is computed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.corruption import Corruption
from msdiff_dist.data.loader import StepLoader, StepSamples
from msdiff_dist.diffusion.timestep_sampler import StageQuotas, StepDraw
from msdiff_dist.distributed.router import Assignment, PendingBatch, RoutedBatch, Router


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro batch of this rank, sorted by stage, then by index.

    Attributes:
        batch: number of the global batch, from 0.
        samples: the samples that were routed to this rank.
        t_n: time of each sample, in the process's own variable.
        rows: the rows of each held stage.
        corruption: corrupt shards and samples that this rank met for the first time while it read the global batch;
            they come with the first of its micro batches.
    """

    batch: int
    samples: RoutedBatch
    t_n: Tensor
    rows: dict[int, slice]
    corruption: tuple[Corruption, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Exchange:
    """One micro batch whose samples are being exchanged."""

    batch: int
    draw: StepDraw
    corruption: tuple[Corruption, ...]
    pending: PendingBatch


@dataclass
class FeedSeconds:
    """Seconds spent waiting for the loader (`data`), and spent on exchanges or waiting for them (`routing`)."""

    data: float = 0.0
    routing: float = 0.0


class Feed:
    """Gives the micro batches of one global batch after another; while one is computed the next is exchanged.

    Collective: every rank asks for the same micro batches in the same order.

    Args:
        seed: seed of stages and times.
        accumulation: micro batches per global batch.
        start_batch: number of the first global batch, from 0, which is the number of steps done before.
    """

    def __init__(
        self, loader: StepLoader, quotas: StageQuotas, router: Router, *, seed: int, accumulation: int, start_batch: int
    ) -> None:
        self._loader, self._quotas, self._router = loader, quotas, router
        self._seed, self._accumulation, self._start_batch = seed, accumulation, start_batch
        self._micro_batches = self._arrivals()
        self.seconds = FeedSeconds()
        self._under_way: PendingBatch | None = None
        # What this rank read, by number of the global batch: of the one being computed, and of the one read ahead.
        self._read: dict[int, StepSamples] = {}

    def take_seconds(self) -> FeedSeconds:
        """Seconds waited since the last call."""
        taken, self.seconds = self.seconds, FeedSeconds()
        return taken

    def next_batch(self) -> Iterator[MicroBatch]:
        """This rank's micro batches of the next global batch, each when it is asked for."""
        return itertools.islice(self._micro_batches, self._accumulation)

    def keys_of(self, batch: int, indices: Collection[int]) -> dict[int, str]:
        """Keys, by index, of the samples that this rank read of the global batch now computed or the one read ahead.

        Args:
            indices: the wanted indices in the global batch.
        """
        read = self._read[batch]
        return {i: key for i, key in zip(read.index_n.tolist(), read.keys, strict=True) if i in indices}

    def close(self, finish: bool = True) -> None:
        """End the loader's workers.

        Args:
            finish: wait for the exchange under way; not if the other ranks may be gone.
        """
        if self._under_way and finish:
            self._under_way.wait()
        self._under_way = None
        self._loader.close()

    def _arrivals(self) -> Iterator[MicroBatch]:
        # One micro batch ahead: its exchange is started before the current one is handed out, so that it runs while the
        # current one is computed. Further ahead would cost memory and hide no more.
        ahead = self._exchanges()
        current = next(ahead)
        while True:
            self._under_way = current.pending
            start = time.perf_counter()
            samples = current.pending.wait()
            self.seconds.routing += time.perf_counter() - start
            self._under_way = None
            following = next(ahead)
            self._under_way = following.pending
            t_n = torch.from_numpy(current.draw.t_B[samples.index_n])
            yield MicroBatch(
                batch=current.batch,
                samples=samples,
                t_n=t_n,
                rows=_stage_rows(samples.stage_n),
                corruption=current.corruption,
            )
            current = following

    def _exchanges(self) -> Iterator[_Exchange]:
        """Start the exchanges of one micro batch after another, each when it is asked for."""
        for batch in itertools.count(self._start_batch):
            start = time.perf_counter()
            samples: StepSamples = next(self._loader)
            self.seconds.data += time.perf_counter() - start
            self._read = {b: read for b, read in self._read.items() if b == batch - 1} | {batch: samples}
            start = time.perf_counter()
            draw = self._quotas.draw(self._seed, batch, self._accumulation)
            assignment = Assignment(
                stage_B=draw.stage_B,
                micro_B=draw.micro_B,
                source_B=self._loader.source_rank(batch),
                placement=self._router.placement,
            )
            self.seconds.routing += time.perf_counter() - start
            for micro in range(self._accumulation):
                start = time.perf_counter()
                pending = self._router.start(assignment, micro, samples)
                self.seconds.routing += time.perf_counter() - start
                yield _Exchange(batch=batch, draw=draw, corruption=() if micro else samples.corruption, pending=pending)


def _stage_rows(stage_n: np.ndarray) -> dict[int, slice]:
    """The rows of each stage, given the ascending stages of the rows."""
    stages, starts, counts = np.unique(stage_n, return_index=True, return_counts=True)
    return {int(k): slice(int(s), int(s + n)) for k, s, n in zip(stages, starts, counts, strict=True)}
