"""Parametrisations: what the network predicts, and how its output becomes an estimate of the clean sample.

All methods take the signal scale s and the noise scale n of x_t = s x_0 + n eps, shaped to broadcast over the samples.
SNR = s^2 / n^2. F is the network's output, and D the estimate of x_0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from msdiff_dist.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Denoiser(ABC):
    """A parametrisation of the denoised estimate D(x_t) by the network's output F."""

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
        """Weight of each sample's mean squared error of F, of the shape of s."""


class MinSNRDenoiser(Denoiser):
    """Base of the predictions of noise, velocity and sample, with the optional weight of min-SNR (2303.09556).

    That weight is min(SNR, gamma) on the error of x_0; without gamma the error of F has weight one.
    """

    def __init__(self, min_snr_gamma: float | None = None) -> None:
        self.gamma = min_snr_gamma

    def weight(self, s: Tensor, n: Tensor) -> Tensor:
        if self.gamma is None:
            return torch.ones_like(s)
        return self._output_weight(torch.clamp((s / n) ** 2, max=self.gamma), s, n)

    @abstractmethod
    def _output_weight(self, sample_weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """The weight on the squared error of F that is the same loss as `sample_weight` on that of x_0."""


class EpsilonDenoiser(MinSNRDenoiser):
    """F predicts the noise: x_0 = (x_t - n F) / s."""

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return noise

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return (x_t - n * output) / s

    def _output_weight(self, sample_weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return sample_weight / (s / n) ** 2  # the error of x_0 is -n / s times that of F


class VelocityDenoiser(MinSNRDenoiser):
    """F predicts v = s eps - n x_0 (2202.00512): x_0 = s x_t - n F, where s^2 + n^2 = 1."""

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return s * noise - n * x0

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return s * x_t - n * output

    def _output_weight(self, sample_weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return sample_weight * n**2  # the error of x_0 is -n times that of F


class SampleDenoiser(MinSNRDenoiser):
    """F predicts x_0 itself."""

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return x0

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return output

    def _output_weight(self, sample_weight: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return sample_weight


class EDMDenoiser(Denoiser):
    """EDM's preconditioning (2206.00364, Table 1; s = 1, n = sigma): D = c_skip x_t + c_out F(c_in x_t).

    c_skip = sigma_data^2 / (n^2 + sigma_data^2), c_out = n sigma_data / sqrt(n^2 + sigma_data^2), and
    c_in = 1 / sqrt(n^2 + sigma_data^2). EDM's weight on the squared error of D is 1 / c_out^2, which is weight one on
    that of F. With `min_snr_gamma` it is min(SNR, gamma) instead (2303.09556), which is c_out^2 times that on F.
    """

    def __init__(self, sigma_data: float, min_snr_gamma: float | None = None) -> None:
        self.sigma_data, self.gamma = sigma_data, min_snr_gamma

    def scale_input(self, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        return x_t / self._total(n)

    def target(self, x0: Tensor, noise: Tensor, s: Tensor, n: Tensor) -> Tensor:
        """(x_0 - c_skip x_t) / c_out, with x_t inserted so that nothing cancels at small n."""
        return (n * x0 / self.sigma_data - self.sigma_data * noise) / self._total(n)

    def denoised(self, output: Tensor, x_t: Tensor, s: Tensor, n: Tensor) -> Tensor:
        total = self._total(n)
        return (self.sigma_data / total) ** 2 * x_t + n * self.sigma_data / total * output

    def weight(self, s: Tensor, n: Tensor) -> Tensor:
        if self.gamma is None:
            return torch.ones_like(s)
        c_out = n * self.sigma_data / self._total(n)
        return torch.clamp((s / n) ** 2, max=self.gamma) * c_out**2

    def _total(self, n: Tensor) -> Tensor:
        return torch.sqrt(n**2 + self.sigma_data**2)


def noise_error(denoiser: Denoiser, s: Tensor, n: Tensor) -> Tensor:
    """Factor of the squared error of F to that of the noise that follows from it, eps = (x_t - s D) / n; of s's shape.

    D is affine in F, so the factor is (s / n)^2 times the square of its slope. It makes losses of different predictions
    comparable.
    """
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    slope = denoiser.denoised(one, zero, s, n) - denoiser.denoised(zero, zero, s, n)
    return (s / n * slope) ** 2


def build_denoiser(prediction_type: PredictionType, min_snr_gamma: float | None) -> Denoiser:
    """The denoiser of a recipe's `prediction_type`."""
    if prediction_type == "epsilon":
        return EpsilonDenoiser(min_snr_gamma)
    if prediction_type == "v_prediction":
        return VelocityDenoiser(min_snr_gamma)
    return SampleDenoiser(min_snr_gamma)


def check_min_snr_gamma(gamma: float | None) -> None:
    """Raise `ConfigError` for a min-SNR gamma with which all weights are zero or nearly so."""
    if gamma is not None and not gamma > 1e-6:
        raise ConfigError(
            "min_snr_gamma", gamma, "must be positive, and more than 1e-6", "Use 5, or null for no weighting."
        )
