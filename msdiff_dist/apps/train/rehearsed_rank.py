"""One rank of a rehearsal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from msdiff_dist.apps.train.guide import blank_projection
from msdiff_dist.apps.train.parts import build_engines, build_feed, build_preparation
from msdiff_dist.apps.train.plan import RunPlan
from msdiff_dist.apps.train.rehearsal_report import (
    AGREEMENT,
    END,
    FIRST_STEP,
    START,
    STEP,
    RehearsedRank,
)
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.step_samples import StepSamples
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.distributed.agree import Agreement
from msdiff_dist.distributed.collective_trace import CollectiveTrace, fake_process_group
from msdiff_dist.distributed.engines import ProjectedLoss, ReducedGradients, StageLoss, StageParallelEngines
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.groups import make_groups
from msdiff_dist.models.activation_checkpointing import checkpoint_activations
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.guide import Guide
from msdiff_dist.training.step import TrainStep


def rehearse_rank(recipe: Recipe, plan: RunPlan, rank: int) -> RehearsedRank:
    """Be rank `rank` of the planned run: start, and take two steps. The first may differ from all others.

    Args:
        recipe: its precision must not be `auto`.
    """
    world_size, device = plan.placement.world_size, torch.device("cpu")
    held = plan.placement.stages_of_rank[rank]
    with fake_process_group(rank, world_size), CollectiveTrace() as trace:
        env = Environment(rank=rank, local_rank=0, world_size=world_size, device=device)
        trace.phase = START
        groups = make_groups(plan.placement.stages_of_rank, rank)
        shared, stages = _blank_parts(recipe, held)
        engines = build_engines(recipe, plan, shared, stages, groups, device, blank_projection(recipe, plan.guide))
        _make_light(engines, _small_size(recipe), trace)
        objective = Objective(recipe.process(), recipe.train.loss, recipe.times())
        reader = _BlankReader(recipe.data, plan.batch_size, rank, world_size)
        feed = build_feed(recipe, plan, reader, groups, env, start_batch=0)
        prepare = build_preparation(recipe, objective, None, env)
        # The teacher is never asked: the engines compute another loss.
        guide = None if recipe.guide is None else Guide(config=recipe.guide, teacher=lambda x0: x0)
        step = TrainStep(feed, prepare, objective, engines, plan.batches, env, max_bad=0, guide=guide)
        for trace.phase in (FIRST_STEP, STEP):
            step(lr=recipe.optimizer.rate(plan.batch_size), guided=guide is not None)
        trace.phase = END
        feed.close()
        named = groups.named()
        return RehearsedRank(
            rank=rank,
            groups={group.group_name: title for title, group in named.items()},
            sizes={title: group.size() for title, group in named.items()},
            calls=trace.calls,
        )


def _blank_parts(recipe: Recipe, held: Sequence[int]) -> tuple[nn.Module, dict[int, nn.Module]]:
    """The shared part and the held stages in their whole size, with weights of zeros: drawing them takes long."""
    with torch.device("meta"):
        shared, stages = build_parts(recipe.model, held)
    recipe.freezing().apply(shared, stages)
    for part in (shared, *stages.values()):
        part.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in itertools.chain(part.parameters(), part.buffers()):
                tensor.zero_()
        checkpoint_activations(part, recipe.activation_checkpointing)
    return shared, stages


def _make_light(engines: StageParallelEngines, size: tuple[int, int], trace: CollectiveTrace) -> None:
    """Let the engines compute one sample of each held stage, cut to `size`, and mark the step's reduction in the trace:
    it shares the process group of all ranks with the shared part."""
    forward_backward: Callable[..., None] = engines.forward_backward
    reduce: Callable[[Agreement], ReducedGradients] = engines.reduce
    height, width = size

    def small(
        inputs: Sequence[Tensor | None],
        rows: Mapping[int, slice],
        loss: StageLoss,
        projected_loss: ProjectedLoss | None = None,
    ) -> None:
        chosen = [of_stage.start for of_stage in rows.values()]
        one_each = {k: slice(i, i + 1) for i, k in enumerate(rows)}
        cut = [None if t is None else t[chosen][..., :height, :width] if t.ndim == 4 else t[chosen] for t in inputs]
        projected = (lambda features: features.float().square().mean()) if projected_loss else None
        forward_backward(cut, one_each, lambda k, output, rows: output.float().square().mean(), projected)

    def marked(agreement: Agreement) -> ReducedGradients:
        with trace.labelled(AGREEMENT):
            return reduce(agreement)

    engines.forward_backward, engines.reduce = small, marked  # type: ignore[method-assign]


def _small_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of small latents: two positions at the lowest level."""
    _, height, width = recipe.latent_shape
    smallest = 2 ** len(recipe.model.channel_mult)
    return min(height, smallest), min(width, smallest)


class _BlankReader:
    """Reads samples of zeros in the shapes and types of a data set. The ranks take turns, as lanes do."""

    def __init__(self, config: DataConfig, batch_size: int, rank: int, world_size: int) -> None:
        self._config, self._batch_size, self._rank, self._world_size = config, batch_size, rank, world_size
        self._batches = itertools.count()

    def open(self) -> None:
        return

    def source_rank(self, batch: int) -> np.ndarray:
        return np.arange(batch * self._batch_size, (batch + 1) * self._batch_size) % self._world_size

    def __next__(self) -> StepSamples:
        config, batch = self._config, next(self._batches)
        index_n = np.flatnonzero(self.source_rank(batch) == self._rank)

        def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
            return torch.zeros((len(index_n), *shape), dtype=getattr(torch, dtype))

        return StepSamples(
            batch=batch,
            index_n=index_n,
            x_nCHW=zeros(config.x_shape, config.x_dtype),
            label_n=None if config.num_classes is None else zeros((), "int64"),
            context_nTC=None if config.context_shape is None else zeros(config.context_shape, config.latent_dtype),
            captions=None,
            keys=[str(i) for i in index_n],
        )

    def close(self) -> None:
        return
