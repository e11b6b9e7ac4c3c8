"""How two checkpoints differ, tensor by tensor: what `msdiff checkpoint diff` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.terminal import track


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One tensor that both checkpoints hold, compared element by element.

    Attributes:
        kind: what it is of its parameter: `param`, an optimizer moment, or an average.
        name: name of the parameter.
        max_abs: greatest absolute difference of two elements, infinite if a difference is not a number.
        scale: greatest absolute value in the first checkpoint.
    """

    kind: str
    name: str
    max_abs: float
    scale: float

    @property
    def relative(self) -> float:
        """Greatest difference over greatest value; without a value above 0, 1 for any difference and 0 for none."""
        return self.max_abs / self.scale if self.scale else float(self.max_abs > 0)


def compare(a: CheckpointReader, b: CheckpointReader) -> Iterator[TensorDifference]:
    """The differences of all tensors that both hold in the same shape. Memory holds one tensor of each at a time."""
    common = [name for name, shape in a.index.shapes.items() if b.index.shapes.get(name) == shape]
    both = [
        (kind, name)
        for kind in sorted({*a.kinds} & {*b.kinds})
        for name in common
        if a.holds(kind, name) and b.holds(kind, name)  # frozen parameters have no moments
    ]
    for kind, name in track(both, "comparing", "tensors"):
        x, y = a.tensor(kind, name), b.tensor(kind, name)
        max_abs = float((x - y).abs().nan_to_num(torch.inf).max())
        yield TensorDifference(kind=kind, name=name, max_abs=max_abs, scale=float(x.abs().max()))
