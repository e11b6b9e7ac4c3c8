from __future__ import annotations

import os
from pathlib import Path

import pytest

from msdiff_dist.distributed.cores import Cores, cores, threads_of, threads_per_rank


def on(node: str, *numbers: int, quota: float | None = None) -> Cores:
    return Cores(node, frozenset(numbers), quota)


@pytest.mark.parametrize(
    ("processes", "threads"),
    [
        ([on("a", *range(8))], [8]),
        ([on("a", *range(8))] * 4, [2] * 4),  # torchrun: all may use the whole node
        ([on("a", 0, 1), on("a", 2, 3), on("b", 0, 1), on("b", 2, 3)], [2] * 4),  # srun: each has cores of its own
        ([on("a", *range(3))] * 3, [1] * 3),
        ([on("a", *range(9))] * 3 + [on("b", *range(9))], [3, 3, 3, 9]),
        ([on("a", 0, 1)] * 4, [1] * 4),  # more processes than cores
        ([on("a", 0, 1, 2, 3), on("a", 0, 1)], [3, 1]),
        ([on("a", *range(64), quota=4.0)], [4]),
        ([on("a", *range(64), quota=4.5)] * 2, [2, 2]),
        ([on("a", *range(64), quota=0.5)], [1]),
        ([on("a", 0, 1, quota=8.0)], [2]),
    ],
)
def test_a_process_has_its_share_of_the_cores_that_it_may_use(processes: list[Cores], threads: list[int]) -> None:
    assert [threads_of(own, processes) for own in processes] == threads


@pytest.mark.parametrize(
    ("siblings", "groups"), [("{even}-{odd}\n", 2), ("{even},{odd}\n", 2), ("{cpu}\n", 1), (None, 1)]
)
def test_hardware_threads_of_a_core_count_once(tmp_path: Path, siblings: str | None, groups: int) -> None:
    cpus = os.sched_getaffinity(0)
    for cpu in cpus if siblings else ():
        file = tmp_path / f"cpu{cpu}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        even = cpu - cpu % groups
        file.write_text(siblings.format(cpu=cpu, even=even, odd=even + 1))
    assert cores(tmp_path).numbers == {cpu - cpu % groups for cpu in cpus}


@pytest.mark.parametrize(("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), (None, None)])
def test_a_container_may_be_limited(tmp_path: Path, text: str | None, quota: float | None) -> None:
    file = tmp_path / "cpu.max"
    if text:
        file.write_text(text)
    assert cores(quota=file).quota == quota


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("5,2", 5), ("", None), ("0", None), ("many", None)])
def test_omp_num_threads_comes_first(monkeypatch: pytest.MonkeyPatch, value: str, threads: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    own = cores()
    assert threads_per_rank() == (threads or threads_of(own, [own]))
