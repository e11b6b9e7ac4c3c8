"""What a run folder holds, read for a report: what is broken or missing is named, and the rest is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from msdiff_dist.checkpoint.layout import INDEX, complete_checkpoints
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.recipe import Recipe, comparable_mapping, stored_recipe
from msdiff_dist.training.recipe_changes import Change, read_changes
from msdiff_dist.training.run_folder import ORIGIN, RunFolder
from msdiff_dist.training.stage_ends import StageEnds

MOST_POINTS = 800
"""Points of a curve; more steps are averaged."""
_MOST_LINES = 40_000  # of metrics.jsonl that are parsed: half a second
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d{9,11})\.(.+?)\.\d+\.\d+$")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The content of a run folder.

    Attributes:
        folder: the run folder. name: what the report calls the run.
        recipe: None where the folder has none that can be read. mapping: the same with every field written out.
        steps: the lines of metrics.jsonl, or an even choice among them, ascending by step.
        validations: those of all lines that have a held-out loss.
        evaluations: the lines of evaluations.jsonl.
        changes: of the recipe, when the run was resumed. origin: of a branch.
        world_size: ranks of the newest checkpoint; None where there is none.
        stage_ends: the ends of stages that the newest checkpoint holds.
        starts: when the run was started, seconds since 1970, and on which host.
        problems: what could not be read, as sentences.
    """

    folder: Path
    name: str
    recipe: Recipe | None = None
    mapping: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None
    stage_ends: StageEnds = field(default_factory=StageEnds)
    starts: list[tuple[int, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def num_stages(self) -> int:
        """Stages of the recipe, or of the metrics where there is none."""
        if self.recipe:
            return self.recipe.partition().num_stages
        return max((len(items(line, "loss_per_stage")) for line in self.steps), default=0)

    @property
    def last(self) -> dict[str, Any]:
        """The last step's metrics; empty before the first step."""
        return self.steps[-1] if self.steps else {}


def read_run(folder: Path, name: str) -> RunData:
    """Read a run folder. Nothing in it is changed, and it may be in use."""
    problems: list[str] = []

    def tried(what: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except Exception as e:  # whatever is wrong with a file, the others are shown
            problems.append(f"{what} cannot be read: {e}")
            return otherwise

    stored = tried("recipe.yaml", lambda: RunFolder(folder).stored_recipe(), None)
    if stored is None and not problems:
        problems.append("There is no recipe.yaml.")
    recipe = tried("recipe.yaml", lambda: stored_recipe(stored), None) if stored else None
    nothing: list[dict[str, Any]] = []
    every = tried("metrics.jsonl", lambda: list(_metrics(folder / "metrics.jsonl", problems)), nothing)
    steps = sorted({line["step"]: line for line in every}.values(), key=lambda line: line["step"])
    not_numbers = sum(number(line, "loss") is None for line in steps)
    if not_numbers:
        problems.append(f"metrics.jsonl: {not_numbers} steps have a loss that is no finite number; charts leave gaps.")
    newest: dict[str, Any] = tried("The newest checkpoint", lambda: _newest_index(folder), {})
    return RunData(
        folder=folder,
        name=name,
        recipe=recipe,
        mapping=tried("recipe.yaml", lambda: comparable_mapping(stored), {}) if recipe else {},
        steps=steps,
        validations=[line for line in steps if isinstance(line.get("validation"), dict)],
        evaluations=tried("evaluations.jsonl", lambda: list(_lines(folder / "evaluations.jsonl", problems)), []),
        changes=tried("recipe_changes.jsonl", lambda: read_changes(folder), []),
        origin=tried(ORIGIN, lambda: _mapping(folder / ORIGIN), {}),
        world_size=_world_size(newest),
        stage_ends=tried("The newest checkpoint", lambda: StageEnds.of(newest.get("stage_ends", {})), StageEnds()),
        starts=sorted(_starts(folder / "tensorboard")),
        problems=problems,
    )


def number(line: Any, *keys: str | int) -> float | None:
    """The finite number that keys lead to in nested data; None if there is none."""
    for key in keys:
        if isinstance(key, int):
            line = line[key] if isinstance(line, list) and 0 <= key < len(line) else None
        else:
            line = line.get(key) if isinstance(line, dict) else None
    is_number = isinstance(line, (int, float)) and not isinstance(line, bool)
    return float(line) if is_number and math.isfinite(line) else None


def items(line: Any, *keys: str) -> list[Any]:
    """The list that keys lead to; empty if there is none."""
    for key in keys:
        line = line.get(key) if isinstance(line, dict) else None
    return line if isinstance(line, list) else []


def _metrics(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        problems.append("There is no metrics.jsonl.")
        return
    with path.open("rb") as file:
        count = sum(1 for _ in file)
    stride = -(-count // _MOST_LINES) or 1
    broken = 0
    with path.open("rb") as file:
        for i, line in enumerate(file):
            # Of a long run an even choice, with the last line and every held-out loss.
            if i % stride and i != count - 1 and b'"validation"' not in line:
                continue
            try:
                found = parse_mapping(line)
            except ValueError:
                broken += 1
                continue
            if type(found.get("step")) is int:
                yield found
            else:
                broken += 1
    if broken:
        problems.append(f"metrics.jsonl: {broken} lines are torn or no metrics of a step, and were skipped.")
    if stride > 1:
        problems.append(f"metrics.jsonl has {count:,} lines: one of every {stride} was read.")


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    broken = 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            yield parse_mapping(line)
        except ValueError:
            broken += 1
    if broken:
        problems.append(f"{path.name}: {broken} lines are torn, and were skipped.")


def _mapping(path: Path) -> dict[str, Any]:
    return parse_mapping(path.read_bytes()) if path.is_file() else {}


def _newest_index(folder: Path) -> dict[str, Any]:
    paths = complete_checkpoints(folder / "checkpoints")
    return parse_mapping((paths[-1] / INDEX).read_bytes()) if paths else {}


def _world_size(index: Mapping[str, Any]) -> int | None:
    found = index.get("world_size")
    return found if type(found) is int and found > 0 else None


def _starts(folder: Path) -> Iterator[tuple[int, str]]:
    """TensorBoard names its files by time and host; each start of a run writes one."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if match := _EVENTS.search(path.name):
            yield int(match[1]), match[2]
