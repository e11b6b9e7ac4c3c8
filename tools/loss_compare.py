"""Compare the training of two runs, or of two commits: loss, loss per stage and gradient norm of every step.

Examples: python tools/loss_compare.py runs/before runs/after --equal
          python tools/loss_compare.py main HEAD --recipe recipes/quickstart.yaml --steps 8 --nproc 4

A commit is checked out in a temporary worktree, and its version of the recipe is trained in the current folder, where
the data are. Exit status: 0 alike, 1 different, 2 an error that the user can correct.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from command import run

from msdiff_dist.errors import UserError

FIELDS = ("loss", "loss_per_stage", "grad_norm")
# Rounding to bf16 would hide what is compared.
FIXED = ("preview.every=0", "checkpoint.every=0", "train.precision=fp32")
Steps = dict[int, dict[str, list[float]]]

Side = Annotated[str, typer.Argument(help="A run folder, or a commit, branch or tag of the repository here.")]


@dataclass(frozen=True)
class FieldDifference:
    """largest: relative, over all steps. first: the first step that differs at all, None if none does."""

    largest: float
    first: int | None


def loss_compare(
    a: Side,
    b: Side,
    equal: Annotated[bool, typer.Option("--equal", help="Alike means equal in every bit.")] = False,
    rtol: Annotated[float, typer.Option(help="Alike means no relative difference above this.")] = 1e-5,
    recipe: Annotated[Path, typer.Option(help="Recipe to train at commits.")] = Path("recipes/debug.yaml"),
    steps: Annotated[int, typer.Option(help="Steps to train at commits.")] = 8,
    nproc: Annotated[int, typer.Option(help="Ranks to train with at commits.")] = 1,
) -> None:
    """Compare the losses of two runs or commits."""
    with _run_of("A", a, recipe, steps, nproc) as run_a, _run_of("B", b, recipe, steps, nproc) as run_b:
        steps_a, steps_b = read_steps("A", run_a), read_steps("B", run_b)
    common = sorted(steps_a.keys() & steps_b.keys())
    if not common:
        raise UserError("B", b, f"has no step in common with {a}", "Compare runs over the same steps.")
    print(f"{len(common)} steps, {common[0]} to {common[-1]}")
    alike = True
    for field in FIELDS:
        found = difference(field, steps_a, steps_b, common)
        alike &= found.first is None if equal else found.largest <= rtol
        where = "equal in every bit" if found.first is None else f"different from step {found.first} on"
        print(f"{field:15} largest relative difference {found.largest:.3g}, {where}")
    for name, own, other in (("A", steps_a, steps_b), ("B", steps_b, steps_a)):
        if alone := sorted(own.keys() - other.keys()):
            print(f"steps in {name} alone: {len(alone)}, from {alone[0]} on")
            alike = False
    if not alike:
        raise typer.Exit(1)


def read_steps(name: str, folder: Path) -> Steps:
    """The compared fields of every step of a run folder.

    Raises:
        UserError: a line of its metrics.jsonl is not the record of a step.
    """
    steps: Steps = {}
    for number, line in enumerate((folder / "metrics.jsonl").read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            values = {f: entry[f] if isinstance(entry[f], list) else [entry[f]] for f in FIELDS}
            # The loss of a stage without samples is null.
            numbers = {f: [math.nan if v is None else float(v) for v in row] for f, row in values.items()}
            steps[int(entry["step"])] = numbers
        except (ValueError, KeyError, TypeError) as e:
            problem = f"line {number} of metrics.jsonl is not the record of a step ({e!r})"
            raise UserError(name, str(folder), problem, "Name the folder of a run.") from None
    return steps


def difference(field: str, a: Steps, b: Steps, common: list[int]) -> FieldDifference:
    """The difference of one field over the common steps."""
    largest, first = 0.0, None
    for step in common:
        x_n, y_n = a[step][field], b[step][field]
        found = max(map(_relative, x_n, y_n), default=0.0) if len(x_n) == len(y_n) else math.inf
        if found and first is None:
            first = step
        largest = max(largest, found)
    return FieldDifference(largest, first)


def _relative(x: float, y: float) -> float:
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    return abs(x - y) / max(abs(x), abs(y)) if math.isfinite(x) and math.isfinite(y) else math.inf


@contextmanager
def _run_of(name: str, side: str, recipe: Path, steps: int, nproc: int) -> Iterator[Path]:
    """The run folder that a side names, or that of a training at the commit that it names."""
    if (Path(side) / "metrics.jsonl").is_file():
        yield Path(side)
        return
    commit = _git("rev-parse", "--verify", "--quiet", f"{side}^{{commit}}")
    if commit.returncode:
        problem = "holds no metrics.jsonl" if Path(side).is_dir() else "is neither a run folder nor a commit here"
        raise UserError(name, side, problem, "Name a run that has trained, or a commit, branch or tag.")
    with tempfile.TemporaryDirectory(prefix="loss_compare_") as folder:
        tree = Path(folder) / "tree"
        added = _git("worktree", "add", "--detach", str(tree), commit.stdout.strip())
        if added.returncode:
            raise UserError(name, side, f"cannot be checked out ({added.stderr.strip()})", "Repair the repository.")
        try:
            _train(name, side, tree, recipe, ["--nproc", str(nproc), "--run-dir", f"{folder}/run"], steps)
            yield Path(folder) / "run"
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _train(name: str, side: str, tree: Path, recipe: Path, options: list[str], steps: int) -> None:
    own = tree / recipe
    if not own.is_file() and not recipe.is_file():
        raise UserError("--recipe", str(recipe), f"is neither in {side} nor here", "Name a recipe.")
    # The entry point is read from the commit: older ones have it in another module.
    project: dict[str, Any] = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["msdiff"].partition(":")
    source = f"from {module} import {function} as main; main()"
    path = str(own if own.is_file() else recipe)
    command = [sys.executable, "-c", source, "train", path, *options, f"train.steps={steps}", *FIXED]
    # The commit's package, not the one of the current folder or of the virtual environment.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    trained = subprocess.run(command, env=environment, capture_output=True, text=True)
    if trained.returncode:
        said = " ".join(trained.stderr.strip().splitlines()[-3:])
        raise UserError(name, side, f"does not train {recipe} ({said})", "Choose a recipe and commits that train.")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


if __name__ == "__main__":
    run(loss_compare)
