"""Averages of any length, made after training from snapshots of a few lengths (EDM2: 2312.02696, section 3.2).

The profile of the wanted average is fitted by a weighted sum of the snapshots' profiles (`checkpoint.power_profile`).
An average is linear in the weights that it averages, so the same sum of the snapshots approximates the wanted average.
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
from msdiff_dist.export.description import describe
from msdiff_dist.export.weights import CheckpointWeights
from msdiff_dist.models.freezing import freezing

_OPEN_FILES = 512  # by all snapshots together; a process may often open no more than 1024
_POOR_FIT = 0.05  # distance of the fitted profile, relative to the wanted one's norm, from which a warning is given


class PosthocWeights(CheckpointWeights):
    """The average of relative `length` at the step of the last reader.

    Args:
        readers: checkpoints and snapshots that hold averages, in order of step.

    Attributes:
        distance: error of the fitted profile, relative to the norm of the wanted one.
    """

    def __init__(self, readers: Sequence[CheckpointReader], length: float) -> None:
        # Not by the base class, which refuses a snapshot: that has averages of its own lengths alone.
        self.reader, self._kind = readers[-1], "ema"
        self.description = replace(describe(self.reader.index.recipe, self.reader.index.step), weights="ema")
        power = self.reader.index.recipe["ema"]["power"]
        sources = [(reader, held_length) for reader in readers for held_length in power["lengths"]]
        held_n2 = np.array([(reader.index.step, exponent(held_length)) for reader, held_length in sources])
        coefficients_n, self.distance = fit(held_n2, np.array([self.reader.index.step, exponent(length)]))
        self._terms = [
            (reader, kind_of(held_length), float(coefficient))
            for (reader, held_length), coefficient in zip(sources, coefficients_n, strict=True)
        ]
        self.description = replace(self.description, ema_length=length)
        patterns = self.reader.index.recipe["train"].get("freeze", ())  # runs of earlier versions have none
        self._frozen = freezing(self.description.model, tuple(patterns)).names

    def tensor(self, name: str) -> Tensor:
        shape = self.reader.index.shapes[name]
        return self.read_range(name, 0, math.prod(shape)).view(shape)

    def read_range(self, name: str, start: int, numel: int) -> Tensor:
        if name in self._frozen:  # every average is the weights, and the coefficients add up to 1 only nearly
            reader, kind, _ = self._terms[-1]
            return reader.read_range(kind, name, start, numel)
        # Coefficients of both signs cancel each other in part, so the sum is made in float64.
        total = torch.zeros(numel, dtype=torch.float64)
        for reader, kind, coefficient in self._terms:
            total.add_(reader.read_range(kind, name, start, numel), alpha=coefficient)
        return total.float()

    def identity(self) -> str:
        terms = f"{super().identity()} {self.description.ema_length} {len(self._terms)}"
        return hashlib.sha256(terms.encode()).hexdigest()


def open_posthoc(run: Path, length: float, step: int | None = None) -> PosthocWeights:
    """The average of a relative length at the newest checkpoint or snapshot of a run folder, or at that of `step`.

    Snapshots of before the run grew are of another model and are left out: the averages of later ones go back to the
    run's first step too. Compares every file with its checksum. Warns if the snapshots give an average of that length
    only roughly.

    Raises:
        CheckpointError: the length is out of range, the run has no snapshots, or it has none and no checkpoint of this
            step.
        CorruptError: a file is corrupt.
    """
    if not 0 < length < LONGEST:
        raise CheckpointError("--ema-length", length, f"must lie in (0, {LONGEST:.4f})", "Try 0.05, 0.1 or 0.15.")
    snapshots = {step_of(folder): folder for folder in complete_checkpoints(run / SNAPSHOTS)}
    if not snapshots:
        raise CheckpointError(
            "--ema-length", length, f"{run} holds no {SNAPSHOTS} to make the average from",
            "Train with ema.power.snapshot_every, or remove --ema-length.",
        )  # fmt: skip
    # Checkpoints hold the averages too, so one of them may be the last term; that of step 0 has averaged nothing yet.
    checkpoints = {step_of(folder): folder for folder in complete_checkpoints(run / "checkpoints") if step_of(folder)}
    held = checkpoints | snapshots
    last = max(held) if step is None else step
    if last not in held:
        steps = ", ".join(map(str, sorted(held)))
        raise CheckpointError("--step", step, f"{run} has no checkpoint or snapshot of that step", f"It has: {steps}.")
    folders = [folder for s, folder in snapshots.items() if s < last] + [held[last]]
    every = [CheckpointReader(folder, _OPEN_FILES // len(folders)) for folder in folders]
    readers = [reader for reader in every if _model_shapes(reader) == _model_shapes(every[-1])]
    for reader in readers:
        reader.verify()
    weights = PosthocWeights(readers, length)
    if weights.distance > _POOR_FIT:
        warnings.warn(
            f"the {len(readers)} snapshots up to step {last} give the average of length {length} with an error of "
            f"{weights.distance:.0%}: a length nearer to those of ema.power, or more snapshots, gives less error",
            stacklevel=3,
        )
    return weights


def _model_shapes(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    return {n: shape for n, shape in reader.index.shapes.items() if n.startswith(("shared.", "stages."))}
