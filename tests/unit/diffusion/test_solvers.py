"""Solvers on Gaussian data, whose optimal denoiser is linear and whose probability flow is known in closed form."""

from __future__ import annotations

import itertools
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
from msdiff_dist.diffusion.solvers.schedulers import dpmpp_2m_restarts
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
    times, landing = process.sampling_times(config.steps, config.spacing, config.end, config.last)
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
        (VP, "dpmpp_2m", "uniform", (256, 512), 2, 2e-3),
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
    clean = flow_error(DISCRETE, SamplerConfig(name=name, steps=500, spacing=spacing, last="clean"))
    assert clean < 0.03
    first = flow_error(DISCRETE, SamplerConfig(name=name, steps=500, spacing=spacing))
    if spacing == "log_snr":
        assert first == clean, "the last step is from timestep 0"
    else:
        assert first < {"ddim": 8e-3, "dpmpp_2m": 1e-3}[name]


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 4), ("leading", 50), ("trailing", 20)])
def test_a_single_image_keeps_its_noise_down_to_timestep_0(name: str, spacing: str, steps: int) -> None:
    """Of data with one value every step is exact: the noise of x_T stays, at the scale of the time where it ends."""
    value, noise = torch.tensor([[0.7, -0.4]], dtype=torch.float64), torch.tensor([[1.3, -0.8]], dtype=torch.float64)
    times, _ = DISCRETE.sampling_times(steps, spacing)
    s_T, n_T = scales(DISCRETE, float(DISCRETE.sigma_of(times[0])))

    def solved(last: str) -> torch.Tensor:
        config = SamplerConfig(name=name, steps=steps, spacing=spacing, last=last)
        return solve(lambda x, t: value, DISCRETE, config, s_T * value + n_T * noise, [torch.Generator()])

    # alphas_cumprod[0] is 1 - beta_start = 0.9985.
    exact = math.sqrt(0.9985) * value + math.sqrt(0.0015) * noise
    torch.testing.assert_close(solved("first_time"), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(solved("clean"), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("process", "last"), [(VP, "first_time"), (DISCRETE, "first_time"), (VP, "clean")])
@pytest.mark.parametrize("steps", [9, 10, 25])
@pytest.mark.parametrize("restart", [None, True, False])
def test_dpmpp_2m_is_the_papers_algorithm(process: Process, last: str, steps: int, restart: bool | None) -> None:
    """2211.01095, Algorithm 2. The last step has order 1 if there are few, or if it ends at infinite log-SNR.

    So has the first step in another stage, if it is longer than the one before by more than a quarter.
    """
    spacing = "log_snr" if process is VP else "trailing"
    times, landing = process.sampling_times(steps, spacing, None, last)
    sigmas = [*process.sigma_of(times).tolist(), landing]
    x_T = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(2 * x + math.log(float(process.sigma_of(t))))

    def stage_of(t: float) -> int:
        return int(t > times[-1]) + int(process.sigma_of(t) > 5)

    x, before, r = x_T, None, 1.0
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        (_, n), (s_next, n_next) = scales(process, sigma), scales(process, sigma_next)
        if restart and i and stage_of(times[i]) != stage_of(times[i - 1]):
            longer = sigma_next == 0 or math.log(sigma / sigma_next) > 1.25 * math.log(sigmas[i - 1] / sigma)
            before = None if longer else before
        estimate = denoise(x, times[i])
        first = before is None or sigma_next == 0 or (i == steps - 1 and steps < 10)
        h = math.inf if sigma_next == 0 else math.log(sigma / sigma_next)
        if i:
            r = math.log(sigmas[i - 1] / sigma) / h
        d = estimate if first else (1 + 1 / (2 * r)) * estimate - 1 / (2 * r) * before
        x, before = n_next / n * x - s_next * math.expm1(-h) * d, estimate
    config = SamplerConfig(name="dpmpp_2m", steps=steps, spacing=spacing, last=last, restart=bool(restart))
    # The scheduler computes its steps in float32.
    several = None if restart is None else stage_of
    solved = solve(denoise, process, config, x_T, [torch.Generator()] * 2, several)
    assert {stage_of(t) for t in times.tolist()} == {0, 1, 2}
    # Steps even in t grow longer in log-SNR near the data; those even in log-SNR do not, up to one to clean data.
    assert bool(dpmpp_2m_restarts(process, config, stage_of)) == (process is DISCRETE or last == "clean")
    torch.testing.assert_close(solved, x, rtol=0, atol=2e-6)


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
    for process, name, last in [
        (DISCRETE, "ddim", "clean"),
        (DISCRETE, "ddpm", "first_time"),
        (DISCRETE, "dpmpp_2m", "clean"),
        (VP, "dpm_3s", "first_time"),
        (EDM, "heun", "first_time"),
    ]:
        config = SamplerConfig(name=name, steps=30, clip=True, last=last)
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
        (DISCRETE, {"name": "ddpm", "last": "clean"}, "last"),
        (EDM, {"last": "clean"}, "last"),
        (DISCRETE, {"name": "ddim", "restart": False}, "restart"),
        (EDM, {"restart": False}, "restart"),
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
