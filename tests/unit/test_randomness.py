from __future__ import annotations

import itertools

import numpy as np

from msdiff_dist.randomness import generator


def test_same_arguments_give_the_same_stream() -> None:
    a = generator(7, "noise", 3, 5).standard_normal(100)
    generator(8, "noise", 3, 5).standard_normal(17)
    assert np.array_equal(a, generator(7, "noise", 3, 5).standard_normal(100))


def test_seed_purpose_and_every_counter_separate_the_streams() -> None:
    keys = [(s, p, *c) for s in (0, 1) for p in ("a", "b") for c in itertools.product((0, 1), repeat=3)]
    streams = np.stack([generator(*key).random(64) for key in keys])
    assert len(np.unique(streams)) == streams.size


def test_a_longer_draw_starts_with_the_shorter_one() -> None:
    assert np.array_equal(generator(1, "t", 9).random(1000)[:10], generator(1, "t", 9).random(10))


def test_the_stream_is_pinned() -> None:
    """Resuming a run needs the same numbers from every version of this package."""
    assert generator(0, "pin", 1, 2, 3).integers(0, 2**32, 3).tolist() == [3864078223, 2160554132, 4011180780]


def test_negative_and_huge_seeds_are_accepted() -> None:
    assert generator(-1, "x").random() == generator(2**64 - 1, "x").random()
