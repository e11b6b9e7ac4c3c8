"""Parameters at another width: which old channels the new ones take their values from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """New channels along one axis: where each takes its values from, and how it is scaled when written or read."""

    source: Tensor
    reads: Tensor
    writes: Tensor

    @staticmethod
    def resized(old: int, new: int) -> Channels:
        source = torch.arange(new) * old // new
        return Channels(source, 1 / source.bincount(minlength=old)[source].float(), torch.ones(new))

    @staticmethod
    def joined(parts: Sequence[tuple[Channels, int]]) -> Channels:
        """Parts one after the other; with the old size of each."""
        offsets = torch.tensor([0, *(old for _, old in parts)]).cumsum(0).tolist()
        return Channels(
            torch.cat([part.source + at for (part, _), at in zip(parts, offsets, strict=False)]),
            torch.cat([part.reads for part, _ in parts]),
            torch.cat([part.writes for part, _ in parts]),
        )

    def twice(self, old: int) -> Channels:
        return Channels.joined([(self, old)] * 2)


@dataclass(frozen=True)
class Resized:
    """How a new tensor comes from the old one `name`; no axes where it is the same."""

    name: str
    rows: Channels | None = None
    columns: Channels | None = None

    def apply(self, old: Tensor) -> Tensor:
        """The new tensor, of the old one's type."""
        new = old
        if self.rows is not None:
            new = new[self.rows.source] * _along(self.rows.writes, new.ndim, 0).to(new.dtype)
        if self.columns is not None:
            new = new[:, self.columns.source] * _along(self.columns.reads, new.ndim, 1).to(new.dtype)
        return new


def _along(scale: Tensor, ndim: int, axis: int) -> Tensor:
    return scale.view(*[1] * axis, -1, *[1] * (ndim - axis - 1))
