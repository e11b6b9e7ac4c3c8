"""Rank processes of this machine: started together, watched until all have ended or one has failed.

torchrun could run them too. This supervisor also brings back results and exceptions, names the rank that failed first,
passes signals on so that ranks can save before they end, and imports the heavy libraries once for all ranks.

Every rank has the sending end of a pipe, through which it reports its result or its exception. When the pipe closes,
the rank has ended. Exit statuses come through the fork server and are lost if it is killed, so they are only used for
ranks that end without a report.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import FrameType
from typing import Any

import torch

from msdiff_dist.distributed.store_process import HOST, StoreProcess
from msdiff_dist.errors import MsdiffError, UserError

_own_pipe: list[Connection] = []  # of this process, if it is a rank that has not reported yet
_reporting = threading.Lock()
_GRACE_S = 2.0  # seconds after a failure in which the other ranks may report their own errors


class RankDiedError(MsdiffError):
    """A rank ended without a report: killed, out of memory, a crash in native code.

    Args:
        exitcode: as multiprocessing gives it: negative for a signal; 255 also where it is not known.
    """

    def __init__(self, rank: int, exitcode: int) -> None:
        self.rank, self.exitcode = rank, exitcode
        how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
        super().__init__(f"rank {rank} {how}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.exitcode)


@dataclass(frozen=True)
class _Report:
    """What a rank reports at its end: its result, or its exception and the time at which it was raised."""

    result: Any = None
    error: BaseException | None = None
    at: float = 0.0


class _Rank:
    """One rank's process, seen from the supervisor.

    Attributes:
        report: None until the rank has reported.
        ended: whether the rank's pipe has closed.
    """

    def __init__(self, rank: int, process: ForkServerProcess, pipe: Connection) -> None:
        self.rank, self.process, self.pipe = rank, process, pipe
        self.report: _Report | None = None
        self.ended = False

    @property
    def failed(self) -> bool:
        """Whether it reported an exception or ended without a report."""
        return (self.ended and self.report is None) or (self.report is not None and self.report.error is not None)

    def receive(self) -> None:
        """Read its report, or notice its end, from its pipe, which must be ready."""
        try:
            self.report = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):  # closed before a report, or within one
            self.ended = True
            self.process.join()

    def send(self, signum: int) -> None:
        """Signal it, unless it has ended."""
        if not self.ended and self.process.pid is not None:
            try:
                os.kill(self.process.pid, signum)
            except ProcessLookupError:  # it has just ended
                return


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    preload: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    signals: Sequence[signal.Signals] = (),
    timeout: float | None = None,
) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` fresh processes and return their results in rank order.

    The ranks have the environment variables that torchrun would set; MASTER_ADDR and MASTER_PORT name a store in a
    process of its own. `fn`, `args` and the results must be picklable; `fn` must be a function of a module. If this
    process ends, its ranks are sent SIGTERM.

    Args:
        preload: modules that are imported once for all ranks, unless there is a GPU.
        env: more environment variables of the ranks.
        signals: signals to this process that are passed on to every rank instead of being handled here.
        timeout: seconds after which the ranks are killed; None: never.

    Raises:
        the exception of the rank that failed first, a UserError before others, with the rank and its traceback as a
            note. The other ranks are killed.
        RankDiedError: a rank ended without a report.
        TimeoutError: the timeout is over; the error names the ranks that still run.
    """
    context = multiprocessing.get_context("forkserver")
    if not torch.cuda.is_available():  # a process that may touch CUDA must not fork
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        context.set_forkserver_preload(list(preload))
    store = StoreProcess(context, world_size)
    job = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    job |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(store.port), **(env or {})}
    # Pickled here: multiprocessing's own pickler would pass tensors through shared memory.
    call = pickle.dumps((fn, args))
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            receiving, sending = context.Pipe(duplex=False)
            own = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank_main, args=(rank, own, call, sending, store.lifeline))
            process.start()
            sending.close()  # the rank now has the only sending end, so the pipe closes when the rank ends
            ranks.append(_Rank(rank, process, receiving))
        store.release()
        with _passing_on(signals, ranks):
            _watch(ranks, timeout)
        return [r.report.result for r in ranks if r.report]
    finally:
        for r in ranks:
            r.send(signal.SIGKILL)
        while running := _running(ranks):
            _receive(running, None)
        store.release()
        store.join()


def _watch(ranks: Sequence[_Rank], timeout: float | None) -> None:
    """Wait for all ranks. After the first failure give the others a moment to fail too, then raise the error that
    explains the failures."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while running := _running(ranks):
        if not _receive(running, deadline):
            raise TimeoutError(f"ranks {sorted(r.rank for r in running)} still run after {timeout} s")
        if any(r.failed for r in ranks):
            break
    else:
        return
    grace = time.monotonic() + _GRACE_S
    while (running := _running(ranks)) and not any(r.ended and r.report is None for r in ranks):
        if not _receive(running, grace):
            break
    raise _first_failure(ranks)


def _running(ranks: Sequence[_Rank]) -> list[_Rank]:
    return [r for r in ranks if not r.ended]


def _receive(running: Sequence[_Rank], deadline: float | None) -> bool:
    """Wait until one of the ranks reports or ends; False if none has by then."""
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    ready = wait([r.pipe for r in running], left)
    for r in running:
        if r.pipe in ready:
            r.receive()
    return bool(ready)


def _first_failure(ranks: Sequence[_Rank]) -> BaseException:
    """The error that explains the others: that of a rank that ended without a report, else the first UserError, else
    the first error."""
    for r in ranks:
        if r.ended and r.report is None:
            return RankDiedError(r.rank, r.process.exitcode or 0)
    reports = sorted((r.report for r in ranks if r.report and r.report.error), key=lambda report: report.at)
    errors = [report.error for report in reports if report.error]
    return next((e for e in errors if isinstance(e, UserError)), errors[0])


@contextmanager
def _passing_on(signals: Sequence[signal.Signals], ranks: Sequence[_Rank]) -> Iterator[None]:
    def pass_on(signum: int, frame: FrameType | None) -> None:
        for r in ranks:
            r.send(signum)

    previous = {s: signal.signal(s, pass_on) for s in signals}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def report_error(error: BaseException) -> None:
    """Report the error of this rank from any thread; nothing if it has reported, or is no rank of `run_ranks`."""
    _send(_pickled(error, int(os.environ.get("RANK", "0"))))


def _send(report: bytes) -> None:
    """Send this rank's only report. A thread may report a lost rank when the main thread does or has done so."""
    with _reporting:
        while _own_pipe:
            _own_pipe.pop().send_bytes(report)


def _rank_main(rank: int, env: Mapping[str, str], call: bytes, pipe: Connection, lifeline: Connection) -> None:
    """Body of one rank's process: call `fn` and report. `lifeline` stays open until the process ends."""
    _own_pipe.append(pipe)
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    os.environ.update(env)
    try:
        fn, args = pickle.loads(call)
        report, failed = pickle.dumps(_Report(fn(rank, *args))), False
    except BaseException as e:
        report, failed = _pickled(e, rank), True
    _send(report)
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # tearing down a broken process group could hang


def _pickled(error: BaseException, rank: int) -> bytes:
    """The exception with its rank and traceback as a note, or a RuntimeError quoting one that does not pickle."""
    note, at = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}", time.time()
    try:
        error.add_note(note)
        data = pickle.dumps(_Report(error=error, at=at))
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(_Report(error=RuntimeError(note), at=at))


def _end_with_supervisor() -> None:
    """Wait for the end of the process that started this rank, then send SIGTERM to this rank.

    Training answers SIGTERM by saving; before training has begun, SIGTERM ends the process.
    """
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None
    supervisor.join()
    os.kill(os.getpid(), signal.SIGTERM)
