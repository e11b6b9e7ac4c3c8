"""Where a run goes on: its newest checkpoint, the phase after it, and that phase's plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from msdiff_dist.apps.train.costs import guide_petaflops, model_petaflops_after, samples_petaflops, step_petaflops
from msdiff_dist.apps.train.guide import build_projection
from msdiff_dist.apps.train.phases import Phase, Restart, first_shapes
from msdiff_dist.apps.train.plan import RunPlan, plan_phases
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.resume import open_newest_intact
from msdiff_dist.distributed.agree import from_rank_0, on_every_rank
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.progress import FIND, PLACE
from msdiff_dist.models.freezing import parameter_shapes
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class PhaseStart:
    """What a trainer begins with.

    Attributes:
        restart: the phase to train.
        reader: the checkpoint to restore; None: the run begins.
        plan: of the phase.
        counts_stages: whether checkpoints keep the samples and steps of every stage.
        notes: lines for the user about the checkpoint.
    """

    restart: Restart
    reader: CheckpointReader | None
    plan: RunPlan
    counts_stages: bool
    notes: list[str]
    _planned: Sequence[tuple[Phase, RunPlan]]

    @property
    def step_petaflops(self) -> float:
        """1e15 floating-point operations of a step of the whole job without the guide; if steps differ, in the mean."""
        return step_petaflops(self.plan.quotas, self.plan.cost_K)

    def petaflops(self, step: int, samples_K: Sequence[int]) -> float:
        """1e15 floating-point operations of all steps up to `step`, which is one of the phase.

        Args:
            samples_K: samples of each stage so far, as `StageProgress` counts them.
        """
        guide = guide_petaflops(self.plan.guide, self.plan.batch_size, step)
        if not self.plan.batches.changes:
            return model_petaflops_after(self._planned, step) + guide
        # What a sample of a stage costs changes only when the run grows. Up to there the counters are what equal
        # batches of the first stages would have had.
        grown = next(
            i for i, (phase, _) in enumerate(self._planned) if phase.recipe.stages.num_stages == len(samples_K)
        )
        began, first = self._planned[grown][0].first - 1, self._planned[grown][1]
        before = model_petaflops_after(self._planned, began) - began * step_petaflops(first.quotas, first.cost_K)
        return before + samples_petaflops(samples_K, self.plan.cost_K) + guide


def phase_start(run: Recipe, folder: RunFolder, env: Environment) -> PhaseStart:
    """Find the newest intact checkpoint of a run, and plan what follows it. Collective.

    Raises:
        UserError: on every rank, if the recipe cannot be planned in one of its phases, or the checkpoint does not fit.
    """
    env.progress.enter(PLACE)
    per_node = _ranks_per_node()
    # Every phase that is known, so that a run begins only if it can also go on.
    planned = on_every_rank(lambda: plan_phases(run, env.world_size, per_node))
    env.progress.enter(FIND)
    plan, beside = planned[0][1], _beside_the_model(run, planned[0][1])
    shapes, before = ({**of_model, **beside} for of_model in (parameter_shapes(run.model), first_shapes(run)))
    reader, notes = open_newest_intact(folder.checkpoints, shapes, plan.batch_size, before)
    restart = on_every_rank(lambda: Restart(run, reader.index if reader else None))
    env.progress.enter(PLACE)
    if restart.ends.ended:
        planned = on_every_rank(lambda: plan_phases(run, env.world_size, per_node, restart.ends))
    plan = next(plan for phase, plan in reversed(planned) if phase.first <= restart.step + 1)
    # A decoder that has gathered gradients goes on with them, even if its stage now has more samples.
    alike = [p.gathering for phase, p in planned if phase.recipe.stages.num_stages == restart.recipe.stages.num_stages]
    gathering = frozenset[int]().union(*alike) & set(restart.recipe.freezing().stages)
    return PhaseStart(
        restart=restart,
        reader=reader,
        plan=replace(plan, gathering=gathering),
        counts_stages=plan.batches.changes or bool(gathering) or bool(reader and reader.index.stages),
        notes=notes,
        _planned=planned,
    )


def _beside_the_model(run: Recipe, plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Shapes of the guide's parameters, which checkpoints hold too, by name."""
    with torch.device("meta"):
        projection = build_projection(run, plan.guide)
    if projection is None:
        return {}
    return {projection.prefix + name: tuple(p.shape) for name, p in projection.module.named_parameters()}


def _ranks_per_node() -> int | None:
    """Number of ranks on rank 0's node, None if the launcher does not set it. Collective."""
    count = from_rank_0(os.environ.get("LOCAL_WORLD_SIZE"))  # rank 0's, so that every rank makes the same plan
    return int(count) if count else None
