"""Work in slices: it runs only while its caller waits, and stops where it allows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class _ClosedError(BaseException):
    """Ends work that is not wanted any more."""


class SlicedWork:
    """Work that is done in a thread of its own, but never while its caller does anything else.

    So it needs no locks against the caller, and may keep its place in the midst of any call, a solver's say.

    Args:
        work: called with a function that it calls wherever it may be stopped until the next slice.
    """

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._work = work
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._end, self._last, self._longest = 0.0, 0.0, 0.0
        self._error: BaseException | None = None
        self._closed = self.done = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def run(self, seconds: float) -> bool:
        """Work on for at most so many seconds, but at least to the next place where it may be stopped.

        Returns whether all is done. Raises what the work raises.
        """
        if not self.done:
            self._last = time.perf_counter()
            self._end = self._last + seconds
            self._go.release()
            self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self.done

    def close(self) -> None:
        """End the work where it stands."""
        if not self.done:
            self._closed = True
            self._go.release()
            self._thread.join()

    def _may_stop(self) -> None:
        now = time.perf_counter()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        # What comes next may take as long as the longest so far.
        if now + self._longest > self._end:
            self._stopped.release()
            self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._closed:
            raise _ClosedError

    def _run(self) -> None:
        try:
            self._wait()
            self._work(self._may_stop)
        except _ClosedError:
            pass
        except BaseException as e:
            self._error = e
        self.done = True
        self._stopped.release()
