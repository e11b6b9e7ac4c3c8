"""The folder of one run: its paths, which recipe it belongs to, and how it is prepared for a new start.

run/
  recipe.yaml         the resolved recipe
  recipe_changes.jsonl  one line for each field that changed when the run was resumed; see `recipe_changes`
  branched_from.json  of a run that began from a checkpoint of another one: which
  metrics.jsonl       one line a step
  tensorboard/        the same for TensorBoard
  wandb_run.json, mlflow_run.json  which runs of these trackers it is
  checkpoints/        step_XXXXXXXX/, each complete or absent
  ema_snapshots/      the same, with the averages of ema.power alone
  samples/            step_XXXXXXXX.png, one grid each
  logs/               rank_N.log, to which every start on this machine appends; the logs of jobs
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from msdiff_dist.checkpoint.power_profile import SNAPSHOTS
from msdiff_dist.config import differences
from msdiff_dist.errors import ConfigError, RunFolderError
from msdiff_dist.files.atomic import atomic_write, partial_of, remove_partials, writing
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.files.text import read_yaml
from msdiff_dist.training.recipe_changes import FILE as CHANGES
from msdiff_dist.training.recipe_changes import Change, changes_at, may_change, read_changes, write_changes

ORIGIN = "branched_from.json"
"""Of a run that began from a checkpoint of another one: which."""


_TRACKED = ("wandb_run.json", "mlflow_run.json")


class RunFolder:
    """Paths inside one run folder, and its lock. Nothing is created before `open`.

    Args:
        complete: gives a recipe that an earlier version stored the fields that it lacks, and all recipes one form, so
            that they can be compared; None: they are compared as they are.
    """

    def __init__(self, path: Path, complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None) -> None:
        self.path = path
        self._complete = complete or dict
        self.recipe_file = path / "recipe.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / SNAPSHOTS
        self.samples = path / "samples"
        self.logs = path / "logs"
        self._lock_file = path / ".lock"
        self._lock: IO[str] | None = None

    def tracker_file(self, tracker: str) -> Path:
        """The file that says which run of an experiment tracker this one is."""
        return self.path / f"{tracker}_run.json"

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a folder that is not a run folder, or that belongs to a recipe that computes something else.

        Raises:
            RunFolderError: naming the files that are in the way, or every field that differs.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunFolderError("--run-dir", str(self.path), "is not a folder", "Name a new or empty folder.")
        if not self.recipe_file.exists():
            # What launchers put there before a run has its recipe.
            made_before: tuple[str, ...] = ("logs", "launch", ".lock", self.recipe_file.name)
            if (self.path / ORIGIN).exists():  # of a branch that was killed as it began
                made_before = (*made_before, ORIGIN, self.checkpoints.name)
            stray = [p.name for p in self.path.iterdir() if (partial_of(p.name) or p.name) not in made_before]
            if stray:
                raise RunFolderError(
                    "--run-dir", str(self.path), f"is not a run folder: it holds {', '.join(sorted(stray)[:5])}",
                    "Name a new or empty folder.",
                )  # fmt: skip
            return
        changed = [(f, a, b) for f, a, b in self._differences(recipe) if not may_change(f)]
        changed = [(f, a, b) for f, a, b in changed if (f, b) != ("train.precision", "auto")]  # takes the run's
        if changed:
            lines = "; ".join(f"{f} was {a!r}, now {b!r}" for f, a, b in changed)
            raise RunFolderError(
                "--run-dir", str(self.path), f"belongs to a run of another recipe ({lines})",
                "Restore these fields to resume this run, or train the changed recipe in a run of its own: from this "
                "run's newest checkpoint with `--branch NEW_RUN`, from scratch with another --run-dir.",
            )  # fmt: skip

    def _differences(self, recipe: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Dotted fields where `recipe` differs from the stored one, as (field, value stored, value now)."""
        return differences(self._comparable(self.stored_recipe() or {}), self._complete(recipe))

    def _comparable(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return self._complete(stored)
        except ConfigError as e:
            problem = f"holds a recipe that this version cannot read ({e})"
            raise RunFolderError("--run-dir", str(self.path), problem, "Use the version that made the run.") from None

    def stored_recipe(self) -> dict[str, Any] | None:
        """The resolved recipe of the run in this folder, as plain data; None if there is none yet."""
        if not self.recipe_file.exists():
            return None
        return read_yaml(self.recipe_file, "--run-dir")

    def open(self, recipe: Mapping[str, Any], begin: Callable[[], None] | None = None) -> None:
        """Lock the folder for this process, create its subfolders, and write the resolved recipe of a new run.

        `go_on` writes that of a run that is resumed.

        Args:
            begin: called before the recipe of a new run is written, while the folder is locked.

        Raises:
            RunFolderError: it belongs to another recipe, is in use by another process, or cannot be written.
        """
        self.check(recipe)
        with writing("--run-dir", self.path, RunFolderError):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_file.open("w")
            if not _locked(self._lock):
                self.close()
                problem, remedy = "is in use by another running process", "Wait for it, or name another folder."
                raise RunFolderError("--run-dir", str(self.path), problem, remedy)
            remove_partials(self.path, [self.recipe_file.name, self.metrics_file.name, CHANGES, ORIGIN, *_TRACKED])
            # Before the subfolders: a folder with those and without a recipe would be refused, so a kill in between
            # would lock the same command out.
            if not self.recipe_file.exists():
                if begin:
                    begin()
                elif (self.path / ORIGIN).exists():
                    self.close()
                    old = json.loads((self.path / ORIGIN).read_text())["run"]
                    raise RunFolderError(
                        "--run-dir", str(self.path), f"was to become a branch of {old}, and was not finished",
                        "Give the command with --branch again, or remove the folder.",
                    )  # fmt: skip
                self._write_recipe(recipe)
            for folder in (self.checkpoints, self.samples, self.logs):
                folder.mkdir(exist_ok=True)
            for leftover in self.samples.glob(".*"):  # weights and unfinished grids of a preview when a kill came
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def in_use(self) -> bool:
        """Whether a process holds the folder's lock, on this host or another."""
        if not self._lock_file.exists():
            return False
        with self._lock_file.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def go_on(self, recipe: Mapping[str, Any], step: int) -> list[Change]:
        """Record what changed in the recipe of the run, which goes on after `step` steps, and store the new recipe.

        The folder must be open. Returns the changes of this start.
        """
        stored = self._comparable(self.stored_recipe() or {})
        now = self._complete(recipe)
        recorded = changes_at(step, read_changes(self.path), stored, now, time.time())
        with writing("--run-dir", self.path, RunFolderError):
            # In this order: after a kill in between, the change is found again, and its line with it.
            write_changes(self.path, recorded)
            self._write_recipe(recipe)
        return [change for change in recorded if change.step == step]

    def _write_recipe(self, recipe: Mapping[str, Any]) -> None:
        atomic_write(self.recipe_file, OmegaConf.to_yaml(OmegaConf.create(dict(recipe))))

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def cut_metrics(self, after_step: int) -> None:
        """Drop the lines of metrics.jsonl of steps past `after_step`, which will be trained again."""
        if not self.metrics_file.exists():
            return
        kept, content = [], self.metrics_file.read_bytes()
        for line in content.splitlines():
            try:
                step = parse_mapping(line)["step"]
            except (ValueError, KeyError):  # the torn last line of a killed run
                break
            if not isinstance(step, int):
                break
            if step <= after_step:
                kept.append(line + b"\n")
        if b"".join(kept) != content:  # a run that only changes its phase has the file open
            atomic_write(self.metrics_file, b"".join(kept))


def _locked(file: IO[str]) -> bool:
    """Lock a file for this process; False if another process keeps it locked."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)  # `in_use` of a process that watches the run holds it for a moment
    return False
