"""Sweeps: one recipe, many changes to it, and a run for each change."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from msdiff_dist.bounds import check_between
from msdiff_dist.config import from_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.files.text import Override, read_document, read_text
from msdiff_dist.files.yaml_places import Places
from msdiff_dist.files.yaml_tree import compose_yaml

_MOST_RUNS = 10_000


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep file. Its field `recipe` distinguishes it from a recipe.

    Attributes:
        recipe: path of the recipe, relative to the sweep file.
        grid: dotted recipe fields and the values that each takes; every combination is a run.
        runs: further runs, each a mapping of dotted recipe fields to values.
        max_parallel: how many runs may run at the same time; None: what the cluster file says.
    """

    recipe: str
    grid: dict[str, list[Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    max_parallel: int | None = None

    def __post_init__(self) -> None:
        check_between("max_parallel", self.max_parallel, 1, 10**6)
        if not self.grid and not self.runs:
            raise ConfigError("grid", {}, "the sweep has no runs", "Give `grid` or `runs`.")
        for name, values in self.grid.items():
            if not values:
                raise ConfigError(f"grid.{name}", values, "has no values", "List at least one.")
        runs = math.prod(map(len, self.grid.values())) if self.grid else 0
        if runs + len(self.runs) > _MOST_RUNS:
            problem = f"makes {runs + len(self.runs):,} runs, and a sweep has at most {_MOST_RUNS:,}"
            raise ConfigError("grid", list(self.grid), problem, "Divide it into several sweeps.")

    @property
    def changes(self) -> list[dict[str, Any]]:
        """For each run, the dotted recipe fields that it changes and their values."""
        combinations = itertools.product(*self.grid.values()) if self.grid else ()
        return [*(dict(zip(self.grid, values, strict=True)) for values in combinations), *self.runs]


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read: what it says, and where it says so."""

    config: SweepConfig
    places: Places

    def overrides(self) -> list[list[Override]]:
        """For each run, its changes to the recipe, each with its place in the file."""
        changes, combinations = self.config.changes, len(self.config.changes) - len(self.config.runs)
        parents = ["grid" if i < combinations else f"runs[{i - combinations}]" for i in range(len(changes))]
        return [
            [Override(text, self.places.of(f"{parent}.{key}")) for key, text in zip(c, overrides_of(c), strict=True)]
            for c, parent in zip(changes, parents, strict=True)
        ]


def load_sweep(path: Path) -> Sweep | None:
    """The sweep in a YAML file; None if the file is missing, not YAML, or something else, such as a recipe.

    Raises:
        ConfigError: it is a sweep with wrong fields; all are named.
    """
    if not path.is_file():
        return None
    try:
        loaded = compose_yaml(read_text(path, "SWEEP"))
    except (yaml.YAMLError, ConfigError):
        return None
    is_sweep = isinstance(loaded, yaml.MappingNode) and any(
        key.value == "recipe" and isinstance(value, yaml.ScalarNode) for key, value in loaded.value
    )
    if not is_sweep:
        return None
    document = read_document(path, "SWEEP")
    return Sweep(document.parsed(lambda mapping: from_mapping(SweepConfig, mapping)), document.places)


def overrides_of(change: dict[str, Any]) -> list[str]:
    """A run's changes as `key=value` arguments."""
    return [f"{key}={json.dumps(value)}" for key, value in change.items()]


def run_names(changes: Sequence[dict[str, Any]]) -> list[str]:
    """A folder name for each run: its number and what it changes, e.g. `002_lr=0.0003_seed=1`."""
    return [f"{i:03d}_{change_name(change)}"[:80] for i, change in enumerate(changes)]


def change_name(change: dict[str, Any]) -> str:
    """What a run changes, as a part of a folder's name, e.g. `lr=0.0003_seed=1`."""
    words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in change.items()]
    return "".join(c if c.isalnum() or c in "=.-_" else "-" for c in "_".join(words))
