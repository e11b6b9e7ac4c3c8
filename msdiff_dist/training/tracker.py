"""Metrics for an experiment tracker: sent by a thread, so that no server makes training wait or fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.metrics import StepMetrics

FINISH_S = 20
"""Seconds in which a tracker may finish its work at the end of a start; the job may be about to be ended."""

Scalars = Mapping[str, float]


class Connection(Protocol):
    """A run in a tracker, opened. All methods may raise anything, and may wait for a network.

    Attributes:
        place: where the user finds the run.
    """

    place: str

    def log(self, steps: Sequence[Scalars]) -> None:
        """Record the numbers of some steps, in order; each has its `step`."""

    def grid(self, step: int, path: Path) -> None:
        """Record a grid of images."""

    def finish(self) -> None:
        """Send what is buffered; the run may go on later."""


class Tracker:
    """A sink that hands metrics and previews to a tracker.

    A thread opens the connection and sends what has gathered. Where that fails, the user is told once, and this start
    of the run sends no more.

    Args:
        name: of the tracker, for messages.
        connect: opens the connection; called in the thread.
    """

    def __init__(self, name: str, connect: Callable[[], Connection], context: SinkContext) -> None:
        self._name, self._connect, self._say = name, connect, context.say
        self._queue: SimpleQueue[Scalars | tuple[int, Path] | None] = SimpleQueue()  # None: the end
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, metrics: StepMetrics) -> None:
        """Queue every number of a step."""
        if not self._failed:
            self._queue.put(metrics.scalars())

    def grid(self, step: int, path: Path) -> None:
        """Queue a grid of images."""
        if not self._failed:
            self._queue.put((step, path))

    def evaluation(self, step: int, scores: Scalars) -> None:
        """Queue the scores of an evaluation."""
        if not self._failed:
            self._queue.put({"step": step, **scores})

    def say(self, text: str) -> None:
        """Ignore it: a tracker shows numbers."""

    def close(self) -> None:
        """Wait until all is sent, for `FINISH_S` seconds and a few more at most."""
        self._queue.put(None)
        self._thread.join(FINISH_S + 10)
        if self._thread.is_alive():
            self._say(f"warning: {self._name} did not take the last metrics in time; metrics.jsonl has them all")

    def _run(self) -> None:
        try:
            connection = self._connect()
            self._say(f"{self._name}: {connection.place}")
            while self._send(connection):
                pass
            connection.finish()
        # Whatever a tracker raises, training is worth more than a second copy of its metrics.
        except Exception as e:
            self._failed = True
            reason = next(iter(str(e).strip().splitlines()), "")
            self._say(
                f"warning: {self._name} gets no more metrics from this start ({type(e).__name__}: {reason}); "
                "training goes on, and metrics.jsonl has them all"
            )

    def _send(self, connection: Connection) -> bool:
        """Wait for something to send, and send all that is there; False at the end."""
        steps: list[Scalars] = []
        item = self._queue.get()
        try:
            while isinstance(item, Mapping):
                steps.append(item)
                item = self._queue.get_nowait()
        except Empty:
            connection.log(steps)
            return True
        if steps:
            connection.log(steps)
        if item is None:
            return False
        connection.grid(*item)
        return True


def known_run(context: SinkContext, name: str) -> dict[str, Any]:
    """What `remember_run` wrote for the tracker `name` in an earlier start of the run; empty if nothing.

    Raises:
        ValueError: the file holds something else.
    """
    path = context.folder.tracker_file(name)
    return parse_mapping(path.read_bytes()) if path.exists() else {}


def remember_run(context: SinkContext, name: str, run: Mapping[str, Any]) -> None:
    """Keep in the run folder which run of the tracker `name` is this one."""
    atomic_write(context.folder.tracker_file(name), json.dumps(dict(run), indent=1) + "\n")
