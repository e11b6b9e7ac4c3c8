"""Long work shown to the user: a bar with rate and time left on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

T = TypeVar("T")

FIRST_LINE_S = 2.0
LINE_EVERY_S = 10.0


class Lines:
    """When the next line of a log file is due: after 2 s, then every 10 s, later every twentieth of the time so far.

    So an hour gives 80 lines and a week 180.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start = clock, clock()
        self._due = self._start + FIRST_LINE_S

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self._clock() - self._start

    def due(self) -> bool:
        """Whether a line is due now. If so, the next one is due later."""
        now = self._clock()
        if now < self._due:
            return False
        self.written()
        return True

    def written(self) -> None:
        """Count from now to the next line."""
        self._due = self._clock() + max(LINE_EVERY_S, self.elapsed / 20)


class LongWork:
    """Work whose progress is shown on standard error, as `what 120/500 unit  31 unit/s  ETA 0:00:12`.

    On a terminal a bar, which disappears at the end. Otherwise lines as `Lines` has them, and one at the end of work
    that had any; shorter work is not shown.

    Args:
        what: what is done, as a participle: "packing".
        total: how much there is to do, in `unit`; None: not known.
        unit: of what is counted, in the plural: "images". "MB" is given in bytes.
        done: how much of it an earlier command has done.
        file: where to show it; None: standard error.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str,
        *,
        done: float = 0,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit, self._before, self._done = what, total, unit, done, float(done)
        self._file = file or sys.stderr
        self._lines, self._shown = Lines(clock), False
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), _Column(self.text), transient=True,
            console=Console(file=self._file, soft_wrap=True), disable=not self._file.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total, completed=int(done))

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        self._done += amount
        self._bar.update(self._task, completed=self._done)
        if self._bar.disable and self._lines.due():
            self._print(f"{self._what} {self.text()}")
            self._shown = True

    def text(self) -> str:
        """How much is done of how much, the rate, and the time that the rest takes at this rate."""
        elapsed, scale = self._lines.elapsed, 1e6 if self._unit == "MB" else 1
        rate = (self._done - self._before) / elapsed if elapsed > 0 else 0.0
        of = "" if self._total is None else f"/{_number(self._total / scale)}"
        words = [f"{_number(self._done / scale)}{of} {self._unit}", f"{_number(rate / scale)} {self._unit}/s"]
        if self._total is not None and rate > 0:
            words.append(f"ETA {duration((self._total - self._done) / rate)}")
        return "  ".join(words)

    def __enter__(self) -> LongWork:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        if self._shown and kind is None:
            self._print(f"{self._what} {self.text().partition('  ETA')[0]}  in {duration(self._lines.elapsed)}")

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)


def track(items: Iterable[T], what: str, unit: str, total: float | None = None) -> Iterator[T]:
    """`items` one by one, each counted as done when the next is asked for.

    Args:
        total: their number; None: their `len`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with LongWork(what, total, unit) as work:
        for item in items:
            yield item
            work.advance()


def duration(seconds: float) -> str:
    """`0:01:05`, or with days `2-00:01:05`."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:{whole:02d}" if days else f"{hours}:{minutes:02d}:{whole:02d}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


class _Column(ProgressColumn):
    """What `LongWork.text` says, beside the bar."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text())
