"""Scores beside other implementations, closed forms and brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.evaluation import scores
from msdiff_dist.evaluation.frechet import fit
from msdiff_dist.evaluation.scores import METRICS, Reference, ScoredImages, score


def _two_sets(n: int = 300, m: int = 200, width: int = 12) -> tuple[ScoredImages, Reference]:
    rng = np.random.default_rng(0)
    a_ND = rng.standard_normal((n, width)) @ rng.standard_normal((width, width))
    b_MD = rng.standard_normal((m, width)) @ rng.standard_normal((width, width)) + 0.5
    logits_NK = 3 * rng.standard_normal((n, 7))
    return ScoredImages(features_ND=a_ND, logits_NK=logits_NK), Reference(gaussian=fit(b_MD), features_MD=b_MD)


@pytest.mark.parametrize("count", [300, 20], ids=["more images than features", "fewer"])
def test_fid_is_that_of_torch_fidelity_and_of_edm(count: int) -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    images, reference = _two_sets(count, width=24)
    assert reference.features_MD is not None
    found = METRICS["fid"].compute(images, reference)["fid"]
    a, b = (torch.from_numpy(x) for x in (images.features_ND, reference.features_MD))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert found == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-6)
    # EDM's fid.py: the trace of a matrix square root.
    x, y = fit(images.features_ND), reference.gaussian
    root = scipy.linalg.sqrtm(x.covariance_DD @ y.covariance_DD)
    edm = np.square(x.mean_D - y.mean_D).sum() + np.trace(x.covariance_DD + y.covariance_DD - 2 * root.real)
    assert found == pytest.approx(edm, rel=1e-6)


def test_kid_is_the_unbiased_mmd() -> None:
    images, reference = _two_sets(60, 60)
    x, y = images.features_ND, reference.features_MD
    assert y is not None

    def kernel(a: Any, b: Any) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n = len(x)
    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(a, b) for a in x for b in y) / n**2
    assert METRICS["kid"].compute(images, reference)["kid"] == pytest.approx(same - 2 * across, rel=1e-9)


def test_kid_over_subsets_is_that_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    monkeypatch.setattr(scores, "_SUBSET_SIZE", 80)
    images, reference = _two_sets(300, 200, 4)
    assert reference.features_MD is not None
    theirs = kid_features_to_metric(
        torch.from_numpy(images.features_ND),
        torch.from_numpy(reference.features_MD),
        kid_subset_size=80,
        verbose=False,
    )
    assert METRICS["kid"].compute(images, reference)["kid"] == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-6)


def test_precision_recall_density_and_coverage_by_brute_force() -> None:
    images, reference = _two_sets(50, 40)
    fake, real = images.features_ND, reference.features_MD
    assert real is not None

    def radii(points: Any) -> Any:  # distance of the fifth nearest other point
        return np.sort(np.linalg.norm(points[:, None] - points, axis=2))[:, 5]

    distance = np.linalg.norm(real[:, None] - fake, axis=2)
    inside_real = distance < radii(real)[:, None]
    expected = {
        "precision": inside_real.any(axis=0).mean(),
        "recall": (distance < radii(fake)).any(axis=1).mean(),
        "density": inside_real.sum(axis=0).mean() / 5,
        "coverage": (distance.min(axis=1) < radii(real)).mean(),
    }
    found = METRICS["prdc"].compute(images, reference)
    assert found == pytest.approx(expected)


def test_inception_score_of_certain_and_uncertain_classes() -> None:
    _, reference = _two_sets()
    certain = 200 * np.eye(4)[np.arange(400) % 4]
    for logits, expected in ((certain, 4.0), (np.zeros((400, 4)), 1.0)):
        images = ScoredImages(features_ND=np.zeros((400, 2)), logits_NK=logits)
        assert METRICS["is"].compute(images, reference)["is"] == pytest.approx(expected, rel=0.05)


def test_mind_of_a_shift_is_its_square() -> None:
    rng = np.random.default_rng(1)
    b_MD, shift_D = rng.standard_normal((300, 40)), rng.standard_normal(40)
    reference = Reference(gaussian=fit(b_MD), features_MD=b_MD)
    found = METRICS["mind"].compute(ScoredImages(features_ND=b_MD + shift_D), reference)["mind"]
    assert found == pytest.approx(shift_D @ shift_D, rel=0.1)  # 1,024 directions
    assert METRICS["mind"].compute(ScoredImages(features_ND=b_MD), reference)["mind"] == 0
    # In one dimension there is one direction, and sorting pairs the points; twice the points are the same distribution.
    x, y = rng.standard_normal((50, 1)), rng.standard_normal((50, 1))
    one = Reference(gaussian=fit(y), features_MD=y)
    expected = ((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2).mean()
    for points in (x, np.concatenate([x, x])):
        assert METRICS["mind"].compute(ScoredImages(features_ND=points), one)["mind"] == pytest.approx(expected)


def test_clip_score_and_retrieval() -> None:
    _, reference = _two_sets()
    text = np.eye(4)[[0, 1, 2, 2]]
    image = np.array([[1, 0, 0, 0], [0.6, 0.8, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], float)
    images = ScoredImages(features_ND=image, image_text_NE=image, text_NE=text)
    assert METRICS["clip"].compute(images, reference) == pytest.approx({"clip": 70.0, "retrieval": 0.75})


@pytest.mark.parametrize("name", ["fid", "kid", "prdc", "is", "mind"])
def test_intervals_hold_the_value_and_shrink_with_the_number(name: str) -> None:
    widths = []
    for n in (50, 800):
        images, reference = _two_sets(n, 400, 6)
        found = score(name, images, reference)
        assert all(s.low <= s.value <= s.high for s in found.values())
        assert found == score(name, images, reference)  # the draws are fixed
        widths.append(sum(s.high - s.low for s in found.values()))
    assert 0 < widths[1] < 0.6 * widths[0]


def test_an_interval_has_the_spread_of_repeated_sets() -> None:
    """The bootstrap's standard deviation beside that of scores of new sets of images."""
    rng = np.random.default_rng(2)
    b_MD = rng.standard_normal((2000, 4))
    reference = Reference(gaussian=fit(b_MD), features_MD=b_MD)
    sets = [ScoredImages(features_ND=rng.standard_normal((200, 4)) * 1.5 + 0.3) for _ in range(60)]
    spread = np.std([METRICS["fid"].compute(images, reference)["fid"] for images in sets])
    widths = [(s := score("fid", images, reference)["fid"]).high - s.low for images in sets[:10]]
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(spread, rel=0.4)


def test_what_is_missing_is_named() -> None:
    images, reference = _two_sets()
    with pytest.raises(DataError, match="fid"):
        score("kid", images, Reference(gaussian=reference.gaussian))
    with pytest.raises(ConfigError, match="classes"):
        score("is", ScoredImages(features_ND=images.features_ND), reference)
    with pytest.raises(ConfigError, match="Did you mean 'prdc'"):
        score("prcd", images, reference)
    assert math.isfinite(score("fid", images, Reference(gaussian=reference.gaussian))["fid"].value)


@pytest.mark.parametrize(("name", "fewest"), [("fid", 2), ("kid", 2), ("mind", 2), ("prdc", 7), ("is", 10)])
def test_too_few_images_are_refused_and_the_fewest_have_a_value(name: str, fewest: int) -> None:
    images, reference = _two_sets(fewest, max(fewest, 2), 4)
    assert all(np.isfinite(found.value) for found in score(name, images, reference).values())
    with pytest.raises(DataError, match=f"too few images for {name}, which needs {fewest}"):
        score(name, images.rows(np.arange(fewest - 1)), reference)
