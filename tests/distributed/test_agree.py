"""What ranks agree on, on three of them and on one without a process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from msdiff_dist.distributed.agree import Agreement, from_rank_0, gathered, maximum, on_every_rank, on_rank_0, summed
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
    found: list[object] = [sums, len(reductions), gathered(rank * 2), from_rank_0(f"rank {rank}")]
    found += [summed(torch.tensor([rank + 1])).item(), maximum(torch.tensor([rank])).item()]
    found += [on_rank_0(lambda: "read"), on_every_rank(lambda: rank), error_of(rank, {1, 2}), error_of(rank, {0})]
    with pytest.raises(ConfigError, match="by rank 0"):
        on_rank_0(lambda: refused("by rank 0"))
    return found


def test_ranks_agree() -> None:
    for rank, (sums, reductions, *rest) in enumerate(run_distributed(agreements, 3)):
        assert sums == {"loss": [3.0, 3.0], "stop": [1.0], "busy": [10.0, 11.0, 12.0]}
        assert reductions == 1, "one collective carries everything"
        assert rest == [[0, 2, 4], "rank 0", 6, 2, "read", rank, "by 1", "by 0"]


def test_without_a_process_group_there_is_one_rank() -> None:
    assert (gathered(5), from_rank_0(5), on_rank_0(lambda: 5), on_every_rank(lambda: 5)) == ([5], 5, 5, 5)
    assert summed(torch.tensor([2.0])).item() == maximum(torch.tensor([2.0])).item() == 2
    agreement = Agreement(CPU)
    agreement.add("a", 1.5)
    assert agreement.reduce()["a"].tolist() == [1.5]
    with pytest.raises(AssertionError, match="already"):
        agreement.add("a", 1.0)
