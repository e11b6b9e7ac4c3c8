"""Random numbers that depend on seed, purpose and counters alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from msdiff_dist.randomness import augmentations, dropped_conditions, generator, noise, posterior_noise


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


def test_noise_is_standard_normal_and_belongs_to_the_index() -> None:
    whole = noise(0, 3, np.arange(50), (3, 16, 16))
    assert whole.dtype == torch.float32
    part = noise(0, 3, np.array([41, 7]), (3, 16, 16))
    assert torch.equal(part, whole[[41, 7]])
    assert whole.mean().abs() < 0.02
    assert whole.var().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(whole, noise(0, 4, np.arange(50), (3, 16, 16)))
    assert noise(0, 3, np.array([], np.int64), (2,)).shape == (0, 2)


def test_a_stream_is_the_same_whichever_was_drawn_from_before() -> None:
    """Sizes are odd: a stream that was left in the middle of a word must not hand the rest of it to the next one."""
    index_n = np.array([9, 0, 2**40, 9])
    for row, index in zip(noise(5, 6, index_n, (3, 7)), index_n.tolist(), strict=True):
        alone = generator(5, "noise", 6, index).standard_normal((3, 7), dtype=np.float32)
        assert np.array_equal(row.numpy(), alone)
    for random, index in zip(augmentations(5, 6, index_n), index_n.tolist(), strict=True):
        assert random.integers(2**31, size=3, dtype=np.int32).tolist() == (
            generator(5, "augmentation", 6, index).integers(2**31, size=3, dtype=np.int32).tolist()
        )
    for row, g in zip(posterior_noise(5, index_n, (5,)), index_n.tolist(), strict=True):
        assert np.array_equal(row, generator(5, "posterior", g).standard_normal(5, dtype=np.float32))


def test_dropout_belongs_to_the_index_and_has_its_probability() -> None:
    whole = dropped_conditions(0, 3, np.arange(20000), 0.1)
    assert whole.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped_conditions(0, 3, np.array([19, 3]), 0.1), whole[[19, 3]])
    assert not dropped_conditions(0, 3, np.arange(100), 0.0).any()
    assert dropped_conditions(0, 3, np.arange(100), 1.0).all()
    assert dropped_conditions(0, 3, np.array([], np.int64), 0.5).shape == (0,)
