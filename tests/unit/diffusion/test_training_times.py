"""SpeeD's times and weights (2405.17403) beside their closed forms, and the shares of stages that follow."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_times
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.diffusion.training_times import TimesConfig, TrainingTimes
from msdiff_dist.errors import ConfigError

DISCRETE, VP, EDM = DiscreteProcess(DiscreteConfig()), VPProcess(VPConfig()), EDMProcess(EDMConfig())
NO_WEIGHT = {"change_weight": None}


def _drawn(times: TrainingTimes, process: Process, boundaries: tuple[float, ...], steps: int = 400) -> np.ndarray:
    quotas = StageQuotas(times, build_partition(StagesConfig(boundaries=boundaries), process), "uniform", 500)
    return np.concatenate([quotas.draw(3, step).t_B for step in range(steps)])


@pytest.mark.parametrize("boundaries", [(), (442.0, 800.0)], ids=["unified", "stages"])
def test_timesteps_follow_the_papers_two_probabilities(boundaries: tuple[float, ...]) -> None:
    """P(t) = k / (T + tau (k - 1)) below tau, 1 / (T + tau (k - 1)) from it on, however time is divided."""
    t = _drawn(TrainingTimes(DISCRETE, TimesConfig(suppressed_from=700, suppression=5.0)), DISCRETE, boundaries)
    total = 1000 + 700 * 4
    share, _ = np.histogram(t, bins=np.arange(0, 1001, 100))
    expected = np.array([500 / total] * 7 + [100 / total] * 3)
    # Quotas are whole numbers: 500 samples of a batch leave each stage's share exact to 1 / 1000.
    np.testing.assert_allclose(share / len(t), expected, atol=4 * np.sqrt(expected.max() / len(t)) + 2e-4)
    assert set(t) == set(range(1000))


def test_continuous_times_follow_the_density() -> None:
    t = _drawn(TrainingTimes(VP, TimesConfig(suppressed_from=0.6, suppression=3.0)), VP, (0.3, 0.7))
    total = 3 * (0.6 - 1e-3) + 0.4
    assert (t < 0.3).mean() == pytest.approx(3 * (0.3 - 1e-3) / total, abs=2e-3)
    assert ((t >= 0.6) & (t < 0.7)).mean() == pytest.approx(0.1 / total, abs=2e-3)
    sigma = _drawn(TrainingTimes(EDM, TimesConfig(suppressed_from=1.0, suppression=4.0, **NO_WEIGHT)), EDM, (2.0,))
    below = NormalDist(-1.2, 1.2).cdf(0.0)
    assert (sigma < 1).mean() == pytest.approx(4 * below / (4 * below + 1 - below), abs=2e-3)
    assert sigma.min() > 0


def test_the_shares_of_stages_follow_from_the_density() -> None:
    """Three stages, tau inside the second: shares k 442, k (600 - 442) + 31 and 369 of their sum."""
    times = TrainingTimes(DISCRETE, TimesConfig(suppressed_from=600, suppression=5.0))
    partition = build_partition(StagesConfig(boundaries=(442, 631)), DISCRETE)
    quotas = StageQuotas(times, partition, "uniform", 3400)
    assert quotas.quotas_K.tolist() == [5 * 442, 5 * 158 + 31, 369]
    np.testing.assert_allclose(quotas.importance_K, 1)
    equal = StageQuotas(times, partition, "equal", 300)
    assert equal.quotas_K.tolist() == [100] * 3
    inside = np.concatenate([equal.draw(0, step).t_B for step in range(300)])
    inside = inside[(inside >= 442) & (inside < 631)]
    assert (inside < 600).mean() == pytest.approx(5 * 158 / (5 * 158 + 31), abs=5e-3)


def test_discrete_weights_are_the_rate_of_change_between_two_bounds() -> None:
    """1 - alpha_bar_t changes by (alpha_bar_(t-1) - alpha_bar_(t+1)) / 2 a timestep; alpha_bar by recursion."""
    times = TrainingTimes(DISCRETE, TimesConfig(suppressed_from=700, change_weight=0.6))
    beta = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    bar = [1.0]
    for b in beta:
        bar.append(bar[-1] * (1 - b))
    bar = bar[1:]
    rate = np.array([bar[0] - bar[1], *((bar[i - 1] - bar[i + 1]) / 2 for i in range(1, 999)), bar[998] - bar[999]])
    expected = 0.4 + 0.2 * (rate - rate.min()) / (rate.max() - rate.min())
    weight = times.weight(torch.arange(1000))
    assert weight.dtype == torch.float32
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    assert float(weight.min()) == pytest.approx(0.4)
    assert float(weight.max()) == pytest.approx(0.6)


def test_continuous_weights_are_the_rate_of_change() -> None:
    """d(n^2)/dt of the VP-SDE by differences of n^2, whose maximum lies where beta(t)^2 = beta'(t)."""
    t = np.linspace(0.01, 0.99, 50)
    n2 = [1 - np.exp(-(x**2) * 19.9 / 2 - x * 0.1) for x in (t - 1e-6, t + 1e-6)]
    rate = (n2[1] - n2[0]) / 2e-6
    at = (np.sqrt(19.9) - 0.1) / 19.9  # beta(t) = 0.1 + 19.9 t
    fastest = np.sqrt(19.9) * np.exp(-(at**2) * 19.9 / 2 - at * 0.1)
    slowest = 20 * np.exp(-19.9 / 2 - 0.1)  # at t = 1
    expected = 0.2 + 0.6 * (rate - slowest) / (fastest - slowest)
    weight = TrainingTimes(VP, TimesConfig(change_weight=0.8)).weight(torch.from_numpy(t))
    np.testing.assert_allclose(weight, expected, rtol=1e-4)


@pytest.mark.parametrize("boundaries", [(), (100.0, 442.0)], ids=["unified", "stages"])
def test_importance_weights_keep_the_objective(boundaries: tuple[float, ...]) -> None:
    """With tau 100 and k 6, 600 of 1500 samples are below 100, of weight 1/6 to the others', and the mean weight is 1.

    The mean of any loss under the drawn times, weighted, is its mean over all 1000 timesteps.
    """
    times = TrainingTimes(
        DISCRETE, TimesConfig(suppressed_from=100, suppression=6.0, importance_weights=True, **NO_WEIGHT)
    )
    t = _drawn(times, DISCRETE, boundaries)
    weight = times.weight(torch.from_numpy(t))
    assert weight.dtype == torch.float32
    assert (t < 100).mean() == pytest.approx(0.4, abs=2e-3)
    np.testing.assert_allclose(weight, np.where(t < 100, 0.25, 1.5), rtol=1e-6)
    for loss in (np.ones(1000), np.exp(-np.arange(1000) / 30), np.arange(1000) / 1000):
        assert float((weight.double() * torch.from_numpy(loss[t])).mean()) == pytest.approx(loss.mean(), rel=0.02)


def test_weights_multiply_those_of_min_snr_in_the_objective() -> None:
    process = DiscreteProcess(DiscreteConfig(min_snr_gamma=5.0))
    times, t_n = TrainingTimes(process, TimesConfig()), torch.tensor([0, 300, 900])
    x0, noise = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    weights = [Objective(process, "l2", of).noised(x0, noise, t_n).weight_n for of in (times, None)]
    plain = TrainingTimes(DISCRETE, TimesConfig()).weight(t_n)
    torch.testing.assert_close(weights[0], weights[1] * plain)
    assert torch.equal(weights[1], process.weight(t_n))


def test_the_default_is_the_papers_threshold_at_every_schedule() -> None:
    """The paper's tau is 700 of 1000 with linear betas; elsewhere it is the time of the same signal-to-noise ratio."""
    linear = DiscreteProcess(DiscreteConfig(schedule="linear", beta_start=1e-4, beta_end=0.02))
    ratio = TrainingTimes(linear, TimesConfig()).density_ratio(np.array([699, 700]))
    assert ratio[0] == pytest.approx(5 * ratio[1])
    sigma = linear.sigma_of(700)
    for process in (DISCRETE, VP, EDM):
        at = process.time_of(sigma)
        ratio = TrainingTimes(process, TimesConfig(**NO_WEIGHT)).density_ratio(np.array([at * 0.99, at * 1.01]))
        assert ratio[0] == pytest.approx(5 * ratio[1])


@pytest.mark.parametrize("process", [DISCRETE, VP, EDM], ids=["discrete", "vp", "edm"])
def test_without_the_section_times_and_weights_are_those_of_the_process(process: Process) -> None:
    times = TrainingTimes(process)
    partition = build_partition(StagesConfig(boundaries=(float(process.time_of(1.0)),)), process)
    ours, own = (StageQuotas(d, partition, "uniform", 64) for d in (times, process))
    assert np.array_equal(ours.importance_K, own.importance_K)
    for step in range(3):
        assert np.array_equal(ours.draw(0, step).t_B, own.draw(0, step).t_B)
    t = own.draw(0, 0).t_B
    assert np.array_equal(times.density_ratio(t), np.ones(64))
    assert torch.equal(times.weight(torch.from_numpy(t)), process.weight(torch.from_numpy(t)))


@pytest.mark.parametrize(
    ("process", "values", "field"),
    [
        ("edm", {}, "change_weight"), ("edm", {"suppressed_from": 0.0, **NO_WEIGHT}, "suppressed_from"),
        ("discrete", {"suppressed_from": 1000}, "suppressed_from"),
        ("discrete", {"suppressed_from": 0.7}, "suppressed_from"), ("vp", {"suppressed_from": 700}, "suppressed_from"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_the_process(process: str, values: dict[str, float | None], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_times(DiffusionConfig(process=process, times=TimesConfig(**values)))
    assert refused.value.field == f"diffusion.times.{field}"


@pytest.mark.parametrize("values", [{"suppression": 0.5}, {"change_weight": 0.4}, {"change_weight": 1.1}])
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as refused:
        TimesConfig(**values)
    assert [refused.value.field] == list(values)
