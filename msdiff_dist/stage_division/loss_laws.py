"""How the held-out loss of each noise interval falls with training: power laws, fitted to short measured runs.

In one bin of times b the loss is taken as

    L = E + A * width^-a * depth^-f * samples^-c * length^d

E is what no network can predict (the noise's own share), `width` and `depth` are those of the decoder relative to the
recipe's, `samples` the number of training samples whose time lay in the bin, and `length` the probability of the whole
interval that the decoder serves: 1 for a unified model. d > 0 says that a decoder of its own helps there. The form is
that of laws of loss by parameters and data (2203.15556), one for each noise level, with the length of the interval as
one more cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

Floats = NDArray[np.float64]

FLOORS = np.concatenate([np.linspace(0.0, 0.95, 39), [0.97, 0.98, 0.99]])
"""Values of E that are tried, as fractions of the least loss that was measured."""
PRIOR_STRENGTH = 0.02
"""Weight of an exponent's distance from `PRIOR` beside one measurement's squared relative error of 0.1."""
PRIOR = (0.3, 0.3, 0.3, 0.0)
"""Exponents of width, depth, samples and length where the measurements do not tell."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Held-out losses of N moments of training, in each of B bins of equal probability.

    width_N, depth_N: of the decoders, relative to the recipe's. samples_NB: training samples in each bin so far.
    length_N: probability of the interval of one decoder.
    """

    width_N: Floats
    depth_N: Floats
    samples_NB: Floats
    length_N: Floats
    loss_NB: Floats


@dataclass(frozen=True, kw_only=True)
class LossLaws:
    """The fitted laws of B bins.

    Attributes:
        floor_B: E. scale_B: log A.
        width_B, depth_B, samples_B, length_B: the exponents a, f, c and d.
        error: root mean square of the relative error over all measurements.
    """

    floor_B: Floats
    scale_B: Floats
    width_B: Floats
    depth_B: Floats
    samples_B: Floats
    length_B: Floats
    error: float

    def loss(self, bins: slice, *, width: float, depth: float, samples: Floats, length: float) -> Floats:
        """Predicted losses [..., bins] of a decoder over these bins.

        Args:
            samples: training samples in each of the bins, [...]: the same number in all.
        """
        of_decoder = self.scale_B[bins] - self.width_B[bins] * np.log(width) - self.depth_B[bins] * np.log(depth)
        of_decoder = of_decoder + self.length_B[bins] * np.log(length)
        log_excess = of_decoder - self.samples_B[bins] * np.log(samples)[..., None]
        predicted: Floats = self.floor_B[bins] + np.exp(log_excess)
        return predicted


def fit_laws(measured: Measurements) -> LossLaws:
    """The laws that fit best: in each bin the floor by trial, the exponents by least squares of relative errors.

    Exponents of width, depth and samples are not negative: more of them never makes a prediction worse.
    """
    fitted = [_fit_bin(measured, b) for b in range(measured.loss_NB.shape[1])]
    table = np.array([values for values, _ in fitted])
    error = float(np.sqrt(np.mean([square for _, square in fitted])))
    floor, scale, width, depth, samples, length = table.T
    return LossLaws(
        floor_B=floor, scale_B=scale, width_B=width, depth_B=depth, samples_B=samples, length_B=length, error=error
    )


def _fit_bin(measured: Measurements, b: int) -> tuple[Sequence[float], float]:
    """Floor, log A and exponents of one bin, and the mean squared relative error."""
    loss = measured.loss_NB[:, b]
    causes = [-np.log(measured.width_N), -np.log(measured.depth_N), -np.log(measured.samples_NB[:, b])]
    design = np.stack([np.ones_like(loss), *causes, np.log(measured.length_N)], 1)
    bounds = ([-np.inf, 0, 0, 0, -np.inf], np.inf)
    best: tuple[float, Sequence[float], float] | None = None
    for floor in loss.min() * FLOORS:
        excess = loss - floor
        # A small error of log(excess) is one of excess / loss times as much in log(loss), which is to be fitted.
        weight = excess / loss
        rows, target = design * weight[:, None], np.log(excess) * weight
        ridge = 0.1 * np.sqrt(PRIOR_STRENGTH) * np.eye(5)[1:]
        found = lsq_linear(np.vstack([rows, ridge]), np.concatenate([target, ridge[:, 1:] @ np.array(PRIOR)]), bounds).x
        square = float(np.mean((np.log(floor + np.exp(design @ found)) - np.log(loss)) ** 2))
        penalized = square * len(loss) + 0.01 * PRIOR_STRENGTH * float(np.sum((found[1:] - np.array(PRIOR)) ** 2))
        if best is None or penalized < best[0]:
            best = (penalized, [float(floor), *found.tolist()], square)
    assert best is not None
    return best[1], best[2]
