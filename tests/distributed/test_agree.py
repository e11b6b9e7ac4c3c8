"""What ranks agree on, on three of them and on one without a process group."""

from __future__ import annotations

import hashlib
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from msdiff_dist.distributed.agree import (
    Agreement,
    combined,
    from_rank_0,
    joined,
    maximum,
    on_every_rank,
    on_rank_0,
    summed,
)
from msdiff_dist.distributed.object_exchange import own_exchange
from msdiff_dist.errors import ConfigError
from msdiff_dist.testing import run_distributed

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")


def refused(who: str) -> str:
    raise ConfigError("field", who, "is refused", "Change it.")


def error_of(rank: int, refusing: set[int]) -> str:
    with pytest.raises(ConfigError) as caught:
        on_every_rank(lambda: refused(f"by {rank}") if rank in refusing else "taken")
    return str(caught.value.value)


def agreements(rank: int) -> list[object]:
    reductions = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **options: (reductions.append(1), all_reduce(*args, **options))[1]
    agreement = Agreement(CPU)
    agreement.add("loss", torch.tensor([1.0, rank]))
    agreement.add("stop", float(rank == 1))
    agreement.add_own("busy", 10.0 + rank, rank, 3)
    sums = {name: values.tolist() for name, values in agreement.reduce().items()}
    dist.all_reduce = all_reduce
    found: list[object] = [sums, len(reductions), joined([rank, rank * 2]), from_rank_0(f"rank {rank}")]
    found += [combined(rank, lambda every: [rank, every])]
    found += [summed(torch.tensor([rank + 1])).item(), maximum(torch.tensor([rank])).item()]
    found += [on_rank_0(lambda: "read"), on_every_rank(lambda: rank), error_of(rank, {1, 2}), error_of(rank, {0})]
    with pytest.raises(ConfigError, match="by rank 0"):
        on_rank_0(lambda: refused("by rank 0"))
    return found


def test_ranks_agree() -> None:
    for rank, (sums, reductions, *rest) in enumerate(run_distributed(agreements, 3)):
        assert sums == {"loss": [3.0, 3.0], "stop": [1.0], "busy": [10.0, 11.0, 12.0]}
        assert reductions == 1, "one collective carries everything"
        assert rest == [[0, 0, 1, 2, 2, 4], "rank 0", [0, [0, 1, 2]], 6, 2, "read", rank, "by 1", "by 0"]


def exchanges_of_two_threads(rank: int) -> tuple[object, bool, int]:
    """Values past the store's limit of 8 MiB, and an exchange of a thread while the main thread waits in another."""
    values = np.random.default_rng(rank).bytes(20 << 20)  # random bytes do not get smaller when they are compressed
    saves, found = own_exchange("saves"), list[object]()
    before = combined(None, lambda _: number_of_keys())

    def beside() -> None:
        if rank == 1:
            time.sleep(0.5)  # until the main thread waits for that of rank 0, which waits for this exchange
        found.append(saves.combined(values, lambda every: [hashlib.sha256(one).hexdigest() for one in every]))

    thread = threading.Thread(target=beside)
    thread.start()
    if rank == 0:
        thread.join()
    same = from_rank_0(values) == np.random.default_rng(0).bytes(20 << 20)
    thread.join()
    return found[0], same, combined(None, lambda _: number_of_keys()) - before


def number_of_keys() -> int:
    return dist.distributed_c10d._get_default_store().num_keys()


def test_objects_of_any_size_and_of_two_threads() -> None:
    digests = [hashlib.sha256(np.random.default_rng(rank).bytes(20 << 20)).hexdigest() for rank in range(2)]
    for digests_found, same, more_keys in run_distributed(exchanges_of_two_threads, 2):
        assert digests_found == digests
        assert same
        assert more_keys == 0, "the store keeps nothing"


def test_without_a_process_group_there_is_one_rank() -> None:
    assert (joined([5]), from_rank_0(5), on_rank_0(lambda: 5), on_every_rank(lambda: 5)) == ([5], 5, 5, 5)
    assert combined(5, sum) == 5
    assert summed(torch.tensor([2.0])).item() == maximum(torch.tensor([2.0])).item() == 2
    agreement = Agreement(CPU)
    agreement.add("a", 1.5)
    assert agreement.reduce()["a"].tolist() == [1.5]
    with pytest.raises(AssertionError, match="already"):
        agreement.add("a", 1.0)
