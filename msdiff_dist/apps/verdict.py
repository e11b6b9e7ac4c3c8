"""The three verdicts that `msdiff doctor` and `msdiff check` give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Status = Literal["ok", "warning", "problem"]
_RISING: tuple[Status, ...] = ("ok", "warning", "problem")


def worst(statuses: Iterable[Status]) -> Status:
    """The gravest; ok of none."""
    return max(statuses, key=_RISING.index, default="ok")
