"""Noise schedules of discrete processes (2006.11239): their betas, in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np

ScheduleName = Literal["scaled_linear", "linear", "cosine"]


def betas(name: ScheduleName, timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Variances beta_t [timesteps] of the steps q(x_t | x_{t-1}), as LDM and diffusers define them.

    `scaled_linear` is linear in sqrt(beta) (LDM's own configurations call it "linear"). `linear` is that of DDPM.
    `cosine` (2102.09672, Eq. 17) is capped at 0.999 and does not use `beta_start` and `beta_end`.
    """
    if name == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2
    if name == "linear":
        return np.linspace(beta_start, beta_end, timesteps)
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    values: np.ndarray = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return values


def alphas_cumprod(betas_T: np.ndarray) -> np.ndarray:
    """Products a_t [timesteps] of 1 - beta up to each timestep t: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps."""
    return np.cumprod(1 - betas_T)
