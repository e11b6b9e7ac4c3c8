"""How the ranks of a job meet: at a key-value store, where they compare what they run on before they join.

Each rank writes one key, rank 0 reads them all and writes one verdict: linear in the number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from msdiff_dist.distributed.facts import Facts, compare, ranks_text
from msdiff_dist.errors import TrainingError, UserError

_FACTS, _VERDICT, _READ = "facts/{}", "verdict", "read/{}"
_READING_S = 10.0  # seconds in which the other ranks may read a bad verdict before the store ends with rank 0


def launcher_keeps_store() -> bool:
    """Whether the launcher (torchrun, `msdiff train --nproc`) keeps the job's store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_keeper() -> str:
    """Who keeps the job's store, for errors that it does not answer."""
    return f"{'the launcher' if launcher_keeps_store() else 'rank 0'}, which keeps the job's store,"


def connect(timeout_s: float, keep: bool = False) -> Store:
    """A connection of its own to the job's store at MASTER_ADDR and MASTER_PORT.

    Args:
        timeout_s: seconds that the connection, and a read of a missing key, may take.
        keep: open the store in this process, for the others to connect to.

    Raises:
        UserError: it cannot be reached, or its port is in use.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=keep, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except DistError as e:
        reason = str(e).splitlines()[0]
        if keep:
            problem, remedy = f"rank 0 cannot listen there ({reason})", "Choose a free port of rank 0's host."
        else:
            problem = f"host {socket.gethostname()} did not reach rank 0 there in {timeout_s:g} s ({reason})"
            remedy = "See whether rank 0 started, and the route and firewall between the two (`interface`)."
        raise UserError("MASTER_ADDR:MASTER_PORT", f"{address}:{port}", problem, remedy) from None
    # torchrun starts a failed job again with the same store, whose keys are still there.
    return PrefixStore(f"msdiff/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def meet(store: Store, facts: Facts, world_size: int, timeout_s: float) -> list[str]:
    """Compare what all ranks run on. Collective; returns warnings, the same on every rank.

    Raises:
        UserError: on every rank, if the ranks cannot train together.
        TrainingError: on every rank, if some have not come in time.
    """
    store.set(_FACTS.format(facts.rank), json.dumps(dataclasses.asdict(facts)))
    if facts.rank == 0:
        store.set(_VERDICT, json.dumps(_judge(store, world_size, timeout_s)))
    try:
        # Rank 0 may have begun to wait later than this rank.
        store.wait([_VERDICT], timedelta(seconds=2 * timeout_s))
        verdict = json.loads(store.get(_VERDICT))
    except DistError as e:
        raise TrainingError(
            f"rank {facts.rank}: rank 0 does not answer since the job started ({str(e).splitlines()[0]})"
        ) from None
    store.set(_READ.format(facts.rank), "")
    if facts.rank == 0 and (verdict["lost"] or verdict["refusal"]):
        _let_the_others_read(store, world_size)
    if verdict["lost"]:
        raise TrainingError(verdict["lost"])
    if verdict["refusal"]:
        raise UserError(*verdict["refusal"])
    return list(verdict["warnings"])


def _judge(store: Store, world_size: int, timeout_s: float) -> dict[str, object]:
    """Rank 0: read every rank's facts and compare them; the verdict as JSON values."""
    keys = [_FACTS.format(rank) for rank in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except DistError:
        missing = ranks_text([rank for rank, key in enumerate(keys) if not store.check([key])])
        lost = f"{missing}: no sign of life {timeout_s:g} s after rank 0 started (train.start_timeout_s)"
        return {"lost": lost, "refusal": None, "warnings": []}
    refusal, warnings = compare([Facts.load(json.loads(text)) for text in store.multi_get(keys)])
    fields = None if refusal is None else [refusal.field, refusal.value, refusal.problem, refusal.remedy]
    return {"lost": None, "refusal": fields, "warnings": warnings}


def _let_the_others_read(store: Store, world_size: int) -> None:
    try:
        store.wait([_READ.format(rank) for rank in range(world_size)], timedelta(seconds=_READING_S))
    except DistError:  # some rank is not there to read it
        return
