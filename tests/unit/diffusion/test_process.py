"""The discrete process: its equations, times and sampling times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdiff_dist.config import from_mapping
from msdiff_dist.diffusion.config import DiffusionConfig, build_process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.errors import ConfigError

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def discrete(prediction_type: str = "epsilon", **fields: object) -> DiscreteProcess:
    return DiscreteProcess(from_mapping(DiscreteConfig, {"prediction_type": prediction_type, **fields}))


def batch(n: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, n, 3, 4, 4, generator=g)
    return x0, noise, torch.randint(0, 1000, (n,), generator=g)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_target_as_output_gives_back_sample_and_noise(prediction_type: str) -> None:
    process, (x0, noise, t_B) = discrete(prediction_type), batch()
    x_t, output = process.perturb(x0, noise, t_B), process.target(x0, noise, t_B)
    torch.testing.assert_close(process.denoised(output, x_t, t_B), x0, atol=2e-5, rtol=0)


def test_perturb_is_equation_1_with_the_cumulative_product() -> None:
    process, (x0, noise, t_B) = discrete(), batch(3)
    x_t = process.perturb(x0, noise, t_B)
    for i, t in enumerate(t_B.tolist()):
        a = process.alphas_cumprod[t]
        torch.testing.assert_close(x_t[i], a**0.5 * x0[i] + (1 - a) ** 0.5 * noise[i])
    x_in, t_in = process.network_input(x_t, t_B)
    assert torch.equal(x_in, x_t)
    assert torch.equal(t_in, t_B.float())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weighs_the_error_of_the_sample(prediction_type: str) -> None:
    """weight x |F - F*|^2 = min(SNR, gamma) x |x0^ - x0|^2 whatever the network predicts."""
    process, (x0, noise, t_B) = discrete(prediction_type, min_snr_gamma=5.0), batch()
    x_t, target = process.perturb(x0, noise, t_B), process.target(x0, noise, t_B)
    output = target + 0.1 * noise.flip(0)
    error = (process.denoised(output, x_t, t_B).double() - x0.double()).square().mean((1, 2, 3))
    snr = torch.from_numpy(process.sigma_of(t_B.numpy()) ** -2)
    weighted = process.weight(t_B) * (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close(weighted.double(), snr.clamp(max=5) * error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weights_of_the_paper(prediction_type: str) -> None:
    """Hang et al. 2023: min(SNR, gamma) for x_0, over SNR for the noise, over SNR + 1 for v; SNR = a / (1 - a)."""
    process = discrete(prediction_type, min_snr_gamma=5.0)
    a = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    snr = a / (1 - a)
    least = np.minimum(snr, 5.0)
    expected = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[prediction_type]
    np.testing.assert_allclose(process.weight(torch.arange(1000)), expected, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_without_min_snr_all_weights_are_one(prediction_type: str) -> None:
    assert torch.equal(discrete(prediction_type).weight(torch.arange(1000)), torch.ones(1000))


@given(st.integers(0, 999), st.integers(1, 1000))
def test_quantiles_cover_an_interval_evenly(lo: int, length: int) -> None:
    process, hi = discrete(), min(lo + length, 1000)
    t = process.quantile((np.arange(4 * (hi - lo)) + 0.5) / (4 * (hi - lo)), lo, hi)
    assert t.dtype == np.int64
    assert np.array_equal(t, np.repeat(np.arange(lo, hi), 4))
    assert process.quantile(np.array([np.nextafter(1, 0)]), lo, hi)[0] == hi - 1
    assert process.mass(lo, hi) == pytest.approx((hi - lo) / 1000)


def test_timesteps_and_sigmas_convert_back() -> None:
    process, t = discrete(), np.arange(1000)
    sigma = process.sigma_of(t)
    assert np.all(np.diff(sigma) > 0)
    assert np.array_equal(process.time_of(sigma), t)
    assert process.time_of((sigma[441] + sigma[442]) / 2) == 442


@pytest.mark.parametrize("spacing", ["leading", "trailing", "log_snr"])
@given(steps=st.integers(1, 1000))
def test_sampling_times_descend_inside_the_process(spacing: str, steps: int) -> None:
    times = discrete().sampling_times(steps, spacing)[0]
    assert len(times) == steps
    assert np.all(np.diff(times) < 0)
    assert times[0] <= 999
    assert times[-1] >= 0


def test_sampling_times_of_ldm() -> None:
    for steps in (4, 20, 50, 100, 200, 250, 500):
        uniform = 1 + np.arange(0, 1000, 1000 // steps)  # make_ddim_timesteps of LDM's code
        assert discrete().sampling_times(steps, "leading")[0].tolist() == uniform[::-1].tolist()
    assert discrete().sampling_times(4, "trailing")[0].tolist() == [999, 749, 499, 249]


def test_the_last_step_ends_at_timestep_0_unless_it_starts_there() -> None:
    sigma_0 = np.sqrt(0.0015 / 0.9985)  # beta_start is the variance of timestep 0
    for steps, spacing in ((50, "leading"), (500, "leading"), (50, "trailing"), (500, "trailing")):
        assert discrete().sampling_times(steps, spacing, last="first_time")[1] == pytest.approx(sigma_0)
        assert discrete().sampling_times(steps, spacing, last="clean")[1] == 0
    for steps, spacing in ((1000, "leading"), (1000, "trailing"), (50, "log_snr")):
        times, landing = discrete().sampling_times(steps, spacing, last="first_time")
        assert (times[-1], landing) == (0, 0)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"discrete": {"timesteps": 1}}, "diffusion.discrete.timesteps"),
        ({"discrete": {"beta_end": 0.0001}}, "diffusion.discrete.beta_end"),
        ({"discrete": {"prediction_type": "x"}}, "diffusion.discrete.prediction_type"),
        ({"discrete": {"min_snr_gamma": 0}}, "diffusion.discrete.min_snr_gamma"),
        ({"process": "edn"}, "diffusion.process"),
    ],
)
def test_bad_sections_name_the_field(section: dict, field: str) -> None:
    with pytest.raises(ConfigError) as e:
        build_process(from_mapping(DiffusionConfig, section, "diffusion"))
    assert e.value.field == field
