"""Fréchet distance between sets of features: FID (1706.08500) where they are Inception's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


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
