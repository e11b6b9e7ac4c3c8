"""EDM2's averages of any length, made from snapshots of a few when training is over (Karras et al. 2024, section 3).

The profile asked for is fitted by a sum of those of the snapshots (`checkpoint.power_profile`), whose weights are then
summed alike.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.checkpoint.layout import complete_checkpoints, step_of
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.power_profile import LONGEST, SNAPSHOTS, exponent, fit, kind_of
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.weights import CheckpointWeights

_OPEN_FILES = 512
_POOR_FIT = 0.05


class PosthocWeights(CheckpointWeights):
    """The average of `length` at the last of a run's snapshots."""

    def __init__(self, readers: Sequence[CheckpointReader], length: float) -> None:
        super().__init__(readers[-1])
        power = self.reader.index.recipe["ema"]["power"]
        sources = [(reader, s) for reader in readers for s in power["lengths"]]
        held = np.array([(reader.index.step, exponent(s)) for reader, s in sources])
        coefficients, self.distance = fit(held, np.array([self.reader.index.step, exponent(length)]))
        self._terms = [(r, kind_of(s), float(c)) for (r, s), c in zip(sources, coefficients, strict=True)]
        self.description = replace(self.description, ema_length=length)

    def tensor(self, name: str) -> Tensor:
        shape = self.reader.index.shapes[name]
        return self.read_range(name, 0, math.prod(shape)).view(shape)

    def read_range(self, name: str, start: int, numel: int) -> Tensor:
        total = torch.zeros(numel, dtype=torch.float64)
        for reader, kind, coefficient in self._terms:
            total.add_(reader.read_range(kind, name, start, numel), alpha=coefficient)
        return total.float()

    def identity(self) -> str:
        terms = f"{super().identity()} {self.description.ema_length} {len(self._terms)}"
        return hashlib.sha256(terms.encode()).hexdigest()


def open_posthoc(run: Path, length: float, step: int | None = None) -> PosthocWeights:
    """The average of a relative length at the newest checkpoint or snapshot of a run folder, or at that of `step`.

    Every file is compared with its checksum.

    Raises:
        CheckpointError: the length is out of range, or the run has no such step or no snapshots. CorruptError.
    """
    if not 0 < length < LONGEST:
        raise CheckpointError("--ema-length", length, f"must lie in (0, {LONGEST:.4f})", "Try 0.05, 0.1 or 0.15.")
    snapshots = {step_of(p): p for p in complete_checkpoints(run / SNAPSHOTS)}
    if not snapshots:
        raise CheckpointError(
            "--ema-length", length, f"{run} holds no {SNAPSHOTS} to make the average from",
            "Train with ema.power.snapshot_every, or leave --ema-length out.",
        )  # fmt: skip
    held = {step_of(p): p for p in complete_checkpoints(run / "checkpoints") if step_of(p)} | snapshots
    last = max(held) if step is None else step
    if last not in held:
        steps = ", ".join(map(str, sorted(held)))
        raise CheckpointError("--step", step, f"{run} has no checkpoint or snapshot of that step", f"It has: {steps}.")
    folders = [p for s, p in snapshots.items() if s < last] + [held[last]]
    readers = [CheckpointReader(p, _OPEN_FILES // len(folders)) for p in folders]
    for reader in readers:
        reader.verify()
    weights = PosthocWeights(readers, length)
    if weights.distance > _POOR_FIT:
        warnings.warn(
            f"the {len(folders)} snapshots up to step {last} give the average of length {length} with an error of "
            f"{weights.distance:.0%}: lengths nearer to those of ema.power, or more snapshots, do better", stacklevel=3
        )  # fmt: skip
    return weights
