"""Solvers on Gaussian data, whose optimal denoiser is linear and whose probability flow is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.diffusion.sampling import image_generators
from msdiff_dist.diffusion.solvers import SOLVERS, ChurnConfig, Denoise, SamplerConfig, solve
from msdiff_dist.errors import ConfigError

DISCRETE, VP, EDM = DiscreteProcess(DiscreteConfig()), VPProcess(VPConfig()), EDMProcess(EDMConfig())
MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
MIX = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.2, 0.0], [-0.1, 0.1, 0.6]], dtype=torch.float64)
COVARIANCE = MIX @ MIX.T
EYE = torch.eye(3, dtype=torch.float64)


def scales(process: Process, sigma: float) -> tuple[float, float]:
    s = 1.0 if process.unit == "sigma" else 1 / math.sqrt(1 + sigma**2)
    return s, s * sigma


def optimal_denoiser(process: Process) -> Denoise:
    """E[x_0 | x_t] of N(MEAN, COVARIANCE) for rows x_t."""

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        s, n = scales(process, float(process.sigma_of(t)))
        gain = s * COVARIANCE @ torch.linalg.inv(s**2 * COVARIANCE + n**2 * EYE)
        return MEAN + (x.double() - s * MEAN) @ gain.T

    return denoise


def square_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.sqrt() @ vectors.T


def flow_error(process: Process, config: SamplerConfig) -> float:
    """Largest error on the probability flow x_T -> s_0 MEAN + C_0^(1/2) C_T^(-1/2) (x_T - s_T MEAN)."""
    times, landing = process.sampling_times(config.steps, config.spacing, config.end)
    (s_T, n_T), (s_0, n_0) = scales(process, float(process.sigma_of(times[0]))), scales(process, landing)
    root_T, root_0 = (square_root(s**2 * COVARIANCE + n**2 * EYE) for s, n in ((s_T, n_T), (s_0, n_0)))
    x_T = process.prior_std * torch.cat([EYE, -EYE, 2 * MIX])
    exact = s_0 * MEAN + (x_T - s_T * MEAN) @ torch.linalg.inv(root_T) @ root_0
    solved = solve(optimal_denoiser(process), process, config, x_T, [torch.Generator()] * len(x_T))
    return (solved - exact).abs().max().item()


@pytest.mark.parametrize(
    ("process", "name", "spacing", "steps", "order", "tolerance"),
    [
        (VP, "ddim", "log_snr", (128, 256), 1, 0.02),
        (VP, "ddim", "uniform", (128, 256), 1, 0.04),
        (VP, "dpmpp_2m", "log_snr", (128, 256), 2, 3e-4),
        (VP, "dpm_3s", "log_snr", (71, 143), 3, 1e-4),  # 24 and 48 steps in log-SNR, the last of order 2
        (EDM, "heun", "rho", (128, 256), 2, 1e-3),
    ],
)
def test_the_probability_flow_is_solved_with_the_stated_order(
    process: Process, name: str, spacing: str, steps: tuple[int, int], order: int, tolerance: float
) -> None:
    error, half = (flow_error(process, SamplerConfig(name=name, steps=n, spacing=spacing)) for n in steps)
    assert error < tolerance
    assert math.log2(error / half) > order - 0.1


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "log_snr"])
def test_the_discrete_process_is_solved_up_to_its_last_step(name: str, spacing: str) -> None:
    """Timesteps end at sigma 0.04; from there to clean data is one step, whatever their number."""
    assert flow_error(DISCRETE, SamplerConfig(name=name, steps=500, spacing=spacing)) < 0.03


@pytest.mark.parametrize(
    ("process", "config"),
    [
        (DISCRETE, SamplerConfig(name="ddim", steps=400, eta=1.0)),
        (DISCRETE, SamplerConfig(name="ddpm", steps=300)),
        (VP, SamplerConfig(name="ddpm", steps=400)),
        (VP, SamplerConfig(name="ddim", steps=400, eta=0.5)),
        (EDM, SamplerConfig(name="heun", steps=64, churn=ChurnConfig(amount=20.0))),
        (EDM, SamplerConfig(name="heun", steps=64)),
    ],
    ids=lambda v: v.name if isinstance(v, SamplerConfig) else v.unit,
)
def test_samples_have_the_mean_and_covariance_of_the_data(process: Process, config: SamplerConfig) -> None:
    generators = image_generators(0, range(40))
    x_T = process.prior_std * torch.stack([torch.randn(750, 3, generator=g, dtype=torch.float64) for g in generators])
    x = solve(optimal_denoiser(process), process, config, x_T, generators).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), COVARIANCE, atol=0.03, rtol=0)


@pytest.mark.parametrize("steps", range(3, 24))
def test_singlestep_spends_its_budget_exactly(steps: int) -> None:
    calls = []

    def count(x: torch.Tensor, t: float) -> torch.Tensor:
        calls.append(t)
        return 0 * x

    solve(count, VP, SamplerConfig(name="dpm_3s", steps=steps), torch.zeros(1, 1), [torch.Generator()])
    assert len(calls) == steps
    assert np.all(np.diff(calls) < 0)
    assert min(calls) > 1e-3
    assert max(calls) == pytest.approx(1)


def test_heun_takes_two_evaluations_for_each_step_but_the_last() -> None:
    calls = []
    config = SamplerConfig(name="heun", steps=SOLVERS["heun"].steps_of(35))
    solve(lambda x, t: calls.append(t) or 0 * x, EDM, config, torch.zeros(1, 1), [torch.Generator()])
    assert config.steps == 18
    assert len(calls) == 35


def test_clip_keeps_estimates_in_range() -> None:
    for process, name in [
        (DISCRETE, "ddim"),
        (DISCRETE, "ddpm"),
        (DISCRETE, "dpmpp_2m"),
        (VP, "dpm_3s"),
        (EDM, "heun"),
    ]:
        config = SamplerConfig(name=name, steps=30, clip=True)
        x_T = process.prior_std * torch.ones(1, 4, dtype=torch.float64)
        x = solve(lambda x, t: torch.full_like(x, 3.0), process, config, x_T, image_generators(0, [0]))
        torch.testing.assert_close(x, torch.ones_like(x), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("process", "fields", "field"),
    [
        (DISCRETE, {"steps": 1001}, "steps"),
        (DISCRETE, {"end": 3.0}, "end"),
        (DISCRETE, {"spacing": "rho"}, "spacing"),
        (DISCRETE, {"name": "heun"}, "name"),
        (DISCRETE, {"name": "dpm_3s"}, "name"),
        (VP, {"end": 1e-5}, "end"),
        (VP, {"name": "dpm_3s", "steps": 2}, "steps"),
        (VP, {"name": "dpm_3s", "spacing": "uniform"}, "spacing"),
        (VP, {"eta": 1.0}, "eta"),
        (EDM, {"name": "ddim"}, "name"),
        (EDM, {"name": "heun", "end": 0.0}, "end"),
        (VP, {"steps": 0}, "steps"),
        (VP, {"eta": 2.0}, "eta"),
        (VP, {"name": "ddpm", "eta": 0.5}, "eta"),
        (VP, {"churn": ChurnConfig(amount=1.0)}, "churn.amount"),
        (DISCRETE, {"churn": ChurnConfig(amount=1.0)}, "churn.amount"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(process: Process, fields: dict, field: str) -> None:
    with pytest.raises(ConfigError) as e:
        solve(lambda x, t: x, process, SamplerConfig(**fields), torch.zeros(1, 1), [torch.Generator()])
    assert e.value.field == field


@pytest.mark.parametrize(("process", "name"), [(DISCRETE, "ddim"), (VP, "dpm_3s"), (EDM, "heun")])
def test_every_process_has_a_sampler_of_its_own(process: Process, name: str) -> None:
    assert SamplerConfig().for_process(process).name == name


def test_an_even_budget_of_heun_is_refused() -> None:
    with pytest.raises(ConfigError, match="Use 19 or 21"):
        SOLVERS["heun"].steps_of(20)
    assert SOLVERS["dpm_3s"].steps_of(20) == 20
