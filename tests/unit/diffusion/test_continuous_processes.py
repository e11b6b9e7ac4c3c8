"""The VP-SDE and EDM processes, and times carried from one process to another."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from msdiff_dist.config import from_mapping
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.loss import sample_losses
from msdiff_dist.diffusion.process import convert_times
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import ConfigError
from msdiff_dist.recipe import load_recipe

DISCRETE = build_process(DiffusionConfig())
VP = VPProcess(VPConfig(t_min=1e-4))
EDM = EDMProcess(EDMConfig())
RECIPES = Path(__file__).parents[3] / "recipes"
BOUNDARIES = {"timestep": (442.0, 631.0), "t": (0.442, 0.6308), "sigma": (2.5103, 7.6577)}


def batch(n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    x0, noise = torch.randn(2, n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x0, noise


def test_vp_scales_integrate_beta() -> None:
    for t in (1e-4, 0.01, 0.3, 1.0):
        total, _ = integrate.quad(lambda u: 0.1 + u * 19.9, 0, t)
        s, n = VP.scales(torch.tensor([t], dtype=torch.float64))
        assert s.item() == pytest.approx(math.exp(-total / 2), rel=1e-6)
        assert n.item() == pytest.approx(math.sqrt(1 - math.exp(-total)), rel=1e-5)
        assert VP.sigma_of(t) == pytest.approx(n.item() / s.item(), rel=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_vp_targets_give_back_the_sample(prediction_type: str) -> None:
    process, (x0, noise) = VPProcess(from_mapping(VPConfig, {"prediction_type": prediction_type})), batch()
    t_B = torch.linspace(0.001, 0.9, 32, dtype=torch.float64)
    x_t = process.perturb(x0, noise, t_B)
    output = process.target(x0, noise, t_B)
    torch.testing.assert_close(process.denoised(output, x_t, t_B), x0, atol=3e-5, rtol=0)
    x_in, t_in = process.network_input(x_t, t_B)
    assert x_in is x_t
    torch.testing.assert_close(t_in, (999 * t_B).float())


def test_edm_preconditioning_is_table_1() -> None:
    x0, noise = batch()
    sigma_B = torch.exp(torch.linspace(-6, 4, 32, dtype=torch.float64))
    sigma, data = sigma_B.view(-1, 1, 1, 1), 0.5
    x_t = EDM.perturb(x0, noise, sigma_B)
    torch.testing.assert_close(x_t, (x0 + sigma * noise).float())
    x_in, t_in = EDM.network_input(x_t, sigma_B)
    torch.testing.assert_close(x_in, (x_t / (sigma**2 + data**2).sqrt()).float())
    torch.testing.assert_close(t_in, (sigma_B.log() / 4).float())
    output = torch.sin(x_in)
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    torch.testing.assert_close(EDM.denoised(output, x_t, sigma_B), (skip * x_t + out * output).float())


def test_edm_loss_is_the_weighted_denoising_error() -> None:
    """lambda(sigma) |D - y|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Eq. 2 and Table 1)."""
    x0, noise = batch()
    sigma_B = torch.exp(torch.linspace(-3, 2, 32, dtype=torch.float64))
    x_t, target = EDM.perturb(x0, noise, sigma_B), EDM.target(x0, noise, sigma_B)
    output = torch.cos(3 * x0)
    ours = EDM.weight(sigma_B) * sample_losses(output, target)
    error = (EDM.denoised(output, x_t, sigma_B).double() - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(ours.double(), (sigma_B**2 + 0.25) / (sigma_B * 0.5) ** 2 * error, rtol=1e-3, atol=1e-6)
    min_snr = EDMProcess(EDMConfig(min_snr_gamma=5.0))
    ours = min_snr.weight(sigma_B) * sample_losses(output, target)
    torch.testing.assert_close(ours.double(), (1 / sigma_B**2).clamp(max=5) * error, rtol=1e-3, atol=1e-6)
    tiny = torch.tensor([1e-34, 1e30], dtype=torch.float64)  # all that training can draw
    assert min_snr.weight(tiny).isfinite().all()


@pytest.mark.parametrize(
    ("lo", "hi"), [(0.0, math.inf), (0.0, 2.5103), (2.5103, 7.6577), (7.6577, math.inf), (60.0, 80.0)]
)
def test_edm_draws_a_log_normal_restricted_to_the_stage(lo: float, hi: float) -> None:
    distribution = stats.lognorm(s=1.2, scale=math.exp(-1.2))
    mass = distribution.sf(lo) - distribution.sf(hi)
    assert EDM.mass(lo, hi) == pytest.approx(mass, rel=1e-9)
    u = (np.arange(1000) + 0.5) / 1000
    sigma = EDM.quantile(u, lo, hi)
    assert sigma.min() >= lo
    assert sigma.max() < hi
    np.testing.assert_allclose(np.sort((distribution.sf(lo) - distribution.sf(sigma)) / mass), u, rtol=1e-7)


@given(u=st.floats(0, 1, exclude_max=True), k=st.integers(0, 2))
@pytest.mark.parametrize("process", [DISCRETE, VP, EDM], ids=lambda p: p.unit)
def test_drawn_times_lie_in_their_stage(process, u: float, k: int) -> None:
    partition = build_partition(StagesConfig(boundaries=BOUNDARIES[process.unit]), process)
    t = process.quantile(np.array([0.0, u, np.nextafter(1, 0)]), *partition.interval(k))
    assert (partition.stage_of(t) == k).all()
    assert (t > 0).all() or process is DISCRETE


@pytest.mark.parametrize("process", [DISCRETE, VP, EDM], ids=lambda p: p.unit)
def test_stages_change_exactly_at_the_boundary(process) -> None:
    partition = build_partition(StagesConfig(boundaries=BOUNDARIES[process.unit]), process)
    for k, b in enumerate(partition.boundaries):
        below = b - 1 if process is DISCRETE else np.nextafter(b, 0)
        assert partition.stage_of(np.array([below, b])).tolist() == [k, k + 1]
        assert partition.stage_of(torch.tensor([below, b], dtype=torch.float64)).tolist() == [k, k + 1]


@given(st.floats(1e-4, 0.9999))
def test_times_convert_there_and_back(t: float) -> None:
    sigma = convert_times(t, VP, EDM)
    assert convert_times(sigma, EDM, VP) == pytest.approx(t, rel=1e-9)
    timestep = int(convert_times(sigma, EDM, DISCRETE))
    if timestep < 1000:
        assert convert_times(convert_times(timestep, DISCRETE, EDM), EDM, DISCRETE) == timestep
        assert DISCRETE.sigma_of(timestep) >= sigma
        assert timestep == 0 or DISCRETE.sigma_of(timestep - 1) < sigma


def test_the_papers_first_boundary_is_the_same_noise_level_in_both_systems() -> None:
    assert convert_times(0.4420, VP, EDM) == pytest.approx(2.5103, abs=5e-5)


@given(st.integers(2, 200))
def test_continuous_sampling_times(steps: int) -> None:
    for spacing in ("log_snr", "uniform"):
        times, landing = VP.sampling_times(steps, spacing, 1e-3)
        assert times[0] == pytest.approx(1)
        assert landing == pytest.approx(VP.sigma_of(1e-3))
        even = np.log(VP.sigma_of(times)) if spacing == "log_snr" else times
        np.testing.assert_allclose(np.diff(even, 2), 0, atol=1e-9)
        assert VP.sampling_times(steps, spacing, 1e-3, "first_time")[1] == landing
        times, landing = VP.sampling_times(steps, spacing, 1e-2, "clean")
        assert (len(times), times[0], landing) == (steps, pytest.approx(1), 0)
        assert times[-1] == pytest.approx(1e-2), "the end is the last time, before clean data"
        even = np.log(VP.sigma_of(times)) if spacing == "log_snr" else times
        np.testing.assert_allclose(np.diff(even, 2), 0, atol=1e-9)
    times, landing = EDM.sampling_times(steps)
    np.testing.assert_allclose(
        times, [(80 ** (1 / 7) * (1 - u) + 0.002 ** (1 / 7) * u) ** 7 for u in np.linspace(0, 1, steps)]
    )
    assert landing == 0


@pytest.mark.parametrize("name", ["cifar10_dpm_3stage", "cifar10_dpm_unified", "fashion_mnist_dpm_3stage"])
def test_times_of_score_sde_are_trained_and_those_of_dpm_solver_sampled(name: str) -> None:
    """score_sde trains t = u (1 - 1e-5) + 1e-5; DPM-Solver stops at 1e-4 in 20 evaluations."""
    process = load_recipe(RECIPES / f"{name}.yaml").process()
    u = np.linspace(0, 0.999, 7)
    np.testing.assert_allclose(process.quantile(u, process.lo, process.hi), u * (1 - 1e-5) + 1e-5, rtol=1e-12)
    log_s = -0.25 * 1e-8 * 19.9 - 0.5 * 1e-4 * 0.1
    assert process.sampling_times(20)[1] == pytest.approx(np.sqrt(np.exp(-2 * log_s) - 1), rel=1e-9)
    assert process.sampling_times(20, end=1e-5)[1] == pytest.approx(process.sigma_of(1e-5))
    assert VPProcess(VPConfig(t_min=1e-4)).sampling_times(20)[1] == pytest.approx(process.sigma_of(1e-4))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"process": "vp", "vp": {"t_min": 0}}, "diffusion.vp.t_min"),
        ({"process": "vp", "vp": {"t_end": 1e-4}}, "diffusion.vp.t_end"),
        ({"process": "vp", "vp": {"beta_min": 30}}, "diffusion.vp.beta_min"),
        ({"process": "edm", "edm": {"p_std": 0}}, "diffusion.edm.p_std"),
        ({"process": "edm", "edm": {"sigma_max": 0.001}}, "diffusion.edm.sigma_max"),
        ({"process": "edm", "edm": {"prediction_type": "epsilon"}}, "diffusion.edm.prediction_type"),
        ({"process": "edm", "discrete": {}}, "diffusion.discrete"),
    ],
)
def test_bad_sections_name_the_field(section: dict, field: str) -> None:
    with pytest.raises(ConfigError) as e:
        build_process(from_mapping(DiffusionConfig, section, "diffusion"))
    assert e.value.field == field


@pytest.mark.parametrize(
    ("process", "boundaries"), [(VP, (1.0,)), (VP, (1e-5, 0.5)), (EDM, (-1.0,)), (EDM, (2.0, 1e30))]
)
def test_boundaries_outside_the_process_are_refused(process, boundaries: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^stages\.boundaries"):
        build_partition(StagesConfig(boundaries=boundaries), process)
