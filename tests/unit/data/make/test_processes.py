"""The same function of many items in several processes."""

from __future__ import annotations

import itertools
import os

import pytest

from msdiff_dist.data.make.processes import in_processes
from msdiff_dist.errors import DataError


def halved(number: int) -> float:
    if number < 0:
        os._exit(3)
    return number / 2


@pytest.mark.parametrize("nproc", [1, 3])
def test_results_come_in_the_order_of_the_items(nproc: int) -> None:
    assert list(in_processes(halved, range(1500), nproc, __name__)) == [number / 2 for number in range(1500)]
    assert list(in_processes(halved, [], nproc, __name__)) == []


def test_errors_are_those_of_the_function() -> None:
    with pytest.raises(TypeError):
        list(in_processes(halved, ["x"], 2, __name__))  # type: ignore[list-item]


def test_a_killed_process_is_reported() -> None:
    with pytest.raises(DataError, match=r"--nproc = 2.*killed"):
        list(in_processes(halved, [1, -1, 2], 2, __name__))


def test_items_are_taken_as_results_are_asked_for() -> None:
    items = itertools.count()
    results = in_processes(halved, itertools.islice(items, 10**6), 2, __name__)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert next(items) < 10**4
