"""The same function of many items, in several processes."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from msdiff_dist.data.worker_processes import set_up_worker, start_fork_server
from msdiff_dist.errors import DataError

T = TypeVar("T")
U = TypeVar("U")

_AT_ONCE = 64  # items that a process takes
_AHEAD = 4  # times the number of processes: so many takes are under way or wait to be asked for


def in_processes(work: Callable[[T], U], items: Iterable[T], nproc: int, preload: str) -> Iterator[U]:
    """`work` of every item, in their order, whatever `nproc` is.

    Args:
        nproc: processes; 1 works in this one.
        preload: module of `work`, imported once for all processes.

    Raises:
        DataError: a process was killed.
    """
    if nproc == 1:
        yield from map(work, items)
        return
    start_fork_server(preload)
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(nproc, mp_context=context, initializer=set_up_worker, initargs=(0,)) as pool:
        rest, waiting = iter(items), deque[Future[list[U]]]()
        try:
            while taken := list(itertools.islice(rest, _AT_ONCE)):
                waiting.append(pool.submit(_each, work, taken))
                if len(waiting) > _AHEAD * nproc:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as e:
            problem = "one of these processes was killed: it ran out of memory, or an item ends its process"
            raise DataError("--nproc", nproc, problem, "Take fewer processes; 1 shows an item that does it.") from e
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _each(work: Callable[[T], U], items: list[T]) -> list[U]:
    return [work(item) for item in items]
