"""An iterator that runs in a thread of its own, ahead of the loop that takes its items."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_LONGEST_WAIT = 10.0  # seconds for which `close` waits for an item that is being made


class Ahead(Generic[T]):
    """Makes the items of an endless `source` in a thread, up to `depth` of them before they are asked for.

    `next` waits if none is ready. What `source` raises is raised there, after the items before it. The thread starts
    with the first `next`.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._source = source
        self._room = threading.Semaphore(depth)  # items that may still be begun
        self._ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        assert not self._is_closed
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
            self._thread.start()
        item, error = self._ready.get()
        if error:
            self._is_closed = True
            raise error
        self._room.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread after the item that it is making, and drop what it has made. Idempotent.

        A thread that waits for data that do not come is left behind: it ends with the process.
        """
        self._is_closed = True
        self._room.release()
        if self._thread:
            self._thread.join(_LONGEST_WAIT)

    def _run(self) -> None:
        try:
            while self._room.acquire() and not self._is_closed:
                self._ready.put((next(self._source), None))
        except BaseException as error:  # all of it is the taker's
            self._ready.put((None, error))
