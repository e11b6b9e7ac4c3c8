"""Sources mixed by weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiff_dist.data.mixture import Mixture
from msdiff_dist.errors import ConfigError

weights = st.lists(st.sampled_from([1.0, 2.0, 0.5, 0.3, 0.7, 10.0, 0.25]), min_size=1, max_size=5)


@given(weights, st.integers(0, 500), st.integers(1, 300))
def test_numbers_are_what_counting_gives(weights, g, n):
    mixture = Mixture(weights)
    source_n, number_n = mixture.locate(np.arange(g + n))
    counts = np.zeros(len(weights), dtype=int)
    for i, source in enumerate(source_n.tolist()):
        assert mixture.taken_before(i).tolist() == counts.tolist()
        assert number_n[i] == counts[source]
        counts[source] += 1
    again = mixture.locate(np.arange(g, g + n))
    assert np.array_equal(again[0], source_n[g:])
    assert np.array_equal(again[1], number_n[g:])


@given(weights, st.integers(0, 10**15))
def test_every_prefix_is_near_the_weights(weights, g):
    taken = Mixture(weights).taken_before(g)
    assert taken.sum() == g
    expected = g * (np.array(weights) / sum(weights))
    assert np.abs(taken - expected).max() < len(weights) + g * 1e-15


def test_weights_are_kept_exactly():
    assert Mixture([0.7, 0.3]).taken_before(10).tolist() == [7, 3]
    assert Mixture([1, 2]).taken_before(3_000_000_000_000).tolist() == [10**12, 2 * 10**12]
    assert Mixture([1.0]).locate(np.array([5])) == (np.array([0]), np.array([5]))
    with pytest.raises(ConfigError, match=r"data\.sources"):
        Mixture([1.000000001, 1])
