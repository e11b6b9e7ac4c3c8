"""Naming the ranks that hang or died, when a collective fails on those that did not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from msdiff_dist.distributed.environment import Environment
from msdiff_dist.errors import TrainingError

ROLL_CALL_S = 5.0  # how much later than here a collective may fail on other ranks


@contextmanager
def naming_lost_ranks(env: Environment) -> Iterator[None]:
    """Turn the failure of a collective inside into an error that names the ranks which do not answer any more.

    Raises:
        TrainingError: on every rank that still runs.
    """
    try:
        yield
    except RuntimeError as e:
        if not _is_of_collective(e):
            raise
        reason = str(e).splitlines()[0]
        silent = _silent_ranks(env)
        who = f"no word from rank {', '.join(map(str, silent))}: hung or dead" if silent else "every rank still answers"
        raise TrainingError(f"rank {env.rank} waited in vain for other ranks; {who} ({reason})") from e


def _is_of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _silent_ranks(env: Environment) -> list[int]:
    """Ranks that do not come here as well within `ROLL_CALL_S`."""
    store = dist.distributed_c10d._get_default_store()
    missing = [r for r in range(env.world_size) if r != env.rank]
    deadline = time.monotonic() + ROLL_CALL_S
    try:
        store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        store.set(f"here/{env.rank}", "")
        while missing and time.monotonic() < deadline:
            missing = [r for r in missing if not store.check([f"here/{r}"])]
            time.sleep(0.1)
    except RuntimeError:  # the process that keeps the store is itself gone: missing are those not heard of until then
        pass
    return missing
