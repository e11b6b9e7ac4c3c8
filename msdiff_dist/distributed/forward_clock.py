"""How long this rank computes, without its waits for other ranks: the time of its forward passes."""

from __future__ import annotations

import time

import torch


class ForwardClock:
    """Sums the time inside `with clock:` blocks: this thread's CPU time on CPUs, the stream's time on GPUs.

    Forward passes contain no collective (under ZeRO 1 and 2), so waiting for other ranks does not count.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._seconds = 0.0
        self._start = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(pair)
            pair[0].record()
        else:
            self._start = time.thread_time()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.thread_time() - self._start

    def take(self) -> float:
        """Seconds in the clock's blocks since the last call. On GPUs synchronise before the call."""
        seconds: float = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return seconds
