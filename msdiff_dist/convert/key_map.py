"""Key maps: rules that pair our tensors with another format's, and the layouts that turn one into the other.

Every rule works in both directions, so a reader and a writer share one key map. "Ours" are the names of
`MultistageUNet` (or diffusers' for an autoencoder), "theirs" the other format's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.errors import CheckpointError, did_you_mean


class Layout(ABC):
    """How one of our tensors is laid out in one or several tensors of another format."""

    @abstractmethod
    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        """Our tensor from theirs. Works on the meta device too, which gives the shape without reading."""

    @abstractmethod
    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """The inverse of `to_ours`."""


class Same(Layout):
    """Ours and theirs are equal."""

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        return theirs[0]

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [ours]


SAME = Same()


@dataclass(frozen=True)
class Pointwise(Layout):
    """Our linear layer's matrix [O, I] as a pointwise convolution's kernel [O, I, 1, ...] with `axes` ones."""

    axes: int

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        (kernel,) = theirs
        if kernel.ndim < 2 + self.axes or any(n != 1 for n in kernel.shape[-self.axes :]):
            return kernel  # no pointwise kernel: `check_complete` then reports its shape
        return kernel.reshape(kernel.shape[: -self.axes])

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [ours.reshape(*ours.shape, *[1] * self.axes)]


@dataclass(frozen=True)
class SplitQKV(Layout):
    """Our joint tensor [3 C, ...] of queries, keys and values as three tensors [C, ...], head after head in each.

    Args:
        heads: number of attention heads, H.
        heads_first: whether ours keeps the q, k and v of each head together (LDM's legacy order, [H, 3, C / H]) or has
            all q, then all k, then all v ([3, H, C / H]).
    """

    heads: int
    heads_first: bool

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        if not self.heads_first:
            return torch.cat(theirs)
        # Three of [H, C / H, ...] become [H, 3, C / H, ...], then [3 C, ...].
        return torch.stack([t.unflatten(0, (self.heads, -1)) for t in theirs], 1).flatten(0, 2)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        if not self.heads_first:
            return list(ours.chunk(3))
        return [t.flatten(0, 1) for t in ours.unflatten(0, (self.heads, 3, -1)).unbind(1)]


@dataclass(frozen=True)
class Rule:
    """Pairs one of our tensors with the tensor, or tensors, of the other format that have the same content."""

    ours: str
    """Our name."""
    theirs: tuple[str, ...]
    """Their names, in the order that the layout expects."""
    layout: Layout = SAME
    """How the content of ours is arranged in theirs."""


def rule(ours: str, theirs: str) -> Rule:
    """The rule that a tensor is the same under another name."""
    return Rule(ours, (theirs,))


class OursFromTheirs(TensorSource):
    """Another format's tensors as ours, each converted when it is read."""

    def __init__(self, theirs: TensorSource, rules: Iterable[Rule]) -> None:
        self._theirs = theirs
        self._rules = {r.ours: r for r in rules}
        self.files, self.metadata = theirs.files, theirs.metadata

    def names(self) -> list[str]:
        return list(self._rules)

    def meta(self, key: str) -> Tensor:
        r = self._rules[key]
        return r.layout.to_ours([self._theirs.meta(k) for k in r.theirs])

    def read(self, key: str) -> Tensor:
        r = self._rules[key]
        return r.layout.to_ours([self._theirs.read(k) for k in r.theirs])


class TheirsFromOurs(TensorSource):
    """Our tensors as another format's, each converted when it is read."""

    def __init__(self, ours: TensorSource, rules: Iterable[Rule]) -> None:
        self._ours = ours
        # A rule may give several of their tensors: `i` is the place of `k` among them.
        self._where = {k: (r, i) for r in rules for i, k in enumerate(r.theirs)}
        self.files, self.metadata = ours.files, ours.metadata

    def names(self) -> list[str]:
        return list(self._where)

    def meta(self, key: str) -> Tensor:
        r, i = self._where[key]
        return r.layout.to_theirs(self._ours.meta(r.ours))[i]

    def read(self, key: str) -> Tensor:
        r, i = self._where[key]
        return r.layout.to_theirs(self._ours.read(r.ours))[i]


def check_complete(
    source: TensorSource, rules: Iterable[Rule], others: Collection[str], shapes: Mapping[str, Tensor], what: str
) -> None:
    """Raise unless the source holds exactly the tensors that the rules take, in the model's shapes.

    Args:
        source: another format's tensors.
        rules: pairs each of our tensors with some of the source.
        others: keys of the source that no rule takes and that are accounted for in the report.
        shapes: our model's parameters, on the meta device.
        what: the name of the format, for messages.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; the first few are named.
    """
    rules = list(rules)
    present = set(source.names())
    wanted = {k for r in rules for k in r.theirs}
    missing = sorted(wanted - present)
    unexpected = sorted(present - wanted - set(others))
    if missing:
        raise CheckpointError(
            f"{what} keys", _some(missing), "are missing from the checkpoint",
            did_you_mean(missing[0], unexpected) if unexpected else "Use the complete checkpoint.",
        )  # fmt: skip
    if unexpected:
        raise CheckpointError(
            f"{what} keys", _some(unexpected), "belong to nothing in the model that the other keys describe",
            "Convert the checkpoint of a plain model of this family, or give its configuration with --config.",
        )  # fmt: skip
    for r in rules:
        theirs = [source.meta(k) for k in r.theirs]
        try:
            shape = tuple(r.layout.to_ours(theirs).shape)
        except RuntimeError:  # the layout cannot be applied to tensors of these shapes
            shape = None
        if shape != tuple(shapes[r.ours].shape):
            found = [tuple(t.shape) for t in theirs]
            raise CheckpointError(
                " + ".join(r.theirs), found[0] if len(found) == 1 else found,
                f"does not fit {r.ours} of shape {tuple(shapes[r.ours].shape)}",
                "Check the number of heads and the configuration that was given, if any.",
            )  # fmt: skip
    # A mistake in the rules, not in the checkpoint.
    unmapped = sorted(set(shapes) - {r.ours for r in rules})
    assert not unmapped, unmapped


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
