"""How long the rest of a run takes, by what its last steps took: `eta_seconds` of metrics.jsonl."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean

WINDOW = 100
"""Steps whose mean a step to come is expected to take."""


class TimeLeft:
    """Expects the remaining steps to take what the last `WINDOW` took, and pauses to come what those of their kind did.

    The first step of a start is left out: it allocates memory and compiles. A step's time is that from the end of the
    step before to its own, less the pauses between them.

    Args:
        total_steps: step at which training ends.
        every: steps from one pause to the next, by kind; 0: there is none, or none that can be expected.
        clock: seconds, for tests.
    """

    def __init__(
        self, total_steps: int, every: Mapping[str, int], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._total, self._every, self._clock = total_steps, every, clock
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._pauses: dict[str, list[float]] = {kind: [] for kind in every}
        self._last: float | None = None  # when the last step ended
        self._paused = 0.0  # since then

    def paused(self, kind: str, seconds: float) -> None:
        """Training stood still for a checkpoint, a preview or validation."""
        self.stood_still(seconds)
        self.cost(kind, seconds)

    def stood_still(self, seconds: float) -> None:
        """Training stood still for a part of a longer pause, which `cost` reports when it has ended."""
        self._paused += seconds

    def cost(self, kind: str, seconds: float) -> None:
        """A pause took so long, perhaps in several parts."""
        self._pauses[kind] = [*self._pauses[kind][1 - WINDOW :], seconds]

    def after(self, step: int) -> float | None:
        """Seconds until the run ends, asked at the end of each step; None at the first one of a start and at the last.

        A kind of pause of which there was none yet counts as nothing.
        """
        now = self._clock()
        if self._last is not None:
            self._steps.append(now - self._last - self._paused)
        self._last, self._paused = now, 0.0
        if not self._steps or step >= self._total:
            return None
        left = (self._total - step) * fmean(self._steps)
        for kind, seconds in self._pauses.items():
            every = self._every[kind]
            if seconds and every:
                left += (self._total // every - step // every) * fmean(seconds)
        return left
