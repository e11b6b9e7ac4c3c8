"""Fixed evaluations: means over the training's distribution of times, and losses that do not depend on ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from msdiff_dist.data.samples import Samples
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.diffusion.training_times import TimesConfig, TrainingTimes
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.held_out_loss import BINS, HeldOutLoss, ValidationConfig, evaluations
from msdiff_dist.models.autoencoder import AutoencoderConfig, LatentCodec

PROCESSES = [DiscreteProcess(DiscreteConfig()), EDMProcess(EDMConfig()), VPProcess(VPConfig())]
IDS = ["discrete", "edm", "vp"]
BOUNDARIES = [(442.0, 631.0), (2.5103, 7.6577), (0.442, 0.631)]


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
def test_weighted_means_are_means_over_the_times_of_training(process: Process) -> None:
    found = evaluations(process, 100, 1024, 0)
    assert found.weight_n.sum() == pytest.approx(1)
    assert len(found.t_n) == len(found.sample_n) == 1024
    assert sorted(np.unique(found.sample_n)) == list(range(100))
    drawn = process.quantile((np.arange(200_000) + 0.5) / 200_000, process.lo, process.hi)

    def clock(t: Any) -> Any:  # a smooth function of log-SNR, with most of its change in the tails
        return np.tanh(np.log(process.sigma_of(t))) ** 3

    assert found.weight_n @ clock(found.t_n) == pytest.approx(clock(drawn).mean(), abs=2e-3)
    per_bin = [found.weight_n[found.bin_n == b].sum() for b in range(BINS)]
    assert per_bin == pytest.approx([1 / BINS] * BINS, abs=0.02)


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
def test_rare_times_are_evaluated_too(process: Process) -> None:
    """Twice as many evaluations as samples in training lie in the last hundredth of the training's times."""
    late = process.quantile(np.array([0.99]), process.lo, process.hi)
    assert (evaluations(process, 10, 1024, 0).t_n >= late).mean() > 0.02


class _Model:
    """Stands for a network: output and losses depend on every input, and on what else is in the batch."""

    device = torch.device("cpu")
    num_stages = 3

    def network(self, x: Any, t: Any, stage: int, label: Any, context: Any) -> Any:
        return (
            x * 0.1 * (stage + 1) + t.reshape(-1, 1, 1, 1) * 1e-3 + label.reshape(-1, 1, 1, 1) * 0.01 + x.mean() * 1e-3
        )


def _loss(
    process: Process, boundaries: tuple[float, ...], times: TimesConfig | None = None, **config: Any
) -> HeldOutLoss:
    rng = np.random.default_rng(0)
    samples = Samples(
        key_n=np.arange(37).astype(object),
        x_nCHW=rng.standard_normal((37, 2, 4, 4)).astype(np.float32),
        label_n=rng.integers(0, 5, 37),
    )
    return HeldOutLoss(
        ValidationConfig(**{"fraction": 0.1, "num": 150, **config}),
        samples,
        stored_latents=True,
        process=process,
        times=TrainingTimes(process, times),
        partition=build_partition(StagesConfig(boundaries=boundaries), process),
        probability_K=np.full(len(boundaries) + 1, 1 / (len(boundaries) + 1)),
        loss="l2",
    )


@pytest.mark.parametrize(("process", "boundaries"), zip(PROCESSES, BOUNDARIES, strict=True), ids=IDS)
def test_losses_are_the_same_on_any_ranks(process: Process, boundaries: tuple[float, ...]) -> None:
    codec = LatentCodec(AutoencoderConfig(), True, torch.device("cpu"))
    found = []
    for held in ([[0, 1, 2]], [[0], [1], [2]], [[0], [0, 1], [1, 2], [2]], [[k % 3] for k in range(8)], [[0], [1]]):
        loss = _loss(process, boundaries)
        losses_n = np.full(150, np.nan)
        for rank, batches in enumerate(loss.shares(held)):
            for batch in batches:
                assert batch.stage in held[rank] or not any(batch.stage in stages for stages in held)
                losses_n[batch.rows] = loss.compute(_Model(), codec, batch)  # type: ignore[arg-type]
        found.append(loss.summary(losses_n))
    assert all(summary == found[0] for summary in found)
    assert found[0]["loss"] == pytest.approx(np.mean(found[0]["loss_per_stage"]))


def test_models_of_other_stages_are_compared_on_the_same_evaluations() -> None:
    one, three = _loss(PROCESSES[0], ()), _loss(PROCESSES[0], BOUNDARIES[0])
    losses_n = np.random.default_rng(1).random(150)
    assert one.summary(losses_n)["unweighted"] == three.summary(losses_n)["unweighted"]
    assert one.summary(losses_n)["loss_per_bin"] == three.summary(losses_n)["loss_per_bin"]


def test_models_of_other_objectives_are_compared_on_the_same_evaluations() -> None:
    """Unweighted losses depend on neither min-SNR nor the times of training; the loss follows both."""
    weighted = DiscreteProcess(DiscreteConfig(min_snr_gamma=5.0))
    plain, other = _loss(PROCESSES[0], ()), _loss(weighted, (), TimesConfig(suppressed_from=700, suppression=5.0))
    losses_n, t_n = np.random.default_rng(1).random(150), plain.evaluations.t_n
    for name in ("sample_n", "t_n", "weight_n", "bin_n"):
        assert np.array_equal(getattr(plain.evaluations, name), getattr(other.evaluations, name))
    found, expected = other.summary(losses_n), plain.summary(losses_n)
    assert found["unweighted"] == expected["unweighted"]
    assert found["loss_per_bin"] == expected["loss_per_bin"]
    # The density of the draws, k or 1, times min(SNR, gamma) / SNR, times the rate of change between 0.4 and 0.6.
    snr, rate = weighted.sigma_of(t_n) ** -2, np.gradient(1 - weighted.alphas_cumprod)
    weight_n = np.minimum(snr, 5) / snr * (0.4 + 0.2 * (rate[t_n] - rate.min()) / (rate.max() - rate.min()))
    density_n = plain.evaluations.weight_n * np.where(t_n < 700, 5, 1)
    assert found["loss"] == pytest.approx((density_n * weight_n * losses_n).sum() / density_n.sum(), rel=1e-5)


def test_the_interval_covers_other_draws() -> None:
    loss = _loss(PROCESSES[0], (), num=1000)
    rng = np.random.default_rng(2)
    draws = [np.exp(rng.standard_normal(1000)) for _ in range(300)]
    mean = np.exp(0.5)
    covered = [abs(float(loss.summary(x)["unweighted"]) - mean) <= loss.interval(x) for x in draws]  # type: ignore[arg-type]
    assert 0.9 < np.mean(covered) <= 1


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "fraction"), ({"fraction": 0.1, "shards": "x"}, "fraction"), ({"fraction": 1.0}, "fraction"),
        ({"fraction": 0.1, "num": 10}, "num"), ({"fraction": 0.1, "every": 0}, "every"),
    ],
)  # fmt: skip
def test_bad_configurations(config: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ValidationConfig(**config)
    assert refused.value.field == field


def test_a_stage_without_evaluations_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage 1"):
        _loss(PROCESSES[0], (500.0, 501.0), num=64)
