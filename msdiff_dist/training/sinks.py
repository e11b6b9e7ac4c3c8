"""Where metrics go: metrics.jsonl, the terminal, TensorBoard, trackers, and what other packages add to `SINKS`.

Rank 0 only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from msdiff_dist.bounds import check_different
from msdiff_dist.errors import ConfigError, raise_all
from msdiff_dist.registry import Table
from msdiff_dist.terminal import Lines, duration
from msdiff_dist.training.metric_sink import EvaluationSink, GridSink, MetricSink, SinkContext
from msdiff_dist.training.metrics import StepMetrics
from msdiff_dist.training.mlflow_tracker import MlflowConfig, mlflow_tracker
from msdiff_dist.training.wandb_tracker import WandbConfig, wandb_tracker


class JsonLines:
    """One line a step in the run folder's metrics.jsonl."""

    def __init__(self, context: SinkContext) -> None:
        self._file = context.folder.metrics_file.open("a", buffering=1)

    def write(self, metrics: StepMetrics) -> None:
        """Append a line."""
        content = asdict(metrics)
        for key in ("validation", "guide_loss", "phase"):  # of the steps that have them
            if content[key] is None:
                del content[key]
        self._file.write(json.dumps(content) + "\n")

    def say(self, text: str) -> None:
        """Ignore it: the file holds metrics only."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard files in the run folder; TensorBoard hides steps past `first_step` of an earlier start."""

    def __init__(self, context: SinkContext) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,  # a quarter second that commands without training need not wait
        )

        self._board = SummaryWriter(str(context.folder.tensorboard), purge_step=context.first_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Record every number but the step itself."""
        for name, value in metrics.scalars().items():
            if name != "step":
                self._board.add_scalar(name, value, metrics.step)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of an evaluation."""
        for name, value in scores.items():
            self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Ignore it: TensorBoard shows numbers."""

    def close(self) -> None:
        """Flush and close."""
        self._board.close()


class Terminal:
    """A progress bar on a terminal; in a log file, a line for every twentieth of the run, and now and then between."""

    def __init__(self, context: SinkContext) -> None:
        self._is_terminal = context.terminal.isatty()
        self._total = context.total_steps
        self._console = Console(file=context.terminal, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} img/s{task.fields[eta]}"),
            console=self._console,
            disable=not self._is_terminal,
        )
        done = context.first_step
        self._task = self._bar.add_task("train", total=self._total, completed=done, loss=float("nan"), rate=0.0, eta="")
        self._bar.start()
        self._lines = Lines()

    def write(self, metrics: StepMetrics) -> None:
        """Move the bar; in a log file, print the line if one is due."""
        step, rate = metrics.step, metrics.images_per_second
        eta = "" if metrics.eta_seconds is None else f"  ETA {duration(metrics.eta_seconds)}"
        self._bar.update(self._task, completed=step, loss=metrics.loss, rate=rate, eta=eta)
        due = step % max(1, self._total // 20) == 0 or step == self._total
        if metrics.validation is not None:
            self.say(f"step {step}/{self._total}  held-out loss {held_out(metrics.validation)}")
        if not self._is_terminal and (due or self._lines.due()):
            self._lines.written()
            self.say(f"step {step}/{self._total}  loss {metrics.loss:.4f}  {rate:.0f} img/s{eta}")

    def say(self, text: str) -> None:
        """Print one line, above the bar."""
        self._console.print(text, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()


def held_out(validation: Mapping[str, Any]) -> str:
    """A held-out loss in words."""
    raw = f", {validation['raw']['loss']:.4f} of the last weights" if "raw" in validation else ""
    return f"{validation['loss']:.4f}{raw}"


def evaluation_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """The scores in a record of evaluations.jsonl by names that say what they are of: `evaluation/mobilenet/fid`."""
    space = record.get("features", {}).get("name", "")
    prefix = "/".join(["evaluation", *(["raw"] if record.get("weights") == "raw" else [])])
    return {
        f"{prefix}/{name}" if name.startswith("loss") else f"{prefix}/{space}/{name}": float(value)
        for name, value in record["metrics"].items()
    }


SINKS: Table[Callable[[SinkContext], MetricSink]] = Table(
    "metric sink", {"tensorboard": TensorBoard, "wandb": wandb_tracker, "mlflow": mlflow_tracker}
)
"""Sinks that a recipe can name in `metrics.sinks`; metrics.jsonl and the terminal are always there."""

_OPTIONAL = {"wandb", "mlflow"}  # sinks named after the package that they need, which not everyone installs


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go, besides metrics.jsonl and the terminal."""

    sinks: tuple[Annotated[str, SINKS], ...] = ("tensorboard",)
    """Where metrics go, besides metrics.jsonl and the terminal."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Settings of the sink `wandb`."""
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    """Settings of the sink `mlflow`."""

    def __post_init__(self) -> None:
        check_different("sinks", self.sinks)


def check_installed(config: MetricsConfig) -> None:
    """Check that the packages are there which the recipe's sinks need. Imports none of them.

    Raises:
        ConfigError: naming those that are missing, and how to install them.
    """
    raise_all(
        ConfigError(
            "metrics.sinks", name, f"the package {name} is not installed",
            f"Install it with `pip install {name}`, or leave it out.",
        )
        for name in config.sinks
        if name in _OPTIONAL and not _is_installed(name)
    )  # fmt: skip


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder of this name, such as W&B's own, has no origin


class Sinks:
    """All sinks of a run as one. Ranks other than 0 have none, and all calls do nothing."""

    def __init__(self, sinks: Sequence[MetricSink] = ()) -> None:
        self._sinks = sinks

    @classmethod
    def of_run(cls, config: MetricsConfig, context: SinkContext) -> Sinks:
        """metrics.jsonl, the sinks that the recipe names, and the terminal."""
        terminal = Terminal(context)
        context = replace(context, say=terminal.say)
        named = [SINKS[name](replace(context, settings=getattr(config, name, None))) for name in config.sinks]
        return cls([JsonLines(context), *named, terminal])

    def write(self, metrics: StepMetrics) -> None:
        """Give one step's metrics to every sink."""
        for sink in self._sinks:
            sink.write(metrics)

    def say(self, text: str) -> None:
        """Give one line to every sink."""
        for sink in self._sinks:
            sink.say(text)

    def grid(self, step: int, path: Path) -> None:
        """Give the grid of images of a step to every sink that takes them."""
        for sink in self._sinks:
            if isinstance(sink, GridSink):
                sink.grid(step, path)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Give a record of evaluations.jsonl to every sink that takes them, and to the user in a line."""
        scores = evaluation_scores(record)
        for sink in self._sinks:
            if isinstance(sink, EvaluationSink):
                sink.evaluation(record["step"], scores)
        words = "  ".join(f"{name.removeprefix('evaluation/')} {value:.5g}" for name, value in scores.items())
        num = f" of {record['num']} images" if "num" in record else ""
        self.say(f"evaluation of step {record['step']}: {words}{num}")

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sink in reversed(self._sinks):
            sink.close()
