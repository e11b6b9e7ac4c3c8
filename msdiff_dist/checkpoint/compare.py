"""How two checkpoints differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from msdiff_dist.checkpoint.load import CheckpointReader


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One parameter or moment of both checkpoints, compared element by element.

    max_abs: greatest difference, infinite where one is not a number. scale: greatest absolute value in the first.
    """

    kind: str
    name: str
    max_abs: float
    scale: float

    @property
    def relative(self) -> float:
        """Greatest difference over greatest value."""
        return self.max_abs / self.scale if self.scale else float(self.max_abs > 0)


def compare(a: CheckpointReader, b: CheckpointReader) -> Iterator[TensorDifference]:
    """Everything both hold in the same shape, one tensor in memory of each at a time."""
    for kind in sorted({*a.kinds} & {*b.kinds}):
        for name, shape in a.index.shapes.items():
            if b.index.shapes.get(name) == shape:
                x, y = a.tensor(kind, name), b.tensor(kind, name)
                max_abs = float((x - y).abs().nan_to_num(torch.inf).max())
                yield TensorDifference(kind=kind, name=name, max_abs=max_abs, scale=float(x.abs().max()))
