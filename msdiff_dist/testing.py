"""For tests with several processes: run a function on several ranks of this machine, joined by gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.distributed.spawn import run_ranks


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` fresh processes joined by gloo and return their results in rank order.

    The default process group exists inside `fn`, and each rank computes with one thread. Errors are those of
    `run_ranks`.

    Args:
        timeout: seconds, for all of it and for every collective.
    """
    env = {"OMP_NUM_THREADS": "1"}
    return run_ranks(_with_group, world_size, fn, args, timeout, preload=PRELOAD, env=env, timeout=timeout)


def _with_group(rank: int, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> Any:
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    world_size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    result = fn(rank, *args)
    dist.destroy_process_group()
    return result
