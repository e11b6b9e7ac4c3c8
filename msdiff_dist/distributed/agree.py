"""What the ranks must agree on: errors, small objects, and sums of numbers in one collective.

All functions are collective: every rank of the job calls them, in the same order, from its main thread. Without a
process group they mean one rank. Objects travel through the job's store and numbers through the device's process group,
so that a step stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from msdiff_dist.distributed.object_exchange import ObjectExchange
from msdiff_dist.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_exchange: tuple[object, ObjectExchange] | None = None  # of the main thread, with the process group that it belongs to


def main_exchange() -> ObjectExchange:
    """The exchange that the functions of this module use."""
    global _exchange
    if not dist.is_initialized():
        return ObjectExchange(dist.HashStore(), 0, 1, "alone")
    if _exchange is None or _exchange[0] is not dist.group.WORLD:
        store = dist.distributed_c10d._get_default_store()
        _exchange = dist.group.WORLD, ObjectExchange(store, dist.get_rank(), dist.get_world_size(), "main")
    return _exchange[1]


def combined(own: T, combine: Callable[[list[T]], R]) -> R:
    """What rank 0 made of every rank's `own`, in rank order, by `combine`. The other ranks do not call it."""
    return main_exchange().combined(own, combine)


def joined(own: Iterable[T]) -> list[T]:
    """The elements that the ranks have, in rank order."""
    return combined(list(own), lambda every: list(chain.from_iterable(every)))


def from_rank_0(own: T) -> T:
    """Rank 0's `own`."""
    return main_exchange().from_rank_0(own)


def on_every_rank(action: Callable[[], T]) -> T:
    """Run `action` on every rank. If it raises UserError on any rank, raise the first one on all.

    A rank that alone stopped at bad input would leave the others waiting in their next collective.
    """
    result: T | None = None
    error: UserError | None = None
    try:
        result = action()
    except UserError as e:
        error = e
    first = combined(error, first_of)
    if first:
        raise first
    return result  # type: ignore[return-value]


def on_rank_0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. If it raises UserError, raise that on all."""
    result: T | None = None
    error: UserError | None = None
    if main_exchange().rank == 0:
        try:
            result = action()
        except UserError as e:
            error = e
    result, error = from_rank_0((result, error))
    if error:
        raise error
    return result  # type: ignore[return-value]


def first_of(found: Iterable[T | None]) -> T | None:
    """The first that is not None."""
    return next((one for one in found if one is not None), None)


def summed(tensor: Tensor) -> Tensor:
    """Sum of every rank's `tensor`, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def maximum(tensor: Tensor) -> Tensor:
    """Elementwise maximum of every rank's `tensor`, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


class Agreement:
    """Named numbers that are summed over all ranks in one all_reduce, in float64.

    A step has many things to agree on (losses, the gradient norm, the wish to stop), and each collective costs the
    latency of the whole job. So everything to be summed is added here, and one collective carries it all. Reading its
    result is the one time in a step at which the host waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # This rank's vectors by name, in the order in which all ranks add them.
        self._own: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor | float | Sequence[float]) -> None:
        """Add this rank's term of the sum `name`: a number, or a vector of the same length on every rank.

        Every rank adds the same names in the same order.
        """
        assert name not in self._own, f"{name} is already agreed on"
        self._own[name] = torch.as_tensor(values, dtype=torch.float64).reshape(-1)

    def add_own(self, name: str, value: float, rank: int, world_size: int) -> None:
        """Add this rank's entry of `name`, a vector [world_size] that will hold every rank's own value."""
        self.add(name, [value if other == rank else 0.0 for other in range(world_size)])

    def reduce(self) -> Mapping[str, Tensor]:
        """The sums over the ranks, float64 on the CPU. One all_reduce, one copy to the host."""
        lengths = [len(own) for own in self._own.values()]
        total = summed(torch.cat(self._on_device(list(self._own.values())))).cpu()
        return dict(zip(self._own, total.split(lengths), strict=True))

    def _on_device(self, vectors: list[Tensor]) -> list[Tensor]:
        """The vectors, those of the host copied in one piece that nothing waits for."""
        if self._device.type == "cpu":
            return vectors
        of_host = [v for v in vectors if v.device.type == "cpu"]
        if not of_host:
            return vectors
        copied = torch.cat(of_host).pin_memory().to(self._device, non_blocking=True)
        pieces = iter(copied.split([len(v) for v in of_host]))
        return [next(pieces) if v.device.type == "cpu" else v for v in vectors]
