"""The maths of EDM2's power averages (Karras et al. 2024, section 3).

An average follows a power profile if step k of t weighs k^(gamma + 1) - (k - 1)^(gamma + 1) over t^(gamma + 1): its
density is p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], always the same share of the training so far. The
length is p's standard deviation over t.
"""

from __future__ import annotations

import math

import numpy as np

SNAPSHOTS = "ema_snapshots"
LONGEST = 12**-0.5  # gamma = 0: the mean of all steps


def length_of(gamma: float) -> float:
    """Relative length of the power profile with exponent `gamma`."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def exponent(length: float) -> float:
    """Inverse of `length_of`, for lengths in (0, LONGEST)."""
    ratio = length**-2
    roots = np.roots([1, 7, 16 - ratio, 12 - ratio])
    return float(roots.real[abs(roots.imag) < 1e-9].max())


def kind_of(length: float) -> str:
    """Kind under which checkpoints and snapshots hold the average of this length."""
    return f"ema_{length}"


def inner_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integrals of the products of profiles, [len(a), len(b)].

    Args:
        a, b: t and gamma of each, [n, 2].
    """
    (t_a, gamma_a), (t_b, gamma_b) = a.T[:, :, None], b.T[:, None]
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    values: np.ndarray = scale * np.where(t_a < t_b, (t_a / t_b) ** gamma_b / t_b, (t_b / t_a) ** gamma_a / t_a)
    return values


def fit(held: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of the sum of the `held` profiles, [n, 2], that is nearest to the `wanted` one, and its distance.

    Nearest in L2 among the sums of integral 1: unlike the paper's, they keep weights that never change exactly as they
    are, however few the snapshots. The distance is relative to the wanted profile's norm.
    """
    n, gram = len(held), inner_products(held, held)
    target, square = inner_products(held, wanted[None])[:, 0], inner_products(wanted[None], wanted[None]).item()
    system = np.block([[gram, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    x = np.linalg.solve(system, np.append(target, 1))[:n]
    return x, math.sqrt(max(0.0, 1 - (2 * x @ target - x @ gram @ x) / square))
