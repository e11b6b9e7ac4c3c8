"""What the groups of a check find, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from msdiff_dist.apps.verdict import Status


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of a check.

    Attributes:
        group: group that found it.
        name: what was looked at.
        status: `problem` ends the command with exit status 2.
        found: what was seen, in words.
        figures: the same as numbers, for JSON.
    """

    group: str
    name: str
    status: Status
    found: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def within(cls, group: str, name: str, errors: Mapping[str, float], limits: Mapping[str, float]) -> Finding:
        """A finding that is ok if each error is at most its limit; an error that is not a number is above it."""
        good = all(errors[key] <= limits[key] for key in errors)
        words = ", ".join(f"{key} {error:.1e} (limit {limits[key]:.0e})" for key, error in errors.items())
        figures = {"errors": dict(errors), "limits": dict(limits)}
        return cls(group=group, name=name, status="ok" if good else "problem", found=words, figures=figures)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a check runs.

    Attributes:
        device: what is checked.
        small: take sizes that a CPU computes in a minute.
        folder: for run folders; removed afterwards.
    """

    device: torch.device
    small: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is checked."""
        return self.device.type == "cuda"
