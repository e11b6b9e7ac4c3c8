"""SLURM's generic resources, as `--gres` asks for them and `sinfo` lists them: `gpu:a100:4(S:0-1),lustre:1`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Commas inside parentheses separate sockets, `(S:0,1)`, not resources.
_SEPARATOR = re.compile(r",(?![^()]*\))")
_RESOURCE = re.compile(r"(?P<name>[^:()]+)(?::(?P<type>[^:()]*[^:()\d][^:()]*))?(?::(?P<count>\d+))?(?:\(.*\))?")


@dataclass(frozen=True, kw_only=True)
class Resource:
    """One resource of a node or request.

    Attributes:
        name: `gpu`, `shard`, `lustre`.
        type: `a100`; None: any.
        count: how many; 1 where the text gives no number.
    """

    name: str
    type: str | None = None
    count: int = 1

    def __str__(self) -> str:
        return ":".join([self.name, *([self.type] if self.type else []), str(self.count)])


def parse_gres(text: str) -> tuple[Resource, ...]:
    """The resources in a text; none for what sinfo prints of nodes without any, `(null)`.

    Raises:
        ValueError: a part of the text is no resource; the message is that part.
    """
    found = []
    for part in _SEPARATOR.split("" if text == "(null)" else text):
        if not part:
            continue
        match = _RESOURCE.fullmatch(part.strip().removeprefix("gres/").removeprefix("gres:"))
        if match is None:
            raise ValueError(part)
        found.append(Resource(name=match["name"], type=match["type"], count=int(match["count"] or 1)))
    return tuple(found)


def gpus(resources: Sequence[Resource]) -> int:
    """Number of GPUs, of all types together."""
    return sum(r.count for r in resources if r.name == "gpu")


def of_one_rank(resources: Sequence[Resource]) -> str:
    """The request of one rank: one GPU of the first type asked for, and every other resource unchanged."""
    first = next((r for r in resources if r.name == "gpu"), None)
    kept = [] if first is None else [replace(first, count=1)]
    return ",".join(map(str, [*kept, *(r for r in resources if r.name != "gpu")]))
