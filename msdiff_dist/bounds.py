"""Bounds of what recipes and options may give: numbers, seeds, names of files, bytes of memory."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from msdiff_dist.errors import ConfigError

MOST_BYTES = 2**44
"""More than the memory that any one process can have: 16 TiB."""
GREATEST_FLOAT = 3.4028234663852886e38
"""The greatest finite float32."""
_GREATEST_INT = 2**63 - 1
_LONGEST_NAME = 200  # bytes; file systems take 255, and what is written aside or numbered adds to a name


def check_number(field: str, value: float, *, infinite: bool = False) -> None:
    """Raise ConfigError for an integer that does not fit 64 bits, and for a number that is not finite in float32.

    Args:
        infinite: whether infinity has a meaning there.
    """
    if isinstance(value, int):
        if abs(value) > _GREATEST_INT:
            raise ConfigError(field, value, "is too large: integers have 64 bits", "Write a smaller number.")
    elif value != value or not (infinite or abs(value) <= GREATEST_FLOAT):
        problem = "is not a finite number" if value - value != 0 else "is too large for fp32"
        raise ConfigError(field, value, problem, "Write a finite number.")


def check_between(field: str, value: float | None, least: float, most: float) -> None:
    """Raise ConfigError for a number outside [least, most]; None passes."""
    if value is None:
        return
    if not value >= least:
        problem = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ConfigError(field, value, problem, f"Set it to {least} or more.")
    if not value <= most:
        raise ConfigError(field, value, f"must be at most {most}", "Write a smaller number.")


def check_seed(field: str, value: int) -> None:
    """Raise ConfigError for a seed that not every generator of random numbers takes."""
    if not 0 <= value <= _GREATEST_INT:
        raise ConfigError(field, value, "a seed is a whole number from 0 to 2**63 - 1", "Use 0, say.")


def check_text(field: str, value: str) -> None:
    """Raise ConfigError for text with control characters other than tabs and line ends, or that is not Unicode."""
    for at, character in enumerate(value):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            problem = f"has the control character U+{ord(character):04X} at {at}"
            raise ConfigError(field, value, problem, "Remove it.")


def check_name(field: str, value: str, of: str = "a file or folder") -> None:
    """Raise ConfigError for text that cannot be the name of a file in a folder.

    Args:
        of: what is named, for the message.
    """
    if not value.strip():
        raise ConfigError(field, value, f"is empty, but it names {of}", "Give a name.")
    if value in (".", "..") or "/" in value:
        raise ConfigError(field, value, f"cannot name {of}: it is a path", "Use letters, digits, and any of _-+=.")
    if not value.isprintable() or value != value.strip() or value.startswith("-"):
        problem = f"cannot name {of}: it has invisible characters, or begins with a hyphen"
        raise ConfigError(field, value, problem, "Use letters, digits, and any of _-+=.")
    if len(value.encode()) > _LONGEST_NAME:
        raise ConfigError(field, value, f"cannot name {of}: it is longer than {_LONGEST_NAME} bytes", "Shorten it.")


def check_path(field: str, value: str) -> None:
    """Raise ConfigError for text that no file system takes as a path."""
    check_text(field, value)
    if len(value.encode()) > 4095 or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ConfigError(field, value, "is too long for a path or a part of one", "Shorten it.")


def check_different(field: str, values: Sequence[Any]) -> None:
    """Raise ConfigError for a list that names something twice."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise ConfigError(field, list(values), f"names {value!r} twice", "Remove one.")
        seen.add(value)


def check_bytes(field: str, value: Any, needed: int, what: str) -> None:
    """Raise ConfigError for a size that makes a process hold more bytes than any can.

    Args:
        what: the thing that takes `needed` bytes, as the subject of a sentence.
    """
    if needed > MOST_BYTES:
        problem = f"makes {what} take {needed / 2**40:,.0f} TiB, and no process has more than {MOST_BYTES >> 40} TiB"
        raise ConfigError(field, value, problem, "Use a smaller one.")
