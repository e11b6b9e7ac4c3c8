"""Being asked to stop: a signal sets a flag, the ranks agree on it at a step boundary."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any


class StopRequest:
    """A flag raised by SIGTERM, SIGINT or SIGUSR2. `requested_at` is the time of the first signal, or None."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.requested_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested_at is None:
            self.requested_at = time.time()
