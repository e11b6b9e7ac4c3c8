"""Naming the ranks that hang or died, when a collective fails on those that did not.

gloo raises when a peer has ended or a collective is over its time limit; then this is sooner than the heartbeat.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.heartbeat import GONE, Beat, beat_key
from msdiff_dist.distributed.meeting import connect, store_keeper
from msdiff_dist.errors import MsdiffError, TrainingError

ROLL_CALL_S = 5.0
"""Seconds by which the same collective may fail later on other ranks than here; longer than two beats."""


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
        reason = str(e).splitlines()[0].partition(". This is typically")[0]
        who = "; ".join(_silent_ranks(env)) or "every rank still answers"
        raise TrainingError(f"rank {env.rank} waited in vain for other ranks. {who} ({reason})") from e


def _is_of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _silent_ranks(env: Environment) -> list[str]:
    """What is known of each rank that does not arrive at this call too within `ROLL_CALL_S`.

    A failed collective leaves its process group unusable. So the ranks sign in at the key-value store of the job.
    """
    first: dict[int, Beat | None] = {}
    try:
        store = connect(ROLL_CALL_S)
        store.set(_sign(env.rank), "")
        deadline = time.monotonic() + ROLL_CALL_S
        while True:
            time.sleep(0.5)
            beats = {r: _beat(store, r) for r in _missing(store, range(env.world_size))}
            first = {r: first.get(r, beat) for r, beat in beats.items()}
            if all(beat and beat.failed for beat in beats.values()) or time.monotonic() > deadline:
                return [_state(r, first[r], beat) for r, beat in beats.items()]
    except (RuntimeError, MsdiffError):
        return [f"{store_keeper()} does not answer: {GONE}"]


def _sign(rank: int) -> str:
    return f"here/{rank}"


def _missing(store: dist.Store, ranks: Sequence[int]) -> list[int]:
    """Those of the ranks that have not signed in. One question to the store where few are missing, not one a rank."""
    if store.check([_sign(r) for r in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    half = len(ranks) // 2
    return _missing(store, ranks[:half]) + _missing(store, ranks[half:])


def _beat(store: dist.Store, rank: int) -> Beat | None:
    text = store.get(beat_key(rank)) if store.check([beat_key(rank)]) else b""
    values = json.loads(text) if text else None
    return None if values is None else Beat(**(values["beat"] if rank == 0 else values))


def _state(rank: int, before: Beat | None, now: Beat | None) -> str:
    if before is None or now is None:
        return f"rank {rank}: no sign of life since the job started"
    if now.failed:
        return f"rank {rank} failed: {now.failed}"
    if now.count == before.count:
        return f"rank {rank}: no sign of life for {ROLL_CALL_S:g} s, {now.standing}"
    return f"rank {rank}: alive, but does not answer for {ROLL_CALL_S:g} s, {now.standing}"
