"""The tables of the noise schedule in LDM's checkpoints: written, recognised and compared."""

from __future__ import annotations

import math

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

STABLE_DIFFUSION = (0.00085, 0.012)
"""First and last beta of Stable Diffusion, scaled_linear."""
PUBLISHED = (STABLE_DIFFUSION, (0.0015, 0.0195), (0.0015, 0.0155), (1e-4, 0.02))
_LINEAR: tuple[ScheduleName, ...] = ("scaled_linear", "linear")


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


def stored_schedule(source: TensorSource) -> DiscreteConfig | None:
    """The schedule whose betas, or else `alphas_cumprod`, the checkpoint holds; None if it holds neither.

    Raises:
        CheckpointError: they are of none of the schedules; the error names the table.
    """
    name = next((n for n in ("betas", "alphas_cumprod") if n in source), None)
    return None if name is None else recognise_schedule(source.read(name), name)


def recognise_schedule(table: Tensor, name: str = "betas") -> DiscreteConfig:
    """The schedule with this table, compared at the precision that the table has.

    Args:
        table: one value for each of T timesteps, of any type; [T], with any axes of length 1.
        name: `betas` or `alphas_cumprod`.

    Raises:
        CheckpointError: the table is of none of the schedules scaled_linear, linear and cosine.
    """
    stored, dtype = _row(table, name)
    beta = stored if name == "betas" else 1 - stored / np.append(1.0, stored[:-1])
    ends = [(shortest(beta[0], dtype), shortest(beta[-1], dtype))]
    # The ends of a table in half precision fit many numbers. Those of published models are tried too.
    fitting = [(start, end) for start, end in [*ends, *PUBLISHED] if 0 < start <= end < 1]
    tried: list[tuple[ScheduleName, float, float]] = [("cosine", 0.5, 0.5)]  # cosine takes no ends
    tried += [(schedule, *pair) for pair in fitting for schedule in _LINEAR]
    best, least = None, math.inf
    for schedule, start, end in tried:
        candidate = betas(schedule, len(stored), start, end)
        expected = candidate if name == "betas" else np.cumprod(1 - candidate)
        error = _error(stored, expected, dtype, 1e-6 if name == "betas" else 1e-4)
        if error < least:
            best, least = (schedule, start, end), error
    if best is not None and least <= 1:
        schedule, start, end = best
        if schedule == "cosine":  # has no first and last beta to set
            return DiscreteConfig(timesteps=len(stored), schedule=schedule)
        return DiscreteConfig(timesteps=len(stored), schedule=schedule, beta_start=start, beta_end=end)
    why = ""
    if beta[-1] == 1 or (name == "alphas_cumprod" and stored[-1] == 0):
        why = "; it ends in pure noise (zero terminal SNR), and these do not"
    raise CheckpointError(
        name, [float(f"{stored[0]:.6g}"), "...", float(f"{stored[-1]:.6g}")],
        f"is a table of none of the schedules scaled_linear, linear and cosine{why}",
        "Remove the noise tables from the checkpoint and give the nearest schedule with --config.",
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
            stored, dtype = _row(source.read(name), name)
            computed = expected.read(name).double().numpy()
            # Values near zero are differences of larger ones in LDM's arithmetic, so they have an absolute error.
            if stored.shape != computed.shape or _error(stored, computed, dtype, 1e-4, 1e-6) > 1:
                raise CheckpointError(
                    name, None, f"is not what {config.schedule} betas from {config.beta_start} to {config.beta_end} "
                    "give", "Use a checkpoint with consistent tables, or remove this one.",
                )  # fmt: skip
            reasons[name] = "computed from the noise schedule in config.json"
    return reasons


def shortest(value: float, dtype: torch.dtype) -> float:
    """The decimal of fewest digits that the type rounds to the same number: 0.0015 for the float32 nearest it."""
    rounded = torch.tensor(value, dtype=dtype)
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((d for d in decimals if torch.equal(torch.tensor(d, dtype=dtype), rounded)), float(value))


def _row(table: Tensor, name: str) -> tuple[np.ndarray, torch.dtype]:
    """The table's values, float64 [T], and the type whose precision they have, perhaps less than that they are kept in.

    Raises:
        CheckpointError: it is no table of one value for each timestep.
    """
    row = table.detach().reshape(-1)
    if row.numel() < 2 or row.numel() != max(table.shape) or not row.is_floating_point():
        raise CheckpointError(
            name, f"{str(table.dtype).removeprefix('torch.')} {list(table.shape)}",
            "is no table of one value for each timestep", "Remove it, and give the schedule with --config.",
        )  # fmt: skip
    kept = row.double()
    # A model that was in half precision for a while keeps its tables rounded.
    coarse = (t for t in (torch.bfloat16, torch.float16) if torch.equal(row.to(t).double(), kept))
    return kept.numpy(), next(coarse, row.dtype if row.dtype.itemsize == 8 else torch.float32)


def _error(stored: np.ndarray, computed: np.ndarray, dtype: torch.dtype, rtol: float, atol: float = 0.0) -> float:
    """The greatest difference, in multiples of what the type's rounding and the tolerances allow; inf for NaN."""
    info = torch.finfo(dtype)
    # Twice the rounding: the ends that a schedule is made of are rounded too. Below the normal numbers it is absolute.
    allowed = np.abs(computed) * max(rtol, info.eps) + max(atol, info.eps * info.smallest_normal)
    with np.errstate(all="ignore"):
        error = float(np.max(np.abs(stored - computed) / allowed))
    return error if math.isfinite(error) else math.inf
