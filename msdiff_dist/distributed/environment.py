"""This process among its peers: rank, device and process groups."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from msdiff_dist.distributed.descriptors import raise_descriptor_limit
from msdiff_dist.distributed.facts import AskedGpus, facts_of_this_rank
from msdiff_dist.distributed.flight_recorder import write_record
from msdiff_dist.distributed.heartbeat import PERIOD_S, Heartbeat, WaitLimits
from msdiff_dist.distributed.meeting import connect, launcher_keeps_store, meet, store_keeper
from msdiff_dist.distributed.progress import Progress
from msdiff_dist.errors import MsdiffError, TrainingError


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Who this process is.

    Attributes:
        rank: number of this process in the whole job.
        local_rank: its number on this node; on GPUs also the device's index.
        world_size: ranks of the whole job.
        device: what this rank computes on.
        progress: what this rank is doing, for its heartbeat.
        warnings: differences between the ranks that the user should see; the same on every rank.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    warnings: tuple[str, ...] = ()


def this_device() -> torch.device:
    """The device of a command that runs in one process: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_rank_process() -> bool:
    """Whether a launcher (torchrun, srun, `msdiff train --nproc`) started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def print_error(error: TrainingError) -> None:
    """Write an error to standard error, past the locks of `sys.stderr`, which the stuck main thread may hold."""
    os.write(2, f"error {error}\n".encode())


@contextmanager
def process_group(
    limits: WaitLimits, *, asked: AskedGpus | None = None, lost: Callable[[TrainingError], None] = print_error
) -> Iterator[Environment]:
    """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: NCCL on GPUs, gloo on CPUs.

    Collectives may take `limits.start_s`, until `limit_waits` sets another limit.

    Args:
        asked: GPUs that the job asked for on each node; None: as many as there are, or none.
        lost: called, from a thread, when a rank is lost or hangs, before this process ends with status 1.

    Raises:
        UserError: on every rank: fewer GPUs than asked for or than ranks, ranks that cannot train together, or a store
            that cannot be reached; on one rank: too low a limit on open files.
        TrainingError: on every rank, if some have not come in time.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ.setdefault("LOCAL_RANK", str(local))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500" if world > 1 else "0")
    on_gpu = torch.cuda.is_available()
    facts = facts_of_this_rank(rank, local, asked)
    keeps = rank == 0 and not launcher_keeps_store()
    raise_descriptor_limit(world, on_gpus=on_gpu, keeps_store=keeps)
    # One rank needs no port, which another program might have taken.
    store = connect(limits.start_s, keep=keeps) if world > 1 else dist.HashStore()
    warnings = meet(store, facts, world, limits.start_s)
    if on_gpu:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    env = Environment(rank=rank, local_rank=local, world_size=world, device=device, warnings=tuple(warnings))
    heart = _heartbeat(env, limits, keeps, lost) if world > 1 else None
    if heart:
        heart.start()
    timeout = datetime.timedelta(seconds=limits.start_s)
    # The argument of `init_process_group` holds for the default group alone. These defaults hold for groups that are
    # made later without a timeout, DeepSpeed's among them.
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, default, timeout)
    try:
        dist.init_process_group(
            # One backend, which every group inherits: with gloo beside NCCL each would connect all of its ranks.
            "nccl" if on_gpu else "gloo",
            rank=rank,
            world_size=world,
            store=store,
            timeout=timeout,
        )
        yield env
    except BaseException as e:
        # NCCL's teardown waits for the other ranks, and these wait for this one in a reduction: nothing would be said
        # of the failure until the watchdog ends them all. So the error passes on to be reported, and the process then
        # leaves without a teardown.
        if heart:
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            # Every rank raises this package's errors together, and then each reports its own.
            heart.stop(failed=reason, alone=not isinstance(e, (MsdiffError, SystemExit)))
            atexit.register(leave, 1)
        elif dist.is_initialized():
            dist.destroy_process_group()
        raise
    if heart:
        heart.stop()
    dist.destroy_process_group()


def _heartbeat(env: Environment, limits: WaitLimits, keeps: bool, lost: Callable[[TrainingError], None]) -> Heartbeat:
    def end(reason: str) -> None:
        lost(TrainingError(reason))
        if env.device.type == "cuda":
            write_record(env.rank)
        if keeps:
            time.sleep(2 * PERIOD_S)  # the others read the verdict from the store, which ends with this process
        leave(1)

    return Heartbeat(
        lambda: connect(limits.start_s), env.rank, env.world_size, env.progress, limits,
        keeper=None if keeps else store_keeper(), lost=end,
    )  # fmt: skip


def limit_waits(seconds: float) -> None:
    """Set the time that collectives which begin from now on may take, in every process group of this rank.

    Under NCCL they may take a minute longer. Its watchdog aborts the process without naming a rank, so the heartbeat,
    which has the same limit, has to be first.
    """
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # the name before 2.13
    for group, (backends, _) in list(dist.distributed_c10d._world.pg_map.items()):
        extra = 60.0 if "nccl" in backends else 0.0
        set_timeout(datetime.timedelta(seconds=seconds + extra), group)


def leave(status: int) -> None:
    """End this process at once, with what it has printed and without any teardown of process groups."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    # In a thread, because a main thread that is stuck in a write would keep the lock for ever.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(status)
