"""What a check found, and where to read it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.apps.verdict import Status


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: `problem` prevents training of some kind, `warning` may slow it or prevent it elsewhere.
        found: what is there, as a phrase.
        cure: what to do, as an imperative sentence; None where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    cure: str | None = None


def ok(name: str, found: str) -> Finding:
    """A finding that needs no cure."""
    return Finding(name=name, status="ok", found=found)


def warning(name: str, found: str, cure: str) -> Finding:
    """A finding that may slow training, or prevent it elsewhere."""
    return Finding(name=name, status="warning", found=found, cure=cure)


def problem(name: str, found: str, cure: str) -> Finding:
    """A finding that prevents training of some kind."""
    return Finding(name=name, status="problem", found=found, cure=cure)


@dataclass(frozen=True)
class Reply:
    """Standard output of a command, stripped, or the reason why there is none."""

    output: str = ""
    failure: str | None = None


def ask(*command: str, seconds: float = 10) -> Reply:
    """Run a command that prints what it knows."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        return Reply(failure="is not installed")
    except OSError as e:
        return Reply(failure=f"cannot be run: {e.strerror}")
    except subprocess.TimeoutExpired:
        return Reply(failure=f"does not answer in {seconds:.0f} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ends with status {done.returncode}"]
        return Reply(failure=lines[-1])
    return Reply(output=done.stdout.strip())


def text_of(*paths: str | Path) -> str | None:
    """The content of the first of these files that can be read, stripped; None if none can."""
    for path in paths:
        try:
            return Path(path).read_text().strip()
        except OSError:
            continue
    return None


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
