"""Averages fitted from snapshots are those that would have been tracked in training."""

from __future__ import annotations

import numpy as np
import pytest

from msdiff_dist.checkpoint.power_profile import LONGEST, exponent, fit, inner_products, length_of


def averages(values: np.ndarray, gamma: float) -> np.ndarray:
    """For every t, the average of the first t values, updated value by value as in training."""
    kept, average = [], 0.0
    for t, value in enumerate(values, start=1):
        decay = (1 - 1 / t) ** (gamma + 1)
        average = decay * average + (1 - decay) * value
        kept.append(average)
    return np.array(kept)


def test_lengths_and_exponents() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)  # as the paper says
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)
    for length in (1e-3, 0.05, 0.2, 0.2886):
        assert length_of(exponent(length)) == pytest.approx(length, rel=1e-9)
    assert length_of(0) == LONGEST
    weights = averages(np.eye(1000), 6.94)[-1]
    times = np.arange(1, 1001)
    assert np.sqrt(weights @ (times - weights @ times) ** 2) / 1000 == pytest.approx(length_of(6.94), rel=1e-3)


def test_inner_products_are_the_integrals() -> None:
    profiles = np.array([(100.0, 6.94), (100.0, 0.5), (250.0, 16.97), (3.0, 2.0)])
    times = (np.arange(1_000_000) + 0.5) * 250 / 1_000_000
    densities = [np.where(times < t, (g + 1) * (times / t) ** g / t, 0) for t, g in profiles]
    sums = np.array([[(p * q).sum() * 250 / 1_000_000 for q in densities] for p in densities])
    np.testing.assert_allclose(inner_products(profiles, profiles), sums, rtol=1e-4)


@pytest.mark.parametrize("length", [0.04, 0.07, 0.15, 0.25])
def test_any_length_from_two(length: float) -> None:
    """On a random walk far from 0, the average fitted from two other lengths is near the tracked one."""
    walk = 100 + np.random.default_rng(0).standard_normal(2000).cumsum()
    held = np.array([(t, exponent(s)) for t in range(20, 2001, 20) for s in (0.05, 0.1)])
    coefficients, distance = fit(held, np.array([2000, exponent(length)]))
    tracked = {gamma: averages(walk, gamma) for gamma in held[:2, 1]}
    snapshots = np.array([tracked[gamma][int(t) - 1] for t, gamma in held])
    expected = averages(walk, exponent(length))[-1]
    assert coefficients @ snapshots == pytest.approx(expected, abs=0.002 * walk.std())
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert distance < (0.001 if 0.05 < length < 0.1 else 0.02)


def test_what_is_held_is_taken() -> None:
    held = np.array([(t, exponent(s)) for t in (10, 20, 30) for s in (0.05, 0.1)])
    coefficients, distance = fit(held, held[-1])
    np.testing.assert_allclose(coefficients, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert distance < 1e-6
