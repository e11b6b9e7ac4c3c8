"""One optimizer step: micro batches through the engines, one reduction of everything the ranks must agree on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from msdiff_dist.data.corruption import Damage, check_limit
from msdiff_dist.diffusion.augmentation import AugmentationConfig, augment
from msdiff_dist.diffusion.loss import LossKind, sample_losses
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.timestep_sampler import StageQuotas, dropout_mask, noise
from msdiff_dist.distributed.engines import StageParallelEngines
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.errors import TrainingError
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.randomness import generator
from msdiff_dist.training.feed import Feed, MicroBatch

T = TypeVar("T")
_KEYS_NAMED = 8


@dataclass(frozen=True)
class StepOutcome:
    """What every rank knows after a step.

    loss: over the global batch. loss_per_stage: mean of each stage. stop_requested: some rank was asked to stop.
    busy_W: each rank's seconds of forward computation. damage: shards and samples met by some rank, and before by none.
    seconds: wall time of compute and of the optimizer here.
    """

    loss: float
    loss_per_stage: list[float]
    grad_norm: float
    stop_requested: bool
    busy_W: list[float]
    damage: list[Damage]
    seconds: dict[str, float]

    @property
    def balance(self) -> float:
        """Mean over max of the ranks' busy time."""
        return sum(self.busy_W) / len(self.busy_W) / max(self.busy_W)


class TrainStep:
    """Takes micro batches from a feed and moves the engines by one optimizer step.

    Args:
        loss_kind: per-sample distance, as `diffusion.loss.sample_losses` names it.
        condition_dropout: probability of training a sample without its condition (for classifier-free guidance).
        null_label: the label that stands for "no class", None without classes.
        null_context: the context that stands for "no caption", [T, D]; None: zeros.
        max_bad: damaged shards and samples that all ranks together may leave out.
    """

    def __init__(
        self,
        feed: Feed,
        engines: StageParallelEngines,
        process: Process,
        quotas: StageQuotas,
        codec: LatentCodec,
        environment: Environment,
        *,
        seed: int,
        dtype: torch.dtype,
        loss_kind: LossKind,
        channels_last: bool,
        augmentation: AugmentationConfig | None,
        condition_dropout: float,
        null_label: int | None,
        null_context: Tensor | None,
        max_bad: int,
    ) -> None:
        self._feed = feed
        self._batches: Iterator[MicroBatch] = iter(feed)
        self._losses: list[tuple[Tensor, np.ndarray]] = []  # of the step's samples here, with their indices
        self._engines, self._process, self._quotas, self._codec = engines, process, quotas, codec
        self._env, self._seed, self._dtype = environment, seed, dtype
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._loss_kind, self._condition_dropout, self._null_label = loss_kind, condition_dropout, null_label
        self._augmentation = augmentation
        self._batch_size = int(quotas.quotas_K.sum())
        self._null_context = torch.zeros(()) if null_context is None else null_context
        self._max_bad = max_bad
        self._damage: dict[tuple[str, str | None], Damage] = {}

    def __call__(self, lr: float, stop_requested: bool) -> StepOutcome:
        """Run one global batch and step the optimizers with learning rate `lr`.

        Raises:
            TrainingError: on every rank alike, when the loss or the gradient norm is not finite.
            DataError: on every rank alike, when more is damaged than may be.
        """
        num_stages = len(self._quotas.quotas_K)
        loss_sum_K = torch.zeros(num_stages, dtype=torch.float64, device=self._env.device)
        compute = optimizer = 0.0
        at_boundary = False
        damage: list[Damage] = []
        self._losses.clear()
        while not at_boundary:
            batch = next(self._batches)
            damage += batch.damage
            start = time.perf_counter()
            self._forward_backward(batch, loss_sum_K)
            _synchronize(self._env.device)
            compute += time.perf_counter() - start
            start = time.perf_counter()
            at_boundary = self._engines.at_boundary()
            if at_boundary:
                loss_per_stage, stop, busy_W, damaged = self._agree(
                    batch.step, loss_sum_K, stop_requested, self._engines.forward_clock.take(), len(damage)
                )
            self._engines.step(lr)
            _synchronize(self._env.device)
            optimizer += time.perf_counter() - start
        importance_K = self._quotas.importance_K
        loss = sum(w * s * q for w, s, q in zip(importance_K, loss_per_stage, self._quotas.quotas_K, strict=True))
        return StepOutcome(
            float(loss) / self._batch_size,
            loss_per_stage,
            float(self._engines.grad_norm),
            stop,
            busy_W,
            self._new_damage(damage) if damaged else [],
            {"compute": compute, "optimizer": optimizer},
        )

    def _forward_backward(self, batch: MicroBatch, loss_sum_K: Tensor) -> None:
        routed, device = batch.samples, self._env.device
        x0 = self._codec.to_latents(routed.x.to(device))
        augment_labels = None
        if self._augmentation:
            x0, augment_labels = augment(x0, self._augmentation, self._seed, batch.step, routed.index_n)
        eps = noise(self._seed, batch.step, routed.index_n, tuple(x0.shape[1:])).to(device)
        t_n = batch.t_n.to(device)
        x_t = self._process.perturb(x0, eps, t_n)
        x_in, time_in = self._process.network_input(x_t, t_n)
        target, weight_n = self._process.target(x0, eps, t_n), self._process.weight(t_n)
        context, label = self._conditions(batch)

        def loss(k: int, output: Tensor, rows: slice) -> Tensor:
            losses = weight_n[rows] * sample_losses(output, target[rows], self._loss_kind)
            loss_sum_K[k] += losses.detach().sum()
            self._losses.append((losses.detach(), routed.index_n[rows]))
            return losses.sum() * (float(self._quotas.importance_K[k]) / self._batch_size)

        x_in = x_in.to(self._dtype, memory_format=self._memory_format)
        # Dropout masks: the same when the step is taken again on as many ranks, others on other numbers of ranks.
        torch.manual_seed(int(generator(self._seed, "dropout", batch.step, int(routed.index_n[0])).integers(2**63)))
        self._engines.forward_backward((x_in, time_in, context, label, augment_labels), batch.rows, loss)

    def _conditions(self, batch: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
        routed, device = batch.samples, self._env.device
        context = None if routed.context is None else routed.context.to(device, self._dtype)
        label = None if routed.label is None else routed.label.to(device)
        if self._condition_dropout and (context is not None or label is not None):
            dropped_n = dropout_mask(self._seed, batch.step, routed.index_n, self._condition_dropout).to(device)
            if label is not None and self._null_label is not None:
                label = label.masked_fill(dropped_n, self._null_label)
            if context is not None:
                context = torch.where(dropped_n[:, None, None], self._null_context.to(context), context)
        return context, label

    def _agree(
        self, step: int, loss_sum_K: Tensor, stop_requested: bool, busy: float, damaged: int
    ) -> tuple[list[float], bool, list[float], bool]:
        """Sum over the ranks: gradient norm, losses, the wish to stop, everyone's busy time and whether anyone met
        damage, in one all_reduce."""
        own = torch.zeros(self._env.world_size + 2, dtype=torch.float64, device=self._env.device)
        own[self._env.rank] = busy
        own[-2], own[-1] = float(stop_requested), damaged
        *summed, stop, damage = self._engines.reduce_norm(torch.cat([loss_sum_K, own])).tolist()
        sums, busy_W = summed[: len(loss_sum_K)], summed[len(loss_sum_K) :]
        loss_per_stage = [s / int(q) for s, q in zip(sums, self._quotas.quotas_K, strict=True)]
        bad = [k for k, v in enumerate(loss_per_stage) if not math.isfinite(v)]
        if bad or not torch.isfinite(self._engines.grad_norm):
            raise self._not_finite(step, bad)
        return loss_per_stage, stop > 0, busy_W, damage > 0

    def _not_finite(self, step: int, stages: list[int]) -> TrainingError:
        """The error that names what is not finite: samples of `stages`, or else gradients of parts. Collective."""
        left_alone = f"at step {step + 1}; the weights were left alone, and the last checkpoint stands"
        if not stages:
            parts = sorted({p for rank in self._gathered(self._engines.parts_with_bad_gradients()) for p in rank})
            return TrainingError(f"the gradient norm is not finite (in {', '.join(parts)}) {left_alone}")
        own = [i for losses_n, index_n in self._losses for i in index_n[~losses_n.isfinite().cpu().numpy()].tolist()]
        indices = {i for rank in self._gathered(own) for i in rank}
        key_of = {i: key for rank in self._gathered(self._feed.keys_of(step, indices)) for i, key in rank.items()}
        keys = [key_of[i] for i in sorted(key_of)]
        more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
        return TrainingError(
            f"the loss of stage {', '.join(map(str, stages))} is not finite {left_alone}. "
            f"Samples: {', '.join(keys[:_KEYS_NAMED])}{more}"
        )

    def _gathered(self, own: T) -> list[T]:
        """Every rank's `own`. Collective."""
        every: list[Any] = [None] * self._env.world_size
        dist.all_gather_object(every, own)
        return every

    def _new_damage(self, own: list[Damage]) -> list[Damage]:
        """What the ranks met in this step and none had met before. Collective."""
        new = {d.place: d for rank in self._gathered(own) for d in rank if d.place not in self._damage}
        for damage in new.values():
            self._damage[damage.place] = damage
            check_limit(len(self._damage), self._max_bad, damage)
        return list(new.values())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
