"""What the network predicts, and how its output becomes an estimate of the clean sample.

All methods take the scales s and n of x_t = s x_0 + n eps, shaped to broadcast over the samples; SNR = s^2 / n^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from msdiff_dist.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Denoiser(ABC):
    """A parametrisation of the denoised estimate D(x_t) by the network output F."""

    def scale_input(self, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """The network's input."""
        return x_t

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """What F is regressed on, by mean squared error."""

    @abstractmethod
    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """Estimate of x_0."""

    @abstractmethod
    def weight(self, s: Tensor, n: Tensor) -> Tensor:
        """Weight of each sample's mean squared error of F."""


class MinSNRDenoiser(Denoiser):
    """Base of the three predictions. The optional weight on the error of x_0, min(SNR, gamma), is 2303.09556's."""

    def __init__(self, min_snr_gamma: float | None = None) -> None:
        self.gamma = min_snr_gamma

    def weight(self, s: Tensor, n: Tensor) -> Tensor:
        if self.gamma is None:
            return torch.ones_like(s)
        return self._of_sample_weight(torch.clamp((s / n) ** 2, max=self.gamma), s, n)

    @abstractmethod
    def _of_sample_weight(self, weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """The weight on F's error that equals `weight` on the error of x_0."""


class EpsilonDenoiser(MinSNRDenoiser):
    """F predicts the noise: x_0 = (x_t - n F) / s."""

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return noise

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return (x_t - n * output) / s

    def _of_sample_weight(self, weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return weight / (s / n) ** 2


class VelocityDenoiser(MinSNRDenoiser):
    """F predicts v = s eps - n x_0 of a variance-preserving process (2202.00512, s^2 + n^2 = 1): x_0 = s x_t - n F."""

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return s * noise - n * x0

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return s * x_t - n * output

    def _of_sample_weight(self, weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return weight * n**2


class SampleDenoiser(MinSNRDenoiser):
    """F predicts x_0 itself."""

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return x0

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return output

    def _of_sample_weight(self, weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return weight


class EDMDenoiser(Denoiser):
    """EDM's preconditioning (2206.00364, Table 1; s = 1, n = sigma): D = c_skip x_t + c_out F(c_in x_t).

    c_skip = sigma_data^2 / (n^2 + sigma_data^2), c_out = n sigma_data / sqrt(n^2 + sigma_data^2), and
    c_in = 1 / sqrt(n^2 + sigma_data^2). EDM's weight on the error of D is 1 / c_out^2: one on the error of F.
    """

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def scale_input(self, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return x_t / self._total(n)

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """(x_0 - c_skip x_t) / c_out, written without its cancellation."""
        return (n * x0 / self.sigma_data - self.sigma_data * noise) / self._total(n)

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        total = self._total(n)
        return (self.sigma_data / total) ** 2 * x_t + n * self.sigma_data / total * output

    def weight(self, s: Tensor, n: Tensor) -> Tensor:
        return torch.ones_like(s)

    def _total(self, n: Tensor) -> Tensor:
        return torch.sqrt(n**2 + self.sigma_data**2)


def build_denoiser(prediction_type: PredictionType, min_snr_gamma: float | None) -> Denoiser:
    if prediction_type == "epsilon":
        return EpsilonDenoiser(min_snr_gamma)
    if prediction_type == "v_prediction":
        return VelocityDenoiser(min_snr_gamma)
    return SampleDenoiser(min_snr_gamma)


def check_min_snr_gamma(gamma: float | None) -> None:
    """Refuse a min-SNR gamma that is not positive."""
    if gamma is not None and not gamma > 0:
        raise ConfigError("min_snr_gamma", gamma, "must be positive", "Use 5, or null for no weighting.")
