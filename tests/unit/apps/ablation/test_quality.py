"""Compute to a quality: against closed forms, where it is not reached, and with one seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, t

from msdiff_dist.apps.ablation.quality import (
    Curves,
    _resamples,
    compare,
    compute_to_reach,
    expanded_tail,
    level_score,
)

POINTS = 2.0 ** np.arange(6)  # compute of the points


def _curves(scores: np.ndarray, seeds: tuple[int, ...] | None = None, points: np.ndarray = POINTS) -> Curves:
    scores = np.atleast_2d(scores)
    return Curves(
        seeds=seeds or tuple(range(len(scores))), petaflops_SP=np.tile(points, (len(scores), 1)), score_SP=scores
    )


def _falling(factor: float, offset: float = 0.0) -> np.ndarray:
    """2 + exp(-log2 c): a curve that falls exponentially in the logarithm of compute, reached with `factor` of it."""
    return 2 + np.exp(-np.log2(POINTS / factor)) + offset


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 2.0])
def test_a_shifted_curve_has_the_ratio_of_its_shift(factor: float) -> None:
    # A shift by powers of two moves points onto points, so interpolated curves are shifted exactly, too.
    for at in compare(_curves(_falling(1)), _curves(_falling(factor)), [0.5, 0.7, 0.75, 1.0]):
        if factor <= 1:
            assert at.ratio == pytest.approx(factor, rel=1e-12)
            assert (at.above, at.below) == (None, None)
        elif at.level == 1.0:
            assert (at.ratio, at.above, at.not_reached) == (None, pytest.approx(1.0), 1.0)


def test_the_interval_covers_a_known_ratio() -> None:
    """Seeds that shift baseline and variant alike: paired, the ratio hardly varies, although the scores do."""
    rng = np.random.default_rng(0)
    shifts = rng.normal(0, 0.3, 5)
    baseline = _curves(np.stack([_falling(1, s) for s in shifts]))
    exact = compare(baseline, _curves(np.stack([_falling(0.5, s) for s in shifts])), [0.75])[0]
    assert exact.low == pytest.approx(0.5)
    assert exact.high == pytest.approx(0.5)
    assert exact.resamples == 5**5
    noisy = np.stack([_falling(0.5, s) for s in shifts]) + rng.normal(0, 0.003, (5, len(POINTS)))
    found = compare(baseline, _curves(noisy), [0.75])[0]
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.3
    # With the variant's seeds in another order, each is compared with the wrong one.
    wrong = compare(baseline, _curves(noisy[::-1]), [0.75])[0]
    assert wrong.low is not None
    assert wrong.high is None or wrong.high - wrong.low > 2 * (found.high - found.low)


def test_intervals_of_five_seeds_hold_the_ratio_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        shifts = rng.normal(0, 0.02, (5, 1))
        noise = rng.normal(0, 0.01, (2, 5, len(POINTS)))
        at = compare(_curves(_falling(1) + shifts + noise[0]), _curves(_falling(0.5) + shifts + noise[1]), [0.75])[0]
        held += (at.low or 0) <= 0.5 <= (at.high or np.inf)
    assert held >= 90  # plain percentile intervals hold it in about 87 of 100


@pytest.mark.parametrize("count", [2, 5, 6, 7, 9, 30])
def test_the_interval_of_a_mean_is_as_wide_as_students(count: int) -> None:
    # The bootstrap's distribution of a mean has, for large samples, the spread of the sample by its own mean / sqrt(n).
    z = norm.ppf(expanded_tail(count)) * np.sqrt((count - 1) / count)
    assert z == pytest.approx(t.ppf(0.025, count - 1), rel=1e-9)
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.01, count)
    drawn, times = _resamples(count)
    assert times.sum() == (count**count if count <= 7 else 2000)
    spread = np.sqrt(np.average((values[drawn].mean(axis=1) - values.mean()) ** 2, weights=times))
    assert spread == pytest.approx(values.std() / np.sqrt(count), rel=1e-9 if count <= 7 else 0.1)


def test_half_of_the_seeds_do_not_reach() -> None:
    baseline = _curves(np.stack([_falling(1)] * 4))
    variant = _curves(np.stack([_falling(1, -0.2), _falling(1, -0.2), _falling(1, 0.2), _falling(1, 0.2)]))
    at = compare(baseline, variant, [1.0])[0]
    assert at.high is None
    assert at.low is not None
    # The mean is above the level unless at least half of four draws are of the two good seeds: 11 of 16 draws.
    assert at.not_reached == pytest.approx(1 - 11 / 16)
    never = compare(baseline, _curves(np.stack([_falling(1, 9.0)] * 4)), [0.5, "best"])
    assert [(n.ratio, n.above, n.low, n.high, n.not_reached) for n in never] == [
        (None, pytest.approx(2.0), pytest.approx(2.0), None, 1.0),
        (None, pytest.approx(1.0), pytest.approx(1.0), None, 1.0),
    ]


def test_a_variant_that_is_there_at_its_first_point() -> None:
    at = compare(_curves(_falling(1)), _curves(_falling(1) - 5), [0.5])[0]
    assert (at.ratio, at.above, at.below) == (None, None, pytest.approx(1 / 16))


def test_one_seed_has_no_interval() -> None:
    at = compare(_curves(_falling(1)), _curves(_falling(0.5)), [1.0])[0]
    assert at.ratio == pytest.approx(0.5)
    assert (at.low, at.high, at.resamples) == (None, None, 0)


def test_only_seeds_of_both_are_compared() -> None:
    baseline = _curves(np.stack([_falling(1), _falling(1, 7.0)]), (0, 4))
    assert compare(baseline, _curves(_falling(0.5), (0,)), [1.0])[0].seeds == (0,)
    assert compare(baseline, _curves(_falling(0.5), (0,)), [1.0])[0].ratio == pytest.approx(0.5)
    assert compare(baseline, _curves(_falling(0.5), (9,)), [1.0]) == []


def test_levels_of_a_curve_that_is_not_monotone() -> None:
    petaflops, scores = np.array([1.0, 2.0, 4.0, 8.0]), np.array([9.0, 4.0, 6.0, 5.0])
    assert level_score("best", petaflops, scores) == 4
    assert level_score(1.0, petaflops, scores) == 5
    assert level_score(0.5, petaflops, scores) == 6
    assert level_score(2**-0.5, petaflops, scores) == pytest.approx(5.5)
    # The first crossing, between the first two points.
    assert compute_to_reach(5.0, petaflops, scores) == pytest.approx((2**0.8, 2**0.8))


def test_compute_to_reach_a_score() -> None:
    petaflops, scores = np.array([1.0, 2.0, 4.0]), np.array([9.0, 5.0, 4.0])
    for score, expected in {7.0: 2**0.5, 4.5: 2**1.5, 4.0: 4.0, 9.0: 1.0, 5.0: 2.0}.items():
        assert compute_to_reach(score, petaflops, scores) == pytest.approx((expected, expected))
    assert compute_to_reach(9.5, petaflops, scores) == (0.0, 1.0)
    assert compute_to_reach(3.9, petaflops, scores) == (4.0, np.inf)
