"""Naming the ranks that hang or died, when a collective fails on those that did not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from msdiff_dist.distributed.environment import Environment
from msdiff_dist.errors import TrainingError

ROLL_CALL_S = 5.0
"""Seconds by which the same collective may fail later on other ranks than here."""


@contextmanager
def naming_lost_ranks(env: Environment) -> Iterator[None]:
    """Turn the failure of a collective inside the block into an error that names the ranks that no longer answer.

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
        numbers = ", ".join(map(str, silent))
        who = f"no answer from rank {numbers}: hung or dead" if silent else "every rank still answers"
        raise TrainingError(f"rank {env.rank} waited in vain for other ranks; {who} ({reason})") from e


def _is_of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _silent_ranks(env: Environment) -> list[int]:
    """Ranks that do not arrive at this call too within `ROLL_CALL_S`.

    A failed collective leaves its process group unusable. So the ranks sign in at the key-value store of the job.
    """
    store = dist.distributed_c10d._get_default_store()
    missing = [r for r in range(env.world_size) if r != env.rank]
    deadline = time.monotonic() + ROLL_CALL_S
    try:
        store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        store.set(f"here/{env.rank}", "")
        while missing and time.monotonic() < deadline:
            missing = [r for r in missing if not store.check([f"here/{r}"])]
            time.sleep(0.1)
    except RuntimeError:
        # The process that keeps the store is gone itself. Missing are the ranks that had not signed in by then.
        pass
    return missing
