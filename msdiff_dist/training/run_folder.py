"""The folder of one run: what lies where, whose it is, and how it is taken up again.

run/
  recipe.yaml         the resolved recipe
  metrics.jsonl       one line a step
  tensorboard/        the same for TensorBoard
  checkpoints/        step_XXXXXXXX/, complete or absent
  ema_snapshots/      the same, of the averages of ema.power
  samples/            step_XXXXXXXX.png, one grid each
  logs/               rank_N.log of the last start, and older ones
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from msdiff_dist.checkpoint.power_profile import SNAPSHOTS
from msdiff_dist.config import differences
from msdiff_dist.errors import RunFolderError
from msdiff_dist.files.atomic import atomic_write, partial_of, remove_partials, writing

# Fields that may change between a run and its continuation: where and how it runs, never what it computes.
FREE_FIELDS = (
    "train.steps",
    "train.gradient_accumulation_steps",
    "train.global_batch_size",  # the checkpoint holds the batch size itself, and is held against it
    "train.micro_batch_size",
    "train.threads",
    "train.timeout_s",
    "data.workers",
    "data.shards",  # checked by content
    "data.accept_changes",
    "data.retries",
    "data.allow_pipe",
    "data.max_bad",
    "encode.",
    "parallel.",
    "checkpoint.",
    "ema.power.snapshot_every",
    "preview.",
    "metrics.",
    "model.attention_backend",
    "activation_checkpointing.",
    "extensions",  # what they add goes by its name in the other fields
)


class RunFolder:
    """Paths inside one run folder. Nothing is created before `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / SNAPSHOTS
        self.samples = path / "samples"
        self.logs = path / "logs"
        self._lock: IO[str] | None = None

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a folder that holds something else, or the run of a recipe that computes something else.

        Raises:
            RunFolderError: naming every field that differs.
        """
        if not self.path.exists():
            return
        if not self.recipe_file.exists():
            made_before = ("logs", "launch", ".lock", self.recipe_file.name)
            stray = [p.name for p in self.path.iterdir() if (partial_of(p.name) or p.name) not in made_before]
            if stray:
                raise RunFolderError(
                    "--run-dir", str(self.path), f"is not a run folder: it holds {', '.join(sorted(stray)[:5])}",
                    "Name a new or empty folder.",
                )  # fmt: skip
            return
        before = self.stored_recipe() or {}
        changed = [(f, a, b) for f, a, b in differences(before, dict(recipe)) if not f.startswith(FREE_FIELDS)]
        changed = [(f, a, b) for f, a, b in changed if (f, b) != ("train.precision", "auto")]  # it takes the run's
        if changed:
            lines = "; ".join(f"{f} was {a!r}, now {b!r}" for f, a, b in changed)
            raise RunFolderError(
                "--run-dir", str(self.path), f"belongs to a run of another recipe ({lines})",
                "Name another --run-dir, or restore these fields to go on with this run.",
            )  # fmt: skip

    def stored_recipe(self) -> dict[str, Any] | None:
        """The resolved recipe of the run that is here, as plain data; None if there is none yet."""
        if not self.recipe_file.exists():
            return None
        stored: Any = OmegaConf.to_container(OmegaConf.load(self.recipe_file))
        return dict(stored)

    def open(self, recipe: Mapping[str, Any]) -> None:
        """Take the folder for this process, create its parts and write the resolved recipe.

        Raises:
            RunFolderError: it is another recipe's, in use by another process, or cannot be written.
        """
        self.check(recipe)
        with writing("--run-dir", self.path, RunFolderError):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem, remedy = "is in use by another running process", "Wait for it, or name another folder."
                raise RunFolderError("--run-dir", str(self.path), problem, remedy) from None
            remove_partials(self.path, [self.recipe_file.name, self.metrics_file.name])
            # Before the other folders, so that after a kill at any point the same command may have the folder again.
            atomic_write(self.recipe_file, OmegaConf.to_yaml(OmegaConf.create(dict(recipe))))
            for folder in (self.checkpoints, self.samples, self.logs):
                folder.mkdir(exist_ok=True)
            for leftover in self.samples.glob(".*"):  # of a preview that a kill cut short
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def close(self) -> None:
        """Let another process take the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def cut_metrics(self, after_step: int) -> None:
        """Drop metrics lines of steps past `after_step`: they are about to be trained again."""
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text().splitlines():
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError):  # the torn last line of a killed run
                break
            if step <= after_step:
                kept.append(line + "\n")
        atomic_write(self.metrics_file, "".join(kept))
