"""Loader processes that leave a cluster's signals to their rank, and that end when their rank ends.

SLURM signals every process of a job. A rank that is signalled still ends its step and writes a checkpoint, so its
workers must outlive the signal.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal for this process when its parent ends
_CLUSTER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def start_fork_server(preload: str) -> None:
    """Start the process that forks workers, with a cluster's signals blocked; workers and tracker inherit that.

    Args:
        preload: module that the server imports once, so that its workers need not.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _CLUSTER_SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()
        # The tracker's start unblocks SIGINT and SIGTERM in this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, _CLUSTER_SIGNALS)
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_up_worker(worker: int) -> None:
    """Ignore a cluster's signals in this worker, and end it when its rank ends. `worker` is its number."""
    for number in _CLUSTER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    # A killed rank cannot end its workers, and DataLoader looks for the loss of its process only between two items.
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)


def end_with_parent() -> None:
    """Have this process killed when its parent ends, at any point of its work; what it writes must bear that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
