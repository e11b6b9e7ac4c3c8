"""The tables of the noise schedule in LDM's checkpoints: written, recognised and compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.convert.tensor_sources import MemorySource, TensorSource
from msdiff_dist.diffusion.noise_schedule import ScheduleName, betas
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.errors import CheckpointError

# Buffers of LDM's DDPM module, all of one value for each of the T timesteps.
TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip


def schedule_tables(config: DiscreteConfig) -> MemorySource:
    """The buffers of LDM's DDPM module, float32 [T], from float64 arithmetic.

    `alphas_cumprod` are those of 2006.11239, Eq. 4; the mean and variance of the posterior are Eq. 7.
    """
    beta = betas(config.schedule, config.timesteps, config.beta_start, config.beta_end)
    a = np.cumprod(1 - beta)
    before = np.append(1.0, a[:-1])  # alphas_cumprod of the previous timestep
    variance = beta * (1 - before) / (1 - a)
    values = {
        "betas": beta,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(a),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - a),
        "log_one_minus_alphas_cumprod": np.log(1 - a),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / a),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / a - 1),
        "posterior_variance": variance,
        # The first variance is 0; LDM clips it here.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(before) / (1 - a),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - beta) / (1 - a),
    }
    assert tuple(values) == TABLES
    return MemorySource({name: torch.from_numpy(v.astype(np.float32)) for name, v in values.items()})


def recognise_schedule(table_T: Tensor) -> DiscreteConfig:
    """The schedule with these betas, float32 [T].

    Raises:
        CheckpointError: the betas are none of the schedules scaled_linear, linear and cosine.
    """
    # numpy prints the shortest decimal that rounds to the float32: 0.0015, where its value as float64 has more digits.
    table = table_T.float().numpy()
    start, end = (float(str(np.float32(v))) for v in (table[0], table[-1]))
    names: tuple[ScheduleName, ...] = ("scaled_linear", "linear", "cosine")
    for name in names:
        if 0 < start <= end < 1:
            candidate = betas(name, len(table), start, end)
            if np.allclose(candidate, table, rtol=1e-6, atol=0):
                if name == "cosine":  # has no first and last beta to set
                    return DiscreteConfig(timesteps=len(table), schedule=name)
                return DiscreteConfig(timesteps=len(table), schedule=name, beta_start=start, beta_end=end)
    raise CheckpointError(
        "betas", [start, "...", end], "are none of the schedules scaled_linear, linear and cosine",
        "Remove the betas from the checkpoint and give the nearest schedule with --config.",
    )  # fmt: skip


def redundant_tables(source: TensorSource, config: DiscreteConfig) -> dict[str, str]:
    """For each table that `source` holds, the reason why it is not converted: `config` gives it again.

    Raises:
        CheckpointError: a table is not what the schedule gives.
    """
    expected = schedule_tables(config)
    reasons: dict[str, str] = {}
    for name in TABLES:
        if name in source:
            stored = source.read(name).float()
            if stored.shape != expected.read(name).shape or not torch.allclose(
                stored, expected.read(name), rtol=1e-4, atol=1e-6
            ):
                raise CheckpointError(
                    name, None, f"is not what {config.schedule} betas from {config.beta_start} to {config.beta_end} "
                    "give", "Use a checkpoint with consistent tables, or remove this one.",
                )  # fmt: skip
            reasons[name] = "computed from the noise schedule in config.json"
    return reasons
