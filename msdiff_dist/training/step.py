"""One optimizer step: micro batches through the engines, then one reduction of all that the ranks must agree on."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.corruption import Corruption, check_limit
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.distributed.agree import joined
from msdiff_dist.distributed.device_clock import DeviceClock
from msdiff_dist.distributed.engines import ProjectedLoss, ReducedGradients, StageParallelEngines
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.peak_memory import peak_bytes
from msdiff_dist.distributed.progress import COMPUTE, REDUCE, UPDATE
from msdiff_dist.errors import TrainingError
from msdiff_dist.training.batch_plans import BatchPlans
from msdiff_dist.training.feed import Feed, MicroBatch
from msdiff_dist.training.guide import Guide
from msdiff_dist.training.metrics import StepOutcome
from msdiff_dist.training.prepare import Preparation, PreparedBatch
from msdiff_dist.training.stage_progress import StageProgress

_KEYS_NAMED = 8  # samples that an error lists at most


class TrainStep:
    """Takes micro batches from a feed and moves the engines by one optimizer step.

    Args:
        prepare: makes the network's inputs of a micro batch.
        batches: samples of each stage in every global batch, and their importance weights.
        progress: counts samples and steps of the stages, and says which decoders step; None: all do.
        max_bad: how many corrupt shards and samples all ranks together may skip.
        guide: aligns the encoder with a teacher in the steps that are guided; None: no step is.
        corruption: what any rank has met since this start, the same on every rank; it grows. None: nothing.
    """

    def __init__(
        self,
        feed: Feed,
        prepare: Preparation,
        objective: Objective,
        engines: StageParallelEngines,
        batches: BatchPlans,
        environment: Environment,
        *,
        max_bad: int,
        progress: StageProgress | None = None,
        guide: Guide | None = None,
        corruption: dict[tuple[str, str | None], Corruption] | None = None,
    ) -> None:
        self._feed, self._prepare, self._objective, self._engines = feed, prepare, objective, engines
        self._env, self._max_bad, self._guide = environment, max_bad, guide
        self._compute_clock, self._optimizer_clock = DeviceClock(environment.device), DeviceClock(environment.device)
        self._batches = batches
        self._quotas = batches.of(0).quotas  # of the current batch
        self._batch_size = int(self._quotas.quotas_K.sum())
        self.progress = progress or StageProgress(self._quotas.quotas_K.tolist())
        # Losses of this step's samples on this rank, with their indices in the global batch.
        self._losses: list[tuple[Tensor, np.ndarray]] = []
        self._corruption = {} if corruption is None else corruption

    def __call__(self, lr: float, stop_requested: bool = False, guided: bool = False) -> StepOutcome:
        """Run one global batch and step the optimizers with learning rate `lr`.

        Args:
            guided: whether the guide has a part in this step. The teacher is let go at the first step without it.

        Raises:
            TrainingError: on every rank, if the loss or the gradient norm is not finite. No optimizer has stepped.
            DataError: on every rank, if more than `max_bad` shards and samples are corrupt.
        """
        loss_sum_K = torch.zeros(len(self._quotas.quotas_K), dtype=torch.float64, device=self._env.device)
        guide_sum = torch.zeros(1, dtype=torch.float64, device=self._env.device)
        corruption: list[Corruption] = []
        self._losses.clear()
        self._guide = self._guide if guided else None
        for micro in self._feed.next_batch():
            self._quotas = self._batches.of(micro.batch).quotas
            corruption += micro.corruption
            self._env.progress.enter(COMPUTE)
            with self._compute_clock:
                self._forward_backward(micro, loss_sum_K, guide_sum)
        with self._optimizer_clock:
            # Everything that the ranks must agree on goes into one reduction, before any optimizer steps. So a loss
            # that is not finite stops all ranks at the same step, with the weights unchanged. Its result is the only
            # thing that the host waits for: until there it has only told the device what to do, and so it has after.
            quota_K: list[int] = self._quotas.quotas_K.tolist()
            turns = self.progress.turns(quota_K)
            agreement = self._engines.agreement(turns, self._batches.wants_squares)
            agreement.add("loss sum", loss_sum_K)
            if self._guide:
                agreement.add("guide sum", guide_sum)
            busy = self._engines.forward_clock.take()
            agreement.add_own("busy", busy, self._env.rank, self._env.world_size)
            agreement.add_own("memory", peak_bytes(self._env.device), self._env.rank, self._env.world_size)
            agreement.add("stop", float(stop_requested))
            agreement.add("corrupt", float(len(corruption)))
            self._env.progress.enter(REDUCE)
            gradients = self._engines.reduce(agreement)
            sums_and_quotas = zip(gradients.sums["loss sum"].tolist(), quota_K, strict=True)
            loss_per_stage = [total / quota if quota else None for total, quota in sums_and_quotas]
            self._check_finite(micro.batch, loss_per_stage, gradients)
            self._env.progress.enter(UPDATE)
            gradients.step(lr)
            self.progress.take(turns)
            squares = gradients.sums.get("decoder square sums")
            self._batches.observe(
                micro.batch, gradients.sums["loss sum"].tolist(), None if squares is None else squares.tolist()
            )
        waited = self._feed.take_seconds()
        return StepOutcome(
            loss=self._global_mean(loss_per_stage),
            loss_per_stage=loss_per_stage,
            samples_per_stage=quota_K,
            guide_loss=float(gradients.sums["guide sum"]) / self._batch_size if self._guide else None,
            grad_norm=float(gradients.norm),
            stop_requested=bool(gradients.sums["stop"] > 0),
            busy_W=gradients.sums["busy"].tolist(),
            memory_W=[int(peak) for peak in gradients.sums["memory"].tolist()],
            corruption=self._new_corruption(corruption) if gradients.sums["corrupt"] > 0 else [],
            seconds={
                "data": waited.data,
                "routing": waited.routing,
                "compute": self._compute_clock.take(),
                "optimizer": self._optimizer_clock.take(),
            },
        )

    def _forward_backward(self, micro: MicroBatch, loss_sum_K: Tensor, guide_sum: Tensor) -> None:
        if not micro.rows:
            self._engines.stand_by(projects=self._guide is not None)
            return
        importance_K = self._quotas.importance_K
        batch, index_n = self._prepare(micro), micro.samples.index_n

        def loss(k: int, output_nCHW: Tensor, rows: slice) -> Tensor:
            loss_n = self._objective.losses(output_nCHW, batch.noised, rows)
            loss_sum_K[k] += loss_n.detach().sum()
            self._losses.append((loss_n.detach(), index_n[rows]))
            return loss_n.sum() * (float(importance_K[k]) / self._batch_size)

        # Dropout layers draw from torch's generator, so it is seeded for each micro batch.
        torch.manual_seed(micro.drawn.module_seed)
        guided = self._alignment(self._guide, micro, batch, guide_sum) if self._guide else None
        self._engines.forward_backward(batch.inputs, micro.rows, loss, guided)

    def _alignment(self, guide: Guide, micro: MicroBatch, batch: PreparedBatch, guide_sum: Tensor) -> ProjectedLoss:
        """This rank's share of the guide's loss, whose samples weigh as in the objective. Adds to `guide_sum`."""
        weight_n = torch.empty(len(batch.x0_nCHW), device=self._env.device)
        for k, rows in micro.rows.items():
            weight_n[rows] = float(self._quotas.importance_K[k])

        def loss(projected_nDhw: Tensor) -> Tensor:
            weighted = (weight_n * guide.losses(projected_nDhw, batch.x0_nCHW)).sum()
            guide_sum.add_(weighted.detach())
            return weighted * (guide.config.weight / self._batch_size)

        return loss

    def _global_mean(self, loss_per_stage: list[float | None]) -> float:
        """The objective over the global batch, in which stages weigh as in the recipe, not as their rounded quotas."""
        parts = zip(self._quotas.importance_K, loss_per_stage, self._quotas.quotas_K, strict=True)
        return float(sum(w * mean * quota for w, mean, quota in parts if mean is not None)) / self._batch_size

    def _check_finite(self, batch: int, loss_per_stage: list[float | None], gradients: ReducedGradients) -> None:
        """Stop training if a loss or the gradient norm is not finite.

        Collective where it raises: the decision is made from sums that are the same on every rank, and only then do the
        ranks gather the names.

        Raises:
            TrainingError: on every rank, naming the samples with bad losses, or else the modules with bad gradients.
        """
        stages = [k for k, mean in enumerate(loss_per_stage) if mean is not None and not math.isfinite(mean)]
        if not stages and gradients.finite:
            return
        stopped = f"at step {batch + 1}; the weights are unchanged, and the last checkpoint remains"
        if not stages:
            modules = sorted(set(joined(self._engines.modules_with_bad_gradients())))
            raise TrainingError(f"the gradient norm is not finite (in {', '.join(modules)}) {stopped}")
        own = [i for loss_n, index_n in self._losses for i in index_n[~loss_n.isfinite().cpu().numpy()].tolist()]
        indices = set(joined(own))
        # A sample's loss is known to the rank that computes it, its key to the rank that read it.
        key_of = dict(joined(self._feed.keys_of(batch, indices).items()))
        keys = [key_of[i] for i in sorted(key_of)]
        more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
        raise TrainingError(
            f"the loss of stage {', '.join(map(str, stages))} is not finite {stopped}. "
            f"Samples: {', '.join(keys[:_KEYS_NAMED])}{more}"
        )

    def _new_corruption(self, own: list[Corruption]) -> list[Corruption]:
        """The corruption that some rank met in this step and none before. Collective.

        Raises:
            DataError: there is more than `max_bad` now.
        """
        new = {c.place: c for c in joined(own) if c.place not in self._corruption}
        for corruption in new.values():
            self._corruption[corruption.place] = corruption
            check_limit(len(self._corruption), self._max_bad, corruption)
        return list(new.values())
