"""Metrics for Weights & Biases. The package is imported when a run begins that asks for it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.bounds import check_different
from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.tracker import FINISH_S, Scalars, Tracker, known_run, remember_run

_INIT_S = 90  # for the server to answer; training does not wait


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases, for `wandb` in `metrics.sinks`. What is null, and all else (the key, the server, offline mode),
    is as its environment variables say."""

    project: str | None = None
    """Project; null: `WANDB_PROJECT`, or else W&B's `uncategorized`."""
    entity: str | None = None
    """User or team; null: `WANDB_ENTITY`, or else the user's default."""
    name: str | None = None
    """Name of the run; null: `WANDB_NAME`, or else the recipe's `name`."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""

    def __post_init__(self) -> None:
        check_different("tags", self.tags)


class WandbRun:
    """A run of Weights & Biases, with its files in RUN/wandb/.

    `step` is the axis of all charts, instead of W&B's own count, which could not go back: a run that resumes trains the
    steps past its checkpoint again, and their points are drawn again.
    """

    def __init__(self, context: SinkContext) -> None:
        import wandb

        assert isinstance(context.settings, WandbConfig)
        settings = context.settings
        # Before the run exists: a start that is killed in between must not make a second one.
        run_id = known_run(context, "wandb").get("id") or uuid.uuid4().hex[:8]
        remember_run(context, "wandb", {"id": run_id})
        # Standard output and error stay as they are: the progress bar is there.
        quiet = wandb.Settings(console="off", silent=True, init_timeout=_INIT_S, finish_timeout=FINISH_S)
        # Without a key `init` would ask for one at the terminal.
        if wandb.setup(quiet).settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.errors.UsageError("no API key: set WANDB_API_KEY, or run `wandb login`")
        self._image = wandb.Image
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or os.environ.get("WANDB_NAME") or context.recipe.get("name"),
            tags=list(settings.tags) or None,
            id=run_id,
            resume="allow",
            dir=str(context.folder.path),
            config=dict(context.recipe),
            allow_val_change=True,  # fields of the recipe that changed when the run was resumed
            settings=quiet,
        )
        self._run.define_metric("*", step_metric="step")
        self.place = self._run.url or f"offline; `wandb sync {Path(self._run.dir).parent}` uploads it"

    def log(self, steps: Sequence[Scalars]) -> None:
        """One row of the run's history for each step."""
        for scalars in steps:
            self._run.log(dict(scalars))

    def grid(self, step: int, path: Path) -> None:
        """The image `samples`."""
        self._run.log({"samples": self._image(str(path)), "step": step})

    def finish(self) -> None:
        """Upload what is left."""
        self._run.finish()


def wandb_tracker(context: SinkContext) -> Tracker:
    """The sink `wandb`."""
    return Tracker("wandb", lambda: WandbRun(context), context)
