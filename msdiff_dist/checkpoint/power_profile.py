"""The maths of EDM2's power-function averages of weights (Karras et al. 2024, section 3).

After t steps, an average with exponent gamma weighs the weights of step k by (k^(gamma + 1) - (k - 1)^(gamma + 1)) /
t^(gamma + 1). As a density over time that is p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] (section 3.1),
whose shape does not change as training proceeds. The relative length of an average is the standard deviation of p
divided by t.

Averages of a few lengths are tracked during training and saved as snapshots. Afterwards a sum of snapshots is fitted to
the average of any other length (section 3.2, "post-hoc EMA"): both are sums over the same weights, so it is enough to
fit the profiles.
"""

from __future__ import annotations

import math

import numpy as np

SNAPSHOTS = "ema_snapshots"
"""Folder of the snapshots in a run folder."""
LONGEST = 12**-0.5
"""Relative length of the plain mean of all steps (gamma = 0); longer averages are of no use."""


def length_of(gamma: float) -> float:
    """Relative length of the power profile with exponent `gamma` (section 3.1)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def exponent(length: float) -> float:
    """Inverse of `length_of`, for lengths in (0, LONGEST)."""
    # length^2 = (gamma + 1) / ((gamma + 3) (gamma + 2)^2), a cubic in gamma of which the greatest real root is wanted.
    ratio = length**-2
    roots = np.roots([1, 7, 16 - ratio, 12 - ratio])
    return float(roots.real[abs(roots.imag) < 1e-9].max())


def kind_of(length: float) -> str:
    """Kind (see `layout`) under which checkpoints and snapshots hold the average of this length."""
    return f"ema_{length}"


def inner_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integrals over time of the products of two profiles, [len(a), len(b)].

    Args:
        a, b: columns t (steps at which the profile ends) and gamma (its exponent), [n, 2].
    """
    (t_a, gamma_a), (t_b, gamma_b) = a.T[:, :, None], b.T[:, None]
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    # With s the smaller t and T the larger, of exponent gamma_T: scale * (s / T)^gamma_T / T.
    values: np.ndarray = scale * np.where(t_a < t_b, (t_a / t_b) ** gamma_b / t_b, (t_b / t_a) ** gamma_a / t_a)
    return values


def fit(held: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients [n] of the sum of the `held` profiles that is nearest to the `wanted` one, and its distance.

    Nearest in L2, among the sums whose coefficients add up to 1. The paper does not demand that; here it is demanded so
    that a weight that never changes comes out as it is, however few the snapshots. The distance is relative to the L2
    norm of the wanted profile.

    Args:
        held: t and gamma of each snapshot's profile, [n, 2].
        wanted: t and gamma, [2].
    """
    n, gram = len(held), inner_products(held, held)
    target, square = inner_products(held, wanted[None])[:, 0], inner_products(wanted[None], wanted[None]).item()
    # Least squares with one constraint and its Lagrange multiplier, the last unknown:
    # [gram 1; 1^T 0] [x; multiplier] = [target; 1].
    system = np.block([[gram, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    x = np.linalg.solve(system, np.append(target, 1))[:n]
    return x, math.sqrt(max(0.0, 1 - (2 * x @ target - x @ gram @ x) / square))
