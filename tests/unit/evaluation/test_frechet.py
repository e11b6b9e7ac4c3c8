"""Fréchet distance against closed forms, and the classifier in whose features it is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.evaluation.feature_classifier import load_classifier, save_classifier, train_classifier
from msdiff_dist.evaluation.frechet import Gaussian, fit, frechet_distance


def test_diagonal_gaussians() -> None:
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 2.0])
    mean = np.array([1.0, -2.0, 0.5])
    expected = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(Gaussian(mean, np.diag(a)), Gaussian(np.zeros(3), np.diag(b)))
    assert found == pytest.approx(expected, abs=1e-12)


def test_any_gaussians_by_a_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 16)) @ rng.normal(size=(16, 16)), rng.normal(0.3, 2.0, size=(150, 16))
    a, b = fit(x), fit(y)
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_fewer_samples_than_features() -> None:
    x = np.random.default_rng(1).normal(size=(5, 16))
    assert frechet_distance(fit(x), fit(x)) == pytest.approx(0, abs=1e-6)


def test_classifier_learns_digits_and_survives_its_file(tmp_path: Path) -> None:
    prepare("digits", tmp_path / "digits", shards=4)
    data = DataConfig(shards=str(tmp_path / "digits"), image_size=16, channels=1, num_classes=10, flip=True)
    model = train_classifier(data, 300)
    assert model.info.accuracy > 0.9
    save_classifier(model, tmp_path / "digits.safetensors")
    again = load_classifier(tmp_path / "digits.safetensors")
    assert again.info == model.info
    x = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    assert again.features(x).shape == (5, 64)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ConfigError, match="labelled"):
        train_classifier(DataConfig(shards=str(tmp_path / "digits"), image_size=16, channels=1), 1)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    for name, problem in (("none", "no such file"), ("other", "is no feature classifier")):
        with pytest.raises(CheckpointError, match=problem):
            load_classifier(tmp_path / f"{name}.safetensors")
