"""A metric sink that raises at step 3, while the other ranks already compute the next step."""

from __future__ import annotations

import time
from pathlib import Path

from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.metrics import StepMetrics
from msdiff_dist.training.sinks import SINKS


class PlantedFailure:
    """Raises at step 3, and writes the time at which it did into the run folder."""

    def __init__(self, context: SinkContext) -> None:
        self._at: Path = context.folder.path / "planted_failure_at"

    def write(self, metrics: StepMetrics) -> None:
        """Raise at step 3."""
        if metrics.step == 3:
            self._at.write_text(str(time.time()))
            raise RuntimeError("planted failure")

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


SINKS.add("planted_failure", PlantedFailure)
