"""The samples this rank trains on: read in its lanes, routed to the ranks of their stages, one micro batch ahead."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.corruption import Damage
from msdiff_dist.data.loader import StepLoader, StepSamples
from msdiff_dist.diffusion.timestep_sampler import StageQuotas, StepDraw
from msdiff_dist.distributed.router import Assignment, PendingBatch, RoutedBatch, Router


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch of this rank, sorted by stage, then by index.

    samples: as routed. t_n: times in the process's own variable. rows: each held stage's rows. damage: what this rank
    met for the first time while it read the step, with the step's first micro batch.
    """

    step: int
    samples: RoutedBatch
    t_n: Tensor
    rows: dict[int, slice]
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True)
class _Exchange:
    """One micro batch on its way."""

    step: int
    draw: StepDraw
    damage: tuple[Damage, ...]
    pending: PendingBatch


@dataclass
class FeedSeconds:
    """Seconds spent waiting since last read: for the loader (data) and for the exchange (routing)."""

    data: float = 0.0
    routing: float = 0.0


class Feed:
    """Iterates over micro batches; while one is computed the next is already on its way."""

    def __init__(
        self, loader: StepLoader, quotas: StageQuotas, router: Router, seed: int, accumulation: int, start_step: int
    ) -> None:
        self._loader, self._quotas, self._router = loader, quotas, router
        self._seed, self._accumulation, self._start_step = seed, accumulation, start_step
        self.seconds = FeedSeconds()
        self._under_way: PendingBatch | None = None
        self._read: dict[int, StepSamples] = {}  # of the step computed and the one read ahead

    def take_seconds(self) -> FeedSeconds:
        """Seconds waited since the last call."""
        taken, self.seconds = self.seconds, FeedSeconds()
        return taken

    def keys_of(self, step: int, indices: Collection[int]) -> dict[int, str]:
        """Keys, by index in the global batch, of those samples of a recent step that this rank read."""
        read = self._read[step]
        return {i: key for i, key in zip(read.index_n.tolist(), read.keys, strict=True) if i in indices}

    def close(self, finish: bool = True) -> None:
        """End the loader's workers, and finish the exchange under way unless the other ranks may be gone."""
        if self._under_way and finish:
            self._under_way.wait()
        self._under_way = None
        self._loader.close()

    def __iter__(self) -> Iterator[MicroBatch]:
        ahead = self._exchanges()
        current = next(ahead)
        while True:
            self._under_way = current.pending
            start = time.perf_counter()
            batch = current.pending.wait()
            self.seconds.routing += time.perf_counter() - start
            self._under_way = None
            following = next(ahead)
            self._under_way = following.pending
            t_n = torch.from_numpy(current.draw.t_B[batch.index_n])
            yield MicroBatch(current.step, batch, t_n, _stage_rows(batch.stage_n), current.damage)
            current = following

    def _exchanges(self) -> Iterator[_Exchange]:
        """Start one exchange per micro batch, as far ahead as they are asked for."""
        samples_of_step = iter(self._loader)
        step = self._start_step
        while True:
            start = time.perf_counter()
            samples: StepSamples = next(samples_of_step)
            self.seconds.data += time.perf_counter() - start
            self._read = {s: read for s, read in self._read.items() if s == step - 1} | {step: samples}
            start = time.perf_counter()
            draw = self._quotas.draw(self._seed, step, self._accumulation)
            assignment = Assignment(draw.stage_B, draw.micro_B, self._loader.source_rank(step), self._router.placement)
            self.seconds.routing += time.perf_counter() - start
            for micro in range(self._accumulation):
                start = time.perf_counter()
                pending = self._router.start(assignment, micro, samples)
                self.seconds.routing += time.perf_counter() - start
                yield _Exchange(step, draw, () if micro else samples.damage, pending)
            step += 1


def _stage_rows(stage_n: np.ndarray) -> dict[int, slice]:
    stages, starts, counts = np.unique(stage_n, return_index=True, return_counts=True)
    return {int(k): slice(int(s), int(s + n)) for k, s, n in zip(stages, starts, counts, strict=True)}
