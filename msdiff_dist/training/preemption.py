"""Requests to stop: a signal sets a flag on one rank, and the ranks agree on it in the reduction of the next step.

An exception from the handler would come at different places on different ranks, and leave some waiting in a collective.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any


class StopRequest:
    """A flag that SIGTERM, SIGINT and SIGUSR2 set while its `with` block runs.

    Attributes:
        requested_at: time (`time.time`) of the first signal; None before one.
    """

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
