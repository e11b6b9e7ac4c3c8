"""Corruption in shards: named once each in the log, counted, and borne up to the recipe's limit."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from msdiff_dist.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corruption:
    """A sample, or with no key a shard, that cannot be used as it is."""

    url: str
    key: str | None
    problem: str

    @property
    def place(self) -> tuple[str, str | None]:
        """What makes it this corruption and no other, whoever meets it and however often."""
        return self.url, self.key

    def __str__(self) -> str:
        sample = "" if self.key is None else f"sample {self.key!r} of "
        return f"{sample}{self.url}: {self.problem}"


class CorruptionReport:
    """What one process has met so far.

    Args:
        max_bad: how many corrupt places are left out before reading stops; with 0 the first one stops it.
    """

    def __init__(self, max_bad: int) -> None:
        self._max_bad = max_bad
        self._known: set[tuple[str, str | None]] = set()
        self._untold: list[Corruption] = []

    def add(self, corruption: Corruption, error: DataError) -> None:
        """Note corruption; what was noted before does not count again.

        Raises:
            DataError: `error`, if none is allowed, or the limit's own.
        """
        if self._max_bad == 0:
            raise error
        if corruption.place in self._known:
            return
        self._known.add(corruption.place)
        self._untold.append(corruption)
        _log.warning("left out: %s", corruption)
        check_limit(len(self._known), self._max_bad, corruption)

    def take(self) -> tuple[Corruption, ...]:
        """What came new since the last call."""
        taken, self._untold = tuple(self._untold), []
        return taken


def check_limit(found: int, max_bad: int, last: Corruption) -> None:
    """Refuse more than `max_bad` corrupt places.

    Raises:
        DataError: there are more.
    """
    if found > max_bad:
        raise DataError(
            "data.max_bad", max_bad, f"{found} corrupt shards or samples were met, the last: {last}",
            "Repair or remove them (the log names them all), or raise data.max_bad.",
        )  # fmt: skip
