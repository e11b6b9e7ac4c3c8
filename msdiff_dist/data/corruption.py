"""Corrupt shards and samples: each is logged once and counted; more than `data.max_bad` end the command.

They are identified by place, so reading the same shard in every epoch does not count it again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from msdiff_dist.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corruption:
    """A corrupt sample or shard.

    Attributes:
        url: address of the shard.
        key: name of the sample in the shard; None if the shard itself is corrupt.
        problem: what is wrong with it, as a clause.
    """

    url: str
    key: str | None
    problem: str

    @property
    def place(self) -> tuple[str, str | None]:
        """The identity of the corruption: the same on every rank and in every epoch."""
        return self.url, self.key

    def __str__(self) -> str:
        sample = "" if self.key is None else f"sample {self.key!r} of "
        return f"{sample}{self.url}: {self.problem}"


class CorruptionReport:
    """The corruption that one process has met so far.

    Args:
        max_bad: how many corrupt places are skipped; one more is an error. With 0 the first is reported as itself.
    """

    def __init__(self, max_bad: int) -> None:
        self._max_bad = max_bad
        self._known: set[tuple[str, str | None]] = set()
        self._unreported: list[Corruption] = []

    def add(self, corruption: Corruption, error: DataError) -> None:
        """Count a corrupt place and log it, unless it was counted before.

        Raises:
            DataError: `error` if `max_bad` is 0; else the error of `check_limit`.
        """
        if self._max_bad == 0:
            raise error
        if corruption.place in self._known:
            return
        self._known.add(corruption.place)
        self._unreported.append(corruption)
        _log.warning("skipped: %s", corruption)
        check_limit(len(self._known), self._max_bad, corruption)

    def take(self) -> tuple[Corruption, ...]:
        """What was added since the last call."""
        taken, self._unreported = tuple(self._unreported), []
        return taken


def check_limit(found: int, max_bad: int, last: Corruption) -> None:
    """Raise an error if more than `max_bad` corrupt places were found.

    Raises:
        DataError: naming their number and the last one.
    """
    if found > max_bad:
        raise DataError(
            "data.max_bad", max_bad, f"{found} corrupt shards or samples were found, the last: {last}",
            "Repair or remove them (the log names them all), or raise data.max_bad.",
        )  # fmt: skip
