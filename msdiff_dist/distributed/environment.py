"""This process among its peers: rank, device and process groups."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from msdiff_dist.distributed.descriptors import raise_descriptor_limit
from msdiff_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Who this process is.

    Attributes:
        rank: number of this process in the whole job.
        local_rank: its number on this node; on GPUs also the device's index.
        world_size: ranks of the whole job.
        device: what this rank computes on.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def this_device() -> torch.device:
    """The device of a command that runs in one process: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_rank_process() -> bool:
    """Whether a launcher (torchrun, srun, `msdiff train --nproc`) started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(timeout_s: float) -> Iterator[Environment]:
    """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: NCCL on GPUs, gloo on CPUs.

    Raises:
        UserError: fewer GPUs on this node than ranks, or too low a limit on open files.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ.setdefault("LOCAL_RANK", str(local))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500" if world > 1 else "0")
    on_gpu = torch.cuda.is_available()
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    raise_descriptor_limit(world, on_gpus=on_gpu, keeps_store=keeps_store)
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise UserError(
                "LOCAL_RANK", local, f"this node has {torch.cuda.device_count()} GPUs", "Start one rank per GPU."
            )
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    store = dist.HashStore() if world == 1 else None  # one rank needs no port, which another program might have taken
    timeout = datetime.timedelta(seconds=timeout_s)
    # The argument of `init_process_group` holds for the default group alone. These defaults hold for groups that are
    # made later without a timeout, DeepSpeed's among them.
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, default, timeout)
    dist.init_process_group(
        # One backend, which every group inherits: with gloo beside NCCL each would connect all of its ranks.
        "nccl" if on_gpu else "gloo",
        rank=rank,
        world_size=world,
        store=store,
        timeout=timeout,
    )
    try:
        yield Environment(rank=rank, local_rank=local, world_size=world, device=device)
    except BaseException:
        # NCCL's teardown waits for the other ranks, and these wait for this one in a reduction: nothing would be said
        # of the failure until the watchdog ends them all. So the error passes on to be reported, and the process then
        # leaves without a teardown.
        if world > 1:
            atexit.register(leave, 1)
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def leave(status: int) -> None:
    """End this process at once, with what it has printed and without any teardown of process groups."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
