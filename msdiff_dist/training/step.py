"""One optimizer step: micro batches through the engines, one reduction of everything the ranks must agree on."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.corruption import Corruption, check_limit
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.distributed.agree import gathered
from msdiff_dist.distributed.engines import ReducedGradients, StageParallelEngines
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.errors import TrainingError
from msdiff_dist.randomness import module_seed
from msdiff_dist.training.feed import Feed, MicroBatch
from msdiff_dist.training.metrics import StepOutcome
from msdiff_dist.training.prepare import Preparation

_KEYS_NAMED = 8


class TrainStep:
    """Takes micro batches from a feed and moves the engines by one optimizer step.

    Args:
        prepare: from a micro batch to the network's inputs.
        max_bad: corrupt shards and samples that all ranks together may leave out.
    """

    def __init__(
        self,
        feed: Feed,
        prepare: Preparation,
        objective: Objective,
        engines: StageParallelEngines,
        quotas: StageQuotas,
        environment: Environment,
        *,
        seed: int,
        max_bad: int,
    ) -> None:
        self._feed, self._prepare, self._objective, self._engines = feed, prepare, objective, engines
        self._env, self._seed, self._max_bad = environment, seed, max_bad
        self._quota_K, self._importance_K = quotas.quotas_K, quotas.importance_K
        self._batch_size = int(quotas.quotas_K.sum())
        self._losses: list[tuple[Tensor, np.ndarray]] = []  # of the step's samples here, with their indices
        self._corruption: dict[tuple[str, str | None], Corruption] = {}

    def __call__(self, lr: float, stop_requested: bool = False) -> StepOutcome:
        """Run one global batch and step the optimizers with learning rate `lr`.

        Raises:
            TrainingError: on every rank alike, when the loss or the gradient norm is not finite.
            DataError: on every rank alike, when more is corrupt than may be.
        """
        loss_sum_K = torch.zeros(len(self._quota_K), dtype=torch.float64, device=self._env.device)
        corruption: list[Corruption] = []
        self._losses.clear()
        compute = 0.0
        for micro in self._feed.next_batch():
            corruption += micro.corruption
            start = time.perf_counter()
            self._forward_backward(micro, loss_sum_K)
            _synchronize(self._env.device)
            compute += time.perf_counter() - start
        start = time.perf_counter()
        # Everything the ranks must agree on goes into one reduction, before any optimizer steps: a loss that is not
        # finite then stops all ranks at the same step, with weights as they were.
        agreement = self._engines.agreement()
        agreement.add("loss sum", loss_sum_K)
        busy = self._engines.forward_clock.take()
        agreement.add_own("busy", busy, self._env.rank, self._env.world_size)
        agreement.add("stop", float(stop_requested))
        agreement.add("damaged", float(len(corruption)))
        gradients = self._engines.reduce(agreement)
        loss_per_stage = (gradients.sums["loss sum"] / torch.from_numpy(self._quota_K)).tolist()
        self._check_finite(micro.batch, loss_per_stage, gradients)
        gradients.step(lr)
        _synchronize(self._env.device)
        waited = self._feed.take_seconds()
        seconds = {"data": waited.data, "routing": waited.routing, "compute": compute}
        return StepOutcome(
            loss=self._global_mean(loss_per_stage),
            loss_per_stage=loss_per_stage,
            grad_norm=float(gradients.norm),
            stop_requested=bool(gradients.sums["stop"] > 0),
            busy_W=gradients.sums["busy"].tolist(),
            corruption=self._new_corruption(corruption) if gradients.sums["damaged"] > 0 else [],
            seconds={**seconds, "optimizer": time.perf_counter() - start},
        )

    def _forward_backward(self, micro: MicroBatch, loss_sum_K: Tensor) -> None:
        batch, index_n = self._prepare(micro), micro.samples.index_n

        def loss(k: int, output_nCHW: Tensor, rows: slice) -> Tensor:
            loss_n = self._objective.losses(output_nCHW, batch.noised, rows)
            loss_sum_K[k] += loss_n.detach().sum()
            self._losses.append((loss_n.detach(), index_n[rows]))
            return loss_n.sum() * (float(self._importance_K[k]) / self._batch_size)

        torch.manual_seed(module_seed(self._seed, micro.batch, int(index_n[0])))
        self._engines.forward_backward(batch.inputs, micro.rows, loss)

    def _global_mean(self, loss_per_stage: list[float]) -> float:
        """The objective over the global batch: stages weigh as in the objective, not as their rounded quotas."""
        parts = zip(self._importance_K, loss_per_stage, self._quota_K, strict=True)
        return float(sum(w * mean * quota for w, mean, quota in parts)) / self._batch_size

    def _check_finite(self, batch: int, loss_per_stage: list[float], gradients: ReducedGradients) -> None:
        """Refuse what is not finite, naming the samples of bad stages, or else the parts of bad gradients. Collective.

        Raises:
            TrainingError: on every rank alike.
        """
        stages = [k for k, mean in enumerate(loss_per_stage) if not math.isfinite(mean)]
        if not stages and gradients.norm.isfinite():
            return
        left_alone = f"at step {batch + 1}; the weights were left alone, and the last checkpoint stands"
        if not stages:
            modules = sorted({m for rank in gathered(self._engines.modules_with_bad_gradients()) for m in rank})
            raise TrainingError(f"the gradient norm is not finite (in {', '.join(modules)}) {left_alone}")
        own = [i for loss_n, index_n in self._losses for i in index_n[~loss_n.isfinite().cpu().numpy()].tolist()]
        indices = {i for rank in gathered(own) for i in rank}
        key_of = {i: key for rank in gathered(self._feed.keys_of(batch, indices)) for i, key in rank.items()}
        keys = [key_of[i] for i in sorted(key_of)]
        more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
        raise TrainingError(
            f"the loss of stage {', '.join(map(str, stages))} is not finite {left_alone}. "
            f"Samples: {', '.join(keys[:_KEYS_NAMED])}{more}"
        )

    def _new_corruption(self, own: list[Corruption]) -> list[Corruption]:
        """What the ranks met in this step and none had met before. Collective."""
        new = {d.place: d for rank in gathered(own) for d in rank if d.place not in self._corruption}
        for corruption in new.values():
            self._corruption[corruption.place] = corruption
            check_limit(len(self._corruption), self._max_bad, corruption)
        return list(new.values())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
