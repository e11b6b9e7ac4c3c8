"""The one helper of all multi-process tests: run a function on several gloo ranks of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from msdiff_dist.apps.train.local import preload


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` fresh processes joined by gloo and return their results in rank order.

    The default process group exists inside `fn`, and the variables torchrun would set are set. `fn`, `args` and the
    results must be picklable; `fn` must be a module's function. Each rank computes with one thread.

    Raises:
        the exception of the first rank that failed, with the rank and its traceback as a note; the others are killed.
        TimeoutError: naming the ranks that still run after `timeout` seconds.
        RuntimeError: a rank died without an exception, or with one that cannot be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    preload(context)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        processes = [
            context.Process(target=_rank_main, args=(fn, rank, world_size, args, store.port, timeout, folder))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _join(processes, Path(folder), timeout)
            return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _join(processes: list[Any], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            raise TimeoutError(f"ranks {sorted(running.values())} still run after {timeout} s")
        failed = [rank for rank in map(running.pop, ended) if not (folder / f"{rank}.result").exists()]
        if failed:
            wait(list(running), timeout=0.5)  # a rank that died in silence may be noticed after its peers' errors
            raise _first_failure(processes, folder)


def _first_failure(processes: list[Any], folder: Path) -> BaseException:
    for rank, process in enumerate(processes):
        told = any((folder / f"{rank}.{kind}").exists() for kind in ("result", "error"))
        if process.exitcode is not None and not told:
            return RuntimeError(f"rank {rank} died with exit status {process.exitcode}")
    failures = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    return pickle.loads(failures[0].read_bytes())  # the peers of a failed rank fail after it


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], port: int, timeout: float, folder: str
) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(address | {name: str(value) for name, value in ranks.items()})
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        outcome, name = pickle.dumps(fn(rank, *args)), f"{rank}.result"
        dist.destroy_process_group()
    except BaseException as error:
        outcome, name = _pickled(error, rank), f"{rank}.error"
    partial = Path(folder) / f"{rank}.partial"
    partial.write_bytes(outcome)
    partial.rename(Path(folder) / name)
    if name.endswith(".error"):
        os._exit(1)  # tearing down a broken group could hang


def _pickled(error: BaseException, rank: int) -> bytes:
    """The exception with its rank and traceback as a note, or a RuntimeError quoting one that does not pickle."""
    note = f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        error.add_note(note)
        pickle.loads(data := pickle.dumps(error))
        return data
    except Exception:
        return pickle.dumps(RuntimeError(note))
