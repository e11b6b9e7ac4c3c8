"""How long parts of a step take on this rank's device, measured without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch


class DeviceClock:
    """Sums the time inside `with clock:` blocks: the stream's on a GPU, else that of the host.

    A GPU runs behind the host, and to ask it for the time of a block that has just been started would stop the host
    until the block has run. So on a GPU `take` gives the newest sum that the device has finished, which is usually that
    of the step before; only the first call waits.

    Args:
        host_clock: what measures time on a device that is no GPU.
    """

    def __init__(self, device: torch.device, host_clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu, self._host_clock = device.type == "cuda", host_clock
        self._seconds = self._start = 0.0
        self._is_first = True
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of blocks since the last `take`
        self._running: deque[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = deque()  # of earlier ones

    def __enter__(self) -> None:
        if self._on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(pair)
            pair[0].record()
        else:
            self._start = self._host_clock()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += self._host_clock() - self._start

    def take(self) -> float:
        """Seconds in the blocks since the last call; on a GPU those of an earlier call, if they have not all run."""
        if not self._on_gpu:
            seconds, self._seconds = self._seconds, 0.0
            return seconds
        if self._events:
            self._running.append(self._events)
            self._events = []
        if self._is_first and self._running:
            self._running[0][-1][1].synchronize()
            self._is_first = False
        while self._running and self._running[0][-1][1].query():
            self._seconds = sum(start.elapsed_time(end) for start, end in self._running.popleft()) / 1e3
        return self._seconds
