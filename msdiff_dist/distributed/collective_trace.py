"""A record of every collective that this process issues, and a process group that communicates with nobody.

Together they show what one rank of a large job would do, without the job: the fake process group completes each
collective at once with this rank's own values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

# How torch calls its operators, and what is said of them here.
_KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One collective, as one rank issued it.

    Attributes:
        group: name of the process group, the same on all of its ranks.
        kind: `all_reduce`, `reduce_scatter`, ...
        what: what has to be the same on every rank of the group for the call to complete: types, numbers of elements,
            root. An exchange has different numbers on every rank.
        bytes: of what it takes or of what it gives on this rank, whichever are more.
        label, phase: of the recorder at the time of the call.
    """

    group: str
    kind: str
    what: str
    bytes: int
    label: str | None
    phase: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.what}" if self.what else self.kind


class CollectiveTrace(TorchDispatchMode):
    """Records the collectives that are issued inside its `with` block, in order.

    Attributes:
        calls: the record.
        phase: written into the calls that follow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.phase = ""
        self._label: str | None = None

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Write `label` into the calls inside the block."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._record(func, args)
        return func(*args, **(kwargs or {}))

    def _record(self, func: Any, args: Sequence[Any]) -> None:
        operator = func._schema.name.removeprefix("c10d::").strip("_")
        kind = next((kind for start, kind in _KINDS.items() if operator.startswith(start)), operator)
        # An operator's tensor arguments are its outputs and its inputs, or one list of both at once.
        sides = [side for side in (_tensors(arg) for arg in args) if side]
        what = ""
        if kind in ("all_to_all", "reduce_scatter"):
            # Older versions of torch leave these outputs as they were allocated, and a step needs finite values.
            for output in sides[0]:
                output.zero_()
        if kind != "all_to_all":
            parts = [f"{sum(t.numel() for t in side)} {_name(side[0].dtype)}" for side in sides]
            roots = [f"root {arg}" for argument, arg in zip(func._schema.arguments, args, strict=False)
                     if argument.name == "root_rank"]  # fmt: skip
            what = ", ".join(dict.fromkeys(parts + roots))
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        most = max((sum(t.numel() * t.element_size() for t in side) for side in sides), default=0)
        self.calls.append(
            Call(group=group.group_name, kind=kind, what=what, bytes=most, label=self._label, phase=self.phase)
        )


@contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Be rank `rank` of `world_size`, alone: collectives complete at once. For one rank after another."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())
