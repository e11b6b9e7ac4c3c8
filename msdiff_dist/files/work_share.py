"""Shares of work among processes, on any nodes, that fill one folder together.

Each process does its own part. Locks in the folder ensure that no two do the same part, and let a process look at what
all have done while none changes it.
"""

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
    """One share of the work, as `--part` and `--parts` give it.

    Attributes:
        number: of this part, in [0, of).
        of: how many parts there are.
    """

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            known = f"of {self.of} the parts are 0 to {self.of - 1}"
            raise ConfigError("--part", self.number, known, "Name one of them, or raise --parts.")

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """The items of `work` that belong to this part: every `of`-th, from `number` on."""
        return work[self.number :: self.of]


@contextmanager
def working(locks: Path, part: Part) -> Iterator[None]:
    """Be the only process that does this part of the work, for the length of the block.

    Args:
        locks: folder for lock files, made if it is missing; the same for all parts of one piece of work.

    Raises:
        BlockingIOError: another process does this part, or a process is at work that divides into another number of
            parts.
    """
    locks.mkdir(parents=True, exist_ok=True)
    with alone(locks):
        # Lock files of other divisions stay behind when their processes end. Only one that is locked is in use.
        for other in locks.glob("part_*"):
            if not other.name.endswith(f"_of_{part.of}"):
                _lock(other).close()
        own = _lock(locks / f"part_{part.number}_of_{part.of}")
    with own:
        yield


@contextmanager
def alone(locks: Path) -> Iterator[None]:
    """Wait for the other processes in such a block, then keep them out for the length of this one."""
    with (locks / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _lock(path: Path) -> IO[str]:
    """Lock a file without waiting. The lock ends when the file is closed, so also when its process is killed."""
    f = path.open("w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        raise
    return f
