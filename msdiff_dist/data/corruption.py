"""Damage in shards: named once each in the log, counted, and borne up to the recipe's limit."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from msdiff_dist.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """A sample, or with no key a shard, that cannot be used as it is."""

    url: str
    key: str | None
    problem: str

    @property
    def place(self) -> tuple[str, str | None]:
        """What makes it this damage and no other, whoever meets it and however often."""
        return self.url, self.key

    def __str__(self) -> str:
        sample = "" if self.key is None else f"sample {self.key!r} of "
        return f"{sample}{self.url}: {self.problem}"


class DamageReport:
    """What one process has met so far.

    Args:
        max_bad: how many damaged places are left out before reading stops; with 0 the first one stops it.
    """

    def __init__(self, max_bad: int) -> None:
        self._max_bad = max_bad
        self._known: set[tuple[str, str | None]] = set()
        self._untold: list[Damage] = []

    def add(self, damage: Damage, error: DataError) -> None:
        """Note damage; what was noted before does not count again.

        Raises:
            DataError: `error`, if none is allowed, or the limit's own.
        """
        if self._max_bad == 0:
            raise error
        if damage.place in self._known:
            return
        self._known.add(damage.place)
        self._untold.append(damage)
        _log.warning("left out: %s", damage)
        check_limit(len(self._known), self._max_bad, damage)

    def take(self) -> tuple[Damage, ...]:
        """What came new since the last call."""
        taken, self._untold = tuple(self._untold), []
        return taken


def check_limit(found: int, max_bad: int, last: Damage) -> None:
    """Refuse more than `max_bad` damaged places.

    Raises:
        DataError: there are more.
    """
    if found > max_bad:
        raise DataError(
            "data.max_bad", max_bad, f"{found} damaged shards or samples were met, the last: {last}",
            "Repair or remove them (the log names them all), or raise data.max_bad.",
        )  # fmt: skip
