"""What takes metrics, and what it is told of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from msdiff_dist.training.metrics import StepMetrics
from msdiff_dist.training.run_folder import RunFolder


class MetricSink(Protocol):
    """Takes every step's metrics, in order."""

    def write(self, metrics: StepMetrics) -> None:
        """Record one step."""

    def say(self, text: str) -> None:
        """Show one line to the user; a sink that holds numbers only ignores it."""

    def close(self) -> None:
        """Write what is buffered. Called once, also after a failure."""


@runtime_checkable
class GridSink(Protocol):
    """A sink that takes previews, too."""

    def grid(self, step: int, path: Path) -> None:
        """Record the grid of images in the file `path`, sampled after `step` steps."""


@runtime_checkable
class EvaluationSink(Protocol):
    """A sink that takes evaluations, too. They come later than the step that they are of."""

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of a step by names of their own: `evaluation/mobilenet/fid`."""


def _nowhere(text: str) -> None:
    """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class SinkContext:
    """The run that a sink is opened for.

    Attributes:
        folder: the run folder.
        first_step: steps done before this start.
        total_steps: step at which training ends.
        terminal: where messages for the user go: a terminal or a log file.
        recipe: the resolved recipe as plain data.
        settings: the section `metrics.NAME` of the recipe, for a sink that has one.
        say: shows one line to the user; any thread may call it.
    """

    folder: RunFolder
    first_step: int
    total_steps: int
    terminal: IO[str]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    settings: object = None
    say: Callable[[str], None] = _nowhere
