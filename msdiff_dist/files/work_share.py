"""Several processes, on any nodes, that fill one folder together: each does its part, and who is last completes it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from msdiff_dist.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            known = f"of {self.of} the parts are 0 to {self.of - 1}"
            raise ConfigError("--part", self.number, known, "Name one of them, or raise --parts.")

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This part's pieces of the work, taken in turn."""
        return work[self.number :: self.of]


@contextmanager
def working(locks: Path, part: Part) -> Iterator[None]:
    """Be the one process that does this part of the folder that `locks` lies in.

    Raises:
        BlockingIOError: another process does it, or the folder is being filled in another number of parts.
    """
    locks.mkdir(parents=True, exist_ok=True)
    with alone(locks):
        for other in locks.glob("part_*"):
            if not other.name.endswith(f"_of_{part.of}"):
                _lock(other).close()
        own = _lock(locks / f"part_{part.number}_of_{part.of}")
    with own:
        yield


@contextmanager
def alone(locks: Path) -> Iterator[None]:
    """Wait until no process of any part is in this block."""
    with (locks / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _lock(path: Path) -> IO[str]:
    f = path.open("w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        raise
    return f
