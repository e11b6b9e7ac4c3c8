"""Parameters at another width: which old channel each new channel copies, and how it is scaled.

Rows of a weight (axis 0) make channels, columns (axis 1) read them. Where a channel is copied r times, each copy is
read with 1/r of the weight, so that the sum over channels does not change (Net2WiderNet, 1511.05641).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """New channels along one axis of a parameter, each a copy of an old channel.

    Attributes:
        source: int64 [n], the old channel that each new one copies.
        reads: float [n], factor on the weights of a layer that reads the channel (a column).
        writes: float [n], factor on the weights and bias of a layer that makes the channel (a row).
    """

    source: Tensor
    reads: Tensor
    writes: Tensor

    @staticmethod
    def resized(old: int, new: int) -> Channels:
        """`new` channels from `old`: channel i copies channel floor(i old / new), and is read by 1 / its copies."""
        source = torch.arange(new) * old // new
        return Channels(source, 1 / source.bincount(minlength=old)[source].float(), torch.ones(new))

    @staticmethod
    def joined(parts: Sequence[tuple[Channels, int]]) -> Channels:
        """Channels of several concatenated tensors, from (channels, old number of channels) of each."""
        offsets = torch.tensor([0, *(old for _, old in parts)]).cumsum(0).tolist()
        return Channels(
            torch.cat([part.source + at for (part, _), at in zip(parts, offsets, strict=False)]),
            torch.cat([part.reads for part, _ in parts]),
            torch.cat([part.writes for part, _ in parts]),
        )

    def twice(self, old: int) -> Channels:
        """These channels, `old` in the old tensor, two times in a row: scale and shift, or value and gate."""
        return Channels.joined([(self, old)] * 2)


@dataclass(frozen=True)
class Resized:
    """How a new parameter is made from the old one called `name`.

    Attributes:
        rows: channels along axis 0; None: unchanged.
        columns: channels along axis 1; None: unchanged.
    """

    name: str
    rows: Channels | None = None
    columns: Channels | None = None

    def apply(self, old: Tensor) -> Tensor:
        """The new tensor, with the dtype of the old one."""
        # Factors are cast first: a product with float32 would make half-precision weights float32.
        new = old
        if self.rows is not None:
            new = new[self.rows.source] * _along(self.rows.writes, new.ndim, 0).to(new.dtype)
        if self.columns is not None:
            new = new[:, self.columns.source] * _along(self.columns.reads, new.ndim, 1).to(new.dtype)
        return new

    def apply_to_gradient(self, old: Tensor, degree: int) -> Tensor:
        """The same of a tensor that averages powers of the parameter's gradient (an optimizer's moment).

        A weight's gradient is that of its row's output times its column's input. The r copies of an output share its
        gradient, each by the inverse of the factor with which it was made; a copy of an input is the input times that
        factor. So a wider model that computes the same has exactly these gradients.

        Args:
            degree: 1 for a mean of gradients, 2 for one of their squares.
        """
        new = old
        if self.rows is not None:
            new = new[self.rows.source] * _along((self.rows.reads / self.rows.writes) ** degree, new.ndim, 0)
        if self.columns is not None:
            new = new[:, self.columns.source] * _along(self.columns.writes**degree, new.ndim, 1)
        return new

    @property
    def is_copy(self) -> bool:
        """Whether nothing changes but the name."""
        return self.rows is None and self.columns is None


def _along(scale: Tensor, ndim: int, axis: int) -> Tensor:
    """`scale` [n] shaped to broadcast along one axis of a tensor with `ndim` axes."""
    return scale.view(*[1] * axis, -1, *[1] * (ndim - axis - 1))
