"""What `run_distributed` makes of ranks that return, fail, die or hang, and of a fork server that is killed."""

from __future__ import annotations

import os
import signal
import time
import traceback

import pytest
import torch
import torch.distributed as dist

from msdiff_dist.distributed.spawn import RankDiedError
from msdiff_dist.errors import PlacementError
from msdiff_dist.testing import run_distributed

pytestmark = pytest.mark.distributed


def sums_ranks(rank: int, factor: int) -> tuple[int, torch.Tensor, int]:
    total = torch.tensor([rank * factor])
    dist.all_reduce(total)
    return int(os.environ["RANK"]), total, torch.get_num_threads()


def fails_on_one(rank: int) -> None:
    if rank == 1:
        raise PlacementError("parallel.placement", [[0]], "is wrong", "Mend it.")
    dist.barrier()


def unpicklable(rank: int) -> None:
    class LocalError(Exception):
        pass

    raise LocalError("strange")


def dies(rank: int) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(60)


def hangs_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def outlives_the_fork_server(rank: int) -> tuple[int, torch.Tensor]:
    server = os.getppid()
    dist.barrier()
    if rank == 0:
        os.kill(server, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while os.getppid() == server:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    total = torch.tensor([rank])
    dist.all_reduce(total)
    return rank, total


def fails_without_the_fork_server(rank: int) -> None:
    outlives_the_fork_server(rank)
    if rank == 1:
        raise PlacementError("parallel.placement", [[0]], "is wrong", "Mend it.")
    time.sleep(60)


def returns_much(rank: int) -> torch.Tensor:
    return torch.full((1 << 20,), rank)


def test_results_come_in_rank_order() -> None:
    results = run_distributed(sums_ranks, 3, 10)
    assert [(rank, int(total), threads) for rank, total, threads in results] == [(0, 30, 1), (1, 30, 1), (2, 30, 1)]


def test_exception_keeps_its_type_and_names_the_rank() -> None:
    with pytest.raises(PlacementError) as caught:
        run_distributed(fails_on_one, 2)
    assert caught.value.field == "parallel.placement"
    text = "".join(traceback.format_exception(caught.value))
    assert "on rank 1" in text
    assert "in fails_on_one" in text


def test_exceptions_that_do_not_pickle_are_quoted() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)on rank 0.*LocalError: strange"):
        run_distributed(unpicklable, 1)


def test_results_larger_than_a_pipe_holds() -> None:
    assert [int(result.sum()) >> 20 for result in run_distributed(returns_much, 2)] == [0, 1]


def test_ranks_end_as_they_report_when_their_fork_server_is_gone() -> None:
    assert run_distributed(outlives_the_fork_server, 2) == [(0, torch.tensor([1])), (1, torch.tensor([1]))]
    with pytest.raises(PlacementError, match="is wrong"):
        run_distributed(fails_without_the_fork_server, 2)


def test_death_and_hang_name_the_rank() -> None:
    with pytest.raises(RankDiedError, match="rank 0 ended with status 7"):
        run_distributed(dies, 2)
    with pytest.raises(TimeoutError, match=r"ranks .*1\]"):
        run_distributed(hangs_on_one, 2, timeout=6)
