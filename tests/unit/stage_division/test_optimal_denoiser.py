"""The optimal denoiser and its similarities, against the equations as they are written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from msdiff_dist.diffusion.clock import clock_times
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.stage_division.optimal_denoiser import (
    Draws,
    LimitSimilarities,
    draw_samples,
    limit_boundaries,
    limit_similarities,
    optimal_noise,
    pairwise_boundaries,
    pairwise_similarity,
)

DISCRETE, VP, EDM = DiscreteProcess(DiscreteConfig()), VPProcess(VPConfig()), EDMProcess(EDMConfig())
ETA = 2 / 256


def clothes(n: int = 300, d: int = 48) -> Tensor:
    """Clustered data in [0, 1], quantised like pixels."""
    g = torch.Generator().manual_seed(0)
    centres = torch.rand(12, d, generator=g, dtype=torch.float64)
    data = centres[torch.randint(12, (n,), generator=g)] + 0.1 * torch.randn(n, d, generator=g, dtype=torch.float64)
    return (data.clamp(0, 1) * 255).round() / 255


def blocks_of(data: Tensor, size: int = 64):
    def blocks() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(data), size):
            yield first, data[first : first + size]

    return blocks


def naive_noise(data: Tensor, process: Process, y: Tensor, eps: Tensor, t: float) -> Tensor:
    """Equation 4 as it is written, for one sample, with x_t and the scales of the process itself."""
    sigma = float(process.sigma_of(t))
    s = 1.0 if process.unit == "sigma" else (1 + sigma**2) ** -0.5
    x = s * y + s * sigma * eps
    w = torch.softmax(-((x - s * data) ** 2).sum(1) / (2 * s**2 * sigma**2), 0)
    return (x - s * (w[:, None] * data).sum(0)) / (s * sigma)


def alike(a: Tensor, b: Tensor) -> float:
    return float(sum(abs(u - v) <= ETA for u, v in zip(a.tolist(), b.tolist(), strict=True)) / len(a))


@pytest.mark.parametrize("process", [DISCRETE, VP, EDM], ids=lambda p: p.unit)
def test_blocked_noise_equals_equation_4(process: Process) -> None:
    data = clothes()
    draws = draw_samples(blocks_of(data), len(data), 40, seed=1)
    t = clock_times(process, np.linspace(0.001, 1, 40))
    ours = optimal_noise(blocks_of(data, 37), draws.sample_Md, draws.noise_Md, torch.from_numpy(process.sigma_of(t)))
    for i in range(40):
        naive = naive_noise(data, process, draws.sample_Md[i], draws.noise_Md[i], t[i])
        torch.testing.assert_close(ours[i], naive, atol=1e-6, rtol=0)


@pytest.mark.parametrize("process", [DISCRETE, VP, EDM], ids=lambda p: p.unit)
def test_limit_similarities_equal_a_loop_over_the_definition(process: Process) -> None:
    data = clothes()
    draws = draw_samples(blocks_of(data), len(data), 60, seed=2)
    ours = limit_similarities(process, blocks_of(data), draws, ETA, seed=2, last_limit="at-1")
    assert np.all(np.diff(ours.clock_M) > 0)
    last = float(process.sigma_of(clock_times(process, 1.0)))
    for i, u in enumerate(ours.clock_M):
        y, eps = draws.sample_Md[i], draws.noise_Md[i]
        at_t = naive_noise(data, process, y, eps, clock_times(process, u))
        assert ours.to_data_M[i] == pytest.approx(alike(at_t, eps), abs=1e-6)
        assert ours.to_noise_M[i] == pytest.approx(alike(at_t, (y + last * eps - data.mean(0)) / last), abs=1e-6)


def test_the_official_limit_is_the_mean_denoiser_at_the_same_noisy_sample() -> None:
    data = clothes()
    draws = draw_samples(blocks_of(data), len(data), 30, seed=2)
    ours = limit_similarities(VP, blocks_of(data), draws, ETA, seed=2)
    for i, t in enumerate(clock_times(VP, ours.clock_M)):
        y, eps, sigma = draws.sample_Md[i], draws.noise_Md[i], float(VP.sigma_of(t))
        at_t, by_mean = naive_noise(data, VP, y, eps, t), (y + sigma * eps - data.mean(0)) / sigma
        assert ours.to_noise_M[i] == pytest.approx(alike(at_t, by_mean), abs=1e-6)


def published_boundaries(data: np.ndarray, draws: Draws, t_M: np.ndarray, alpha: float) -> list[float]:
    """Algorithm 1 with numpy alone, in the scripts' form: all three estimates at one x_t, for beta from 0.1 to 20."""
    to_data, to_noise = [], []
    for y, eps, t in zip(draws.sample_Md.numpy(), draws.noise_Md.numpy(), t_M, strict=True):
        log_s = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        s, std = np.exp(log_s), np.sqrt(1 - np.exp(2 * log_s))
        x, sigma = s * y + std * eps, std / s
        logit = -((x - s * data) ** 2).sum(1) / (2 * std**2)
        w = np.exp(logit - logit.max())
        best, by_mean = x / std - w @ data / (w.sum() * sigma), x / std - data.mean(0) / sigma
        to_data.append(np.mean(np.abs(best - eps) < ETA))
        to_noise.append(np.mean(np.abs(best - by_mean) < ETA))
    n = len(t_M)
    first = [t_M[k] for k in range(1, n) if np.mean(to_data[:k]) >= alpha]
    last = [t_M[k] for k in range(n) if np.mean(to_noise[k:]) >= alpha]
    return [max(first), min(last)]


def test_boundaries_are_those_of_the_published_form_of_algorithm_1() -> None:
    data = clothes()
    draws = draw_samples(blocks_of(data), len(data), 400, seed=6)
    published, text = (limit_similarities(VP, blocks_of(data), draws, ETA, 6, *form) for form in ((), ("at-1",)))
    expected = published_boundaries(data.numpy(), draws, clock_times(VP, published.clock_M), 0.9)
    assert limit_boundaries(VP, published, 0.9) == pytest.approx(expected)
    assert limit_boundaries(VP, text, 0.9)[0] == expected[0], "the limits differ at t = 1 alone"
    assert limit_boundaries(VP, text, 0.9)[1] > expected[1], "and the text's puts the last stage later"


def test_pairwise_similarity_equals_a_loop_over_the_definition() -> None:
    data = clothes()
    draws = draw_samples(blocks_of(data), len(data), 8, seed=3)
    t = clock_times(VP, np.linspace(0, 1, 6))
    ours = pairwise_similarity(blocks_of(data), draws, VP.sigma_of(t), ETA)
    for a in range(6):
        for b in range(6):
            pairs = zip(draws.sample_Md, draws.noise_Md, strict=True)
            naive = [alike(*(naive_noise(data, VP, y, e, t[c]) for c in (a, b))) for y, e in pairs]
            assert ours[a, b] == pytest.approx(np.mean(naive), abs=1e-6)


def test_draws_are_samples_of_the_data_whatever_the_blocks() -> None:
    data = clothes()
    one, other = (draw_samples(blocks_of(data, size), len(data), 50, seed=4) for size in (300, 7))
    assert torch.equal(one.sample_Md, other.sample_Md)
    torch.testing.assert_close(one.mean_d, data.mean(0))
    assert (one.sample_Md[:, None] == data).all(-1).any(1).all()
    assert not torch.equal(one.sample_Md, draw_samples(blocks_of(data), len(data), 50, seed=5).sample_Md)


def similarities(to_data: list[float], to_noise: list[float]) -> LimitSimilarities:
    clock = (np.arange(len(to_data)) + 0.5) / len(to_data)
    return LimitSimilarities(clock, np.array(to_data), np.array(to_noise))


def test_boundaries_of_algorithm_1() -> None:
    """Means of D(t, 0) over [0, tau): 1, 1, 1, .95, .86, ...; of D(t, 1) over [tau, 1]: ..., .85, .95, 1, 1."""
    found = similarities([1, 1, 1, 0.8, 0.5, 0.2, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.55, 0.85, 1, 1, 1])
    assert limit_boundaries(VP, found, 0.9) == [pytest.approx(0.45), pytest.approx(0.65)]
    assert limit_boundaries(DISCRETE, found, 0.9) == [450, 650]
    assert limit_boundaries(EDM, found, 0.9) == pytest.approx(VP.sigma_of([0.45, 0.65]))


@pytest.mark.parametrize(
    ("to_data", "to_noise", "message"),
    [
        ([0.5] * 6, [1.0] * 6, "no boundary of the first stage.*at most 0.5"),
        ([1.0] * 6, [0.7] * 6, "no boundary of the last stage.*at most 0.7"),
        ([1.0] * 6, [1.0] * 6, "meet"),
    ],
)
def test_alphas_without_boundaries_are_refused(to_data: list[float], to_noise: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limit_boundaries(VP, similarities(to_data, to_noise), 0.9)


def test_pairwise_boundaries_lie_between_grid_points() -> None:
    block = np.repeat([0, 1, 2, 3], [5, 2, 8, 6])
    similarity = np.where(block[:, None] == block, 1.0, 0.2)
    assert pairwise_boundaries(VP, similarity, 4) == pytest.approx([0.225, 0.325, 0.725])
    assert pairwise_boundaries(DISCRETE, similarity, 4) == [225, 325, 725]


def test_too_little_data_is_refused() -> None:
    with pytest.raises(DataError, match="at least 10 samples"):
        draw_samples(blocks_of(clothes(9)), 9, 5, seed=0)


def test_identical_data_needs_no_denoiser() -> None:
    """All samples equal: the posterior mean is the sample, so eps* is the noise at every time."""
    data = torch.full((20, 5), 0.25, dtype=torch.float64)
    draws = Draws(data[:4], torch.randn(4, 5, dtype=torch.float64), data[0])
    noise = optimal_noise(
        blocks_of(data, 6), draws.sample_Md, draws.noise_Md, torch.tensor([1e-3, 0.1, 10.0, 1e3]).double()
    )
    torch.testing.assert_close(noise, draws.noise_Md, atol=1e-6, rtol=0)
