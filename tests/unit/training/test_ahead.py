"""Items come in order from another thread, a bounded number ahead, with the errors that their source raised."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from msdiff_dist.training.ahead import Ahead


def test_items_come_in_order_from_another_thread() -> None:
    def source() -> Iterator[tuple[int, int]]:
        for i in range(100):
            yield i, threading.get_ident()

    ahead = Ahead(source(), depth=3)
    items = [next(ahead) for _ in range(100)]
    ahead.close()
    assert [i for i, _ in items] == list(range(100))
    assert {thread for _, thread in items}.isdisjoint({threading.get_ident()})


def test_nothing_is_made_before_it_is_wanted_nor_too_far_ahead() -> None:
    made: list[int] = []
    at_third = threading.Event()

    def source() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if i == 2:
                at_third.set()
            yield i

    ahead = Ahead(source(), depth=2)
    assert made == []
    assert next(ahead) == 0
    assert at_third.wait(60), "the two after it are made without being asked for"
    ahead.close()
    assert made == [0, 1, 2]
    ahead.close()


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("torn")

    ahead = Ahead(source(), depth=5)
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(ValueError, match="torn"):
        next(ahead)
    ahead.close()
