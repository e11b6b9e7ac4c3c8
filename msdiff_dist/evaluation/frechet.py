"""Fréchet distance between sets of images: FID (1706.08500), but in the features of a small classifier.

Its values are comparable with each other, not with published FIDs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.bounds import check_between
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.images import read_images
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.evaluation.feature_classifier import load_classifier
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.sampling_job import MOST_IMAGES, SamplingJob
from msdiff_dist.terminal import LongWork


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How a model is scored.

    Args:
        classifier: file that `msdiff classifier train` wrote.
        reference: shards of the images to compare with.
        pictures: number of images to generate, of all classes in turn. Distances of different numbers of images do not
            compare, because the distance is biased by the number.
        sampler: how the images are sampled.
        batch_size: number of images sampled at once.
    """

    classifier: str
    reference: str | tuple[str, ...]
    pictures: int = 2000
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch_size: int = 250

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise ConfigError("pictures", self.pictures, "a covariance needs at least two images", "Use 2000.")
        check_between("pictures", self.pictures, 2, MOST_IMAGES)
        check_between("batch_size", self.batch_size, 1, MOST_IMAGES)
        if not self.classifier.strip():
            raise ConfigError("classifier", self.classifier, "is empty", "Name a file of `msdiff classifier train`.")


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray

    @cached_property
    def root_DD(self) -> np.ndarray:
        """The symmetric root of the covariance. Rounding may leave tiny negative eigenvalues, hence the clipping."""
        values, vectors = np.linalg.eigh(self.covariance_DD)
        root: np.ndarray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        return root


def fit(features_ND: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance of N >= 2 features."""
    features_ND = np.asarray(features_ND, np.float64)
    return Gaussian(features_ND.mean(0), np.atleast_2d(np.cov(features_ND, rowvar=False)))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) for covariances A and B (1706.08500, Eq. 6).

    This is the squared 2-Wasserstein distance of the two normal distributions.
    """
    # tr (A B)^(1/2) is the sum of the roots of the eigenvalues of A B. They are those of B^(1/2) A B^(1/2), which is
    # symmetric: no complex numbers arise.
    product = np.linalg.eigvalsh(b.root_DD @ a.covariance_DD @ b.root_DD)
    traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * np.sqrt(product.clip(0)).sum()
    return float(((a.mean_D - b.mean_D) ** 2).sum() + traces)


def frechet_distance_of(features_ND: np.ndarray, reference: Gaussian) -> float:
    """`frechet_distance` of the normal distribution fitted to features, without its covariance if these are few.

    With centred features X / sqrt(N - 1), whose products are the covariance A, the roots of the eigenvalues of
    B^(1/2) A B^(1/2) are the singular values of X B^(1/2), of which N x D has at most N.
    """
    count, width = features_ND.shape
    if count > width:
        return frechet_distance(fit(features_ND), reference)
    mean_D = features_ND.mean(0)
    centred_ND = (features_ND - mean_D) / (count - 1) ** 0.5
    roots = np.linalg.svd(centred_ND @ reference.root_DD, compute_uv=False)
    traces = (centred_ND**2).sum() + np.trace(reference.covariance_DD) - 2 * roots.sum()
    return float(((mean_D - reference.mean_D) ** 2).sum() + traces)


class Scorer:
    """Scores models by the Fréchet distance of their images to the reference images, whose features it computes once.

    Raises:
        CheckpointError: there is no such classifier.
        DataError: there are no such reference images, fewer than two, or they have another shape.
    """

    def __init__(self, config: ScoreConfig, device: torch.device) -> None:
        self.config, self._device = config, device
        self._classifier = load_classifier(Path(config.classifier)).to(device)
        channels, size, _ = self._classifier.info.image_shape
        data = DataConfig(shards=config.reference, image_size=size, channels=channels)
        reference = self.features(images for images, _ in read_images(data))
        if len(reference) < 2:
            raise DataError(
                "score.reference", config.reference, "a covariance needs at least two images", "Name more shards."
            )
        self._reference = fit(reference)

    def __call__(self, generator: ImageGenerator, seed: int, what: str = "sampling") -> float:
        """Score of the images with numbers 0 to `pictures` - 1 that `generator` makes with `seed`.

        Args:
            what: is done, in words, for the progress that is shown.
        """
        job = SamplingJob(
            num=self.config.pictures, seed=seed, sampler=self.config.sampler, batch_size=self.config.batch_size
        )
        with LongWork(what, job.num, "images") as work:
            images = (job.draw(generator, index_n, work) for index_n in job.batches)
            return frechet_distance(fit(self.features(images)), self._reference)

    @torch.no_grad()
    def features(self, batches: Iterable[Tensor]) -> np.ndarray:
        """Features [N, D], float64, of batches of uint8 images [n, C, H, W]."""
        return torch.cat([self._classifier.features(x.to(self._device)).cpu() for x in batches]).double().numpy()
