"""Held-out loss: the objective on samples that are never trained on, with the same times and noise at every evaluation.

Evaluation j, of `num`, takes one held-out sample, one time and one noise, all fixed by the seed. The times are
stratified: half of the strata have equal probability in training, the others equal width in log-SNR, so that rare noise
levels are measured too, and each stratum counts by its probability. They do not depend on the stages, so that models
divided in other ways are compared on the same evaluations.

Evaluations of one stage are computed in batches of fixed content, each by one rank. So the losses do not depend on the
number of ranks, to the last bit, where a rank computes with as many threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msdiff_dist.data.samples import Samples
from msdiff_dist.diffusion.loss import LossKind, sample_losses
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.stage_partition import StagePartition
from msdiff_dist.diffusion.training_times import TrainingTimes
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.randomness import generator, held_out_noise

BINS = 10
"""Bins of `loss_per_bin`: intervals of time of equal probability in training, from the data on."""
_EQUAL_MASS, _EQUAL_LOG_SNR = 30, 34  # strata of either kind
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss during training. Either `fraction` or `shards` says what is held out."""

    fraction: float | None = None
    """Share of the samples of `data` that is never trained on, chosen by shard and position alone."""
    shards: str | tuple[str, ...] = ()
    """Shards of their own, in the form of `data.shards`, to validate on."""
    every: int = 1000
    """Steps between validations; there is one after the last step as well."""
    num: int = 512
    """Evaluations: pairs of a sample and a time. Each costs a third of training on a sample, for each kind of
    weights."""
    batch_size: int = 16
    """Evaluations computed at once. Their last bits depend on it."""
    seed: int = 0
    """Seed of samples, times and noise."""
    weights: Literal["both", "ema", "raw"] = "both"
    """Which weights are evaluated: the averaged ones, those of the last step, or both."""

    def __post_init__(self) -> None:
        if (self.fraction is None) == (not self.shards):
            raise ConfigError(
                "fraction", self.fraction, "must be given, or else `shards`, and not both", "Write fraction: 0.02, say."
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ConfigError("fraction", self.fraction, "must lie between 0 and 1", "Use 0.02, say.")
        for field, least in (("every", 1), ("num", _EQUAL_MASS + _EQUAL_LOG_SNR), ("batch_size", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise ConfigError(field, getattr(self, field), f"must be at least {least}", "Leave it out.")

    @property
    def averaged(self) -> list[bool]:
        """Whether averages are meant, for each kind of weights, the one that counts first."""
        return {"both": [True, False], "ema": [True], "raw": [False]}[self.weights]


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """What is evaluated: for each of `num` evaluations a sample, its time, its weight in the training's distribution.

    Attributes:
        sample_n: number of the sample.
        t_n: time in the process's unit.
        weight_n: weights that sum to one; a weighted mean is the mean over the training's distribution of times.
        bin_n: number of the bin of `loss_per_bin`.
    """

    sample_n: Ints
    t_n: NDArray[np.int64] | Floats
    weight_n: Floats
    bin_n: Ints


def evaluations(process: Process, samples: int, num: int, seed: int) -> Evaluations:
    """The fixed evaluations of `samples` held-out samples."""
    edges = _strata(process)
    mass = np.array([process.mass(lo, hi) for lo, hi in itertools.pairwise(edges)])
    edges = [edges[0], *(edge for edge, m in zip(edges[1:], mass, strict=True) if m > 0)]
    mass = mass[mass > 0]
    count = np.diff(np.arange(len(mass) + 1) * num // len(mass))
    uniform_n = generator(seed, "held out times").random(num)
    t, first = [], 0
    for k, n in enumerate(count.tolist()):
        within = (np.arange(n) + uniform_n[first : first + n]) / n
        t.append(process.quantile(within, edges[k], edges[k + 1]))
        first += n
    t_n = np.concatenate(t)
    inner = process.quantile(np.arange(1, BINS) / BINS, process.lo, process.hi)
    return Evaluations(
        # Shuffled, because shards may be sorted by class, and times ascend.
        sample_n=generator(seed, "held out samples").permutation(num) % samples,
        t_n=t_n,
        weight_n=np.repeat(mass / mass.sum() / count, count),
        bin_n=np.searchsorted(inner, t_n, side="right"),
    )


def _strata(process: Process) -> list[float]:
    """Edges of the strata of time, ascending."""
    inner = process.quantile(np.arange(1, _EQUAL_MASS) / _EQUAL_MASS, process.lo, process.hi)
    ends = process.sigma_of(process.quantile(np.array([1e-3, 1 - 1e-3]), process.lo, process.hi))
    spaced = process.time_of(np.geomspace(float(ends[0]), float(ends[1]), _EQUAL_LOG_SNR))
    edges = np.unique(np.concatenate([inner, spaced]))
    return [process.lo, *edges[(edges > process.lo) & (edges < process.hi)].tolist(), process.hi]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Evaluations of one stage that are computed together."""

    stage: int
    rows: Ints


class HeldOutLoss:
    """Computes the losses of fixed evaluations, in batches of fixed content.

    Args:
        samples: the held-out samples, as `data` stores them.
        stored_latents: they are latents, not images.
        times: the training's distribution and weights of times. The evaluations do not depend on it, only the sums do
            that are named so in `summary`.
        probability_K: probability of each stage in the objective.
    """

    def __init__(
        self,
        config: ValidationConfig,
        samples: Samples,
        *,
        stored_latents: bool,
        process: Process,
        times: TrainingTimes,
        partition: StagePartition,
        probability_K: Floats,
        loss: LossKind,
    ) -> None:
        self._config, self._samples, self._stored_latents = config, samples, stored_latents
        self._process, self._times, self._loss, self._probability_K = process, times, loss, probability_K
        self.evaluations = evaluations(process, len(samples.key_n), config.num, config.seed)
        self.stage_n = partition.stage_of(np.asarray(self.evaluations.t_n))
        counts_K = np.bincount(self.stage_n, minlength=partition.num_stages)
        if counts_K.min() == 0:
            problem = f"evaluations leave none for stage {counts_K.argmin()}"
            raise ConfigError("validation.num", config.num, problem, "Use more.")
        self.batches = [
            Batch(stage=k, rows=rows[i : i + config.batch_size])
            for k in range(partition.num_stages)
            for rows in [np.flatnonzero(self.stage_n == k)]
            for i in range(0, len(rows), config.batch_size)
        ]

    def shares(self, stages_of_rank: Sequence[Sequence[int]]) -> list[list[Batch]]:
        """The batches of each rank: those of a stage are dealt to the ranks that hold it, or to all if none does."""
        mine: list[list[Batch]] = [[] for _ in stages_of_rank]
        for stage in range(len(self._probability_K)):
            holders = [rank for rank, held in enumerate(stages_of_rank) if stage in held]
            holders = holders or list(range(len(stages_of_rank)))
            for i, batch in enumerate(b for b in self.batches if b.stage == stage):
                mine[holders[i % len(holders)]].append(batch)
        return mine

    @torch.inference_mode()
    def compute(self, model: ImageGenerator, codec: LatentCodec, batch: Batch) -> Floats:
        """The losses of one batch before any weight, float64 [n]."""
        chosen_n = self.evaluations.sample_n[batch.rows]

        def column(values: NDArray[np.generic] | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(values[chosen_n])

        stored = column(self._samples.x_nCHW)
        assert stored is not None
        if stored.dtype == torch.uint16:  # as numpy holds bfloat16
            stored = stored.view(torch.bfloat16)
        x0_nCHW = codec.to_latents(stored.to(model.device))
        noise_nCHW = held_out_noise(self._config.seed, batch.rows, x0_nCHW.shape[1:]).to(model.device)
        t_n = torch.from_numpy(np.ascontiguousarray(self.evaluations.t_n[batch.rows])).to(model.device)
        x_in, time_n = self._process.network_input(self._process.perturb(x0_nCHW, noise_nCHW, t_n), t_n)
        context, label = column(self._samples.context_nTC), column(self._samples.label_n)
        if context is not None and context.dtype == torch.uint16:
            context = context.view(torch.bfloat16)
        context = None if context is None else context.to(model.device).float()
        # A unified model computes every stage: a run that will grow out of it is measured by the stages to come.
        stage = batch.stage if model.num_stages > 1 else 0
        output = model.network(x_in, time_n, stage, None if label is None else label.to(model.device), context)
        losses = sample_losses(output, self._process.target(x0_nCHW, noise_nCHW, t_n), self._loss)
        found: Floats = losses.double().cpu().numpy()
        return found

    def summary(self, losses_n: Floats) -> dict[str, float | list[float]]:
        """Means of the losses of all evaluations, in order.

        `loss` is the objective, weights of stages and times included, and `loss_per_stage` that of each stage: they
        follow the times and weights of the training, `diffusion.times` and min-SNR among them. `unweighted` is the mean
        over the process's own distribution of times, and `loss_per_bin` over parts of it: they depend on none of that,
        so runs with other objectives compare by them. `epsilon` and `epsilon_per_stage` are the same means of the error
        of the noise that follows from the output: runs with other predictions compare by these.
        """
        t_n = np.asarray(self.evaluations.t_n)
        weighted_n = self._times.weight(torch.from_numpy(t_n)).double().numpy() * losses_n
        ratio_n = self._times.density_ratio(t_n)
        per_stage = [self._mean(weighted_n, self.stage_n == k, ratio_n) for k in range(len(self._probability_K))]
        factor_n = self._process.noise_error(torch.from_numpy(t_n)).double().numpy()
        epsilon_n = losses_n * (factor_n if self._loss == "l2" else np.sqrt(factor_n))
        return {
            "loss": float(self._probability_K @ np.array(per_stage)),
            "loss_per_stage": per_stage,
            "loss_per_bin": [self._mean(losses_n, self.evaluations.bin_n == b) for b in range(BINS)],
            "unweighted": self._mean(losses_n, np.ones(len(losses_n), np.bool_)),
            "epsilon": self._mean(epsilon_n, np.ones(len(losses_n), np.bool_)),
            "epsilon_per_stage": [self._mean(epsilon_n, self.stage_n == k) for k in range(len(self._probability_K))],
        }

    def interval(self, losses_n: Floats) -> float:
        """Half the width of the 95 % interval of `unweighted`, from the spread of the losses inside the bins."""
        means_B = np.array([self._mean(losses_n, self.evaluations.bin_n == b) for b in range(BINS)])
        residual_n = losses_n - means_B[self.evaluations.bin_n]
        return float(1.96 * np.sqrt((self.evaluations.weight_n**2 * residual_n**2).sum()))

    def _mean(self, values_n: Floats, where_n: NDArray[np.bool_], ratio_n: Floats | float = 1.0) -> float:
        weight_n = (self.evaluations.weight_n * ratio_n)[where_n]
        return float(weight_n @ values_n[where_n] / weight_n.sum())
