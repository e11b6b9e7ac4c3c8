"""A recipe on a given number of ranks: batch size, quotas, costs and placement. Needs no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from msdiff_dist.apps.evaluation.during import check_evaluation
from msdiff_dist.apps.train.found_data import FoundData, find_data
from msdiff_dist.apps.train.guide import GuideCosts, guide_costs
from msdiff_dist.apps.train.latent_checks import check_latents
from msdiff_dist.apps.train.phases import Phase, phases
from msdiff_dist.bounds import check_between, check_bytes
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import StepLoader, check_first_samples
from msdiff_dist.diffusion.timestep_sampler import StageQuotas, stage_probabilities
from msdiff_dist.distributed.engine_costs import Workload
from msdiff_dist.distributed.placement import Placement, plan, plan_on
from msdiff_dist.distributed.precision import expected_precision
from msdiff_dist.distributed.topology import arrange
from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.flops import ModelCosts, costs
from msdiff_dist.models.xformers_attention import check_installation
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.adaptive_shares import AdaptiveBatches
from msdiff_dist.training.batch_plans import BatchPlan, BatchPlans, EqualBatches, OneStageBatches
from msdiff_dist.training.optimizer import OPTIMIZERS
from msdiff_dist.training.sinks import check_installed
from msdiff_dist.training.stage_ends import StageEnds

MOST_RANKS = 2**20
"""Ranks that a run may have."""
MOST_SAMPLES = 2**24
"""Samples that a step may have."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A recipe on a given number of ranks.

    Attributes:
        batch_size: samples per optimizer step.
        quotas: how many samples of each stage a batch has; if batches differ, in the mean.
        batches: the plan of every batch.
        gathering: stages whose decoders step on the gradients of several batches.
        costs: parameters and multiply-adds of the model.
        cost_K: what one sample of each stage costs in training, encoder and decoder: a third of the multiply-adds of
            forward and backward pass (`PartCost.step_macs`).
        placement: the stages of every rank, and its samples in every micro batch; if batches differ, in the likeliest.
        guide: what the guide costs besides; None without one.
    """

    batch_size: int
    quotas: StageQuotas
    batches: BatchPlans
    gathering: frozenset[int]
    costs: ModelCosts
    cost_K: list[int]
    placement: Placement
    guide: GuideCosts | None = None


def plan_run(recipe: Recipe, world_size: int, ranks_per_node: int | None = None) -> RunPlan:
    """Plan `recipe` on `world_size` ranks, `ranks_per_node` of which share a node (None: all).

    Raises:
        ConfigError: batch sizes contradict each other or are too small for the stages.
        PlacementError: the stages cannot be placed on so many ranks, or the recipe's placement does not fit them.
    """
    check_between("--world-size", world_size, 1, MOST_RANKS)
    batch_size = recipe.train.batch_size(world_size)
    _check_batch(recipe, batch_size, world_size)
    stages = recipe.freezing().stages
    quotas = StageQuotas(
        recipe.times(),
        recipe.partition(),
        recipe.stages.sampling,
        batch_size,
        stages,
        importance_weights=recipe.stages.importance_weights,
    )
    counted = recipe_costs(recipe)
    cost_K = counted.step_macs_K
    guide = guide_costs(recipe)
    placed_K = placed_costs(recipe, cost_K, guide)
    batches: BatchPlans
    if recipe.stages.batch == "one_stage":
        batches = _one_stage(recipe, quotas, placed_K, world_size)
        placement = batches.likeliest.placement
    else:
        explicit = None if recipe.parallel.placement == "auto" else recipe.parallel.placement
        micro_quotas = quotas.micro_quotas(recipe.train.gradient_accumulation_steps)
        placement = plan(micro_quotas, placed_K, world_size, explicit)
        if explicit is None and ranks_per_node is not None:
            placement = arrange(placement, ranks_per_node, [d.trained for d in counted.decoders])
        batches = EqualBatches(BatchPlan(quotas, placement))
        if adaptive := recipe.stages.adaptive:
            natural_K = stage_probabilities(recipe.times(), recipe.partition(), "uniform")
            accumulation = recipe.train.gradient_accumulation_steps
            batches = AdaptiveBatches(adaptive, quotas, natural_K, placement.stages_of_rank, cost_K, accumulation)
    return RunPlan(
        batch_size=batch_size,
        quotas=quotas,
        batches=batches,
        gathering=_gathering(recipe, quotas, batches),
        costs=counted,
        cost_K=cost_K,
        placement=placement,
        guide=guide,
    )


def _one_stage(recipe: Recipe, quotas: StageQuotas, cost_K: Sequence[int], world_size: int) -> OneStageBatches:
    """Batches of one stage each. Without a placement in the recipe every rank holds every stage that is drawn, so that
    no rank is without work.

    Raises:
        UserError: the batch is too small for the ranks, or ZeRO 3 would need ranks that have no work.
    """
    drawn, accumulation = np.flatnonzero(quotas.quotas_K).tolist(), recipe.train.gradient_accumulation_steps
    held = recipe.parallel.placement
    plans = {}
    for k in drawn:
        of_stage = quotas.of_stage(k)
        micro_quotas = of_stage.micro_quotas(accumulation)
        if held == "auto":
            placement = plan_on((tuple(drawn),) * world_size, micro_quotas, cost_K)
        else:
            plan(quotas.micro_quotas(1), cost_K, world_size, held)  # checks the recipe's lists
            placement = plan_on(tuple(tuple(sorted(of_rank)) for of_rank in held), micro_quotas, cost_K)
        if recipe.parallel.zero_shared == 3 and not placement.samples_AWK.any(axis=2).all():
            raise ConfigError(
                "parallel.zero_shared", 3, f"needs samples on every rank, and some have none in batches of stage {k}",
                "Choose 1 or 2, or write parallel.placement: auto.",
            )  # fmt: skip
        plans[k] = BatchPlan(of_stage, placement)
    return OneStageBatches(recipe.train.seed, quotas.share_K, plans)


def _gathering(recipe: Recipe, quotas: StageQuotas, batches: BatchPlans) -> frozenset[int]:
    """Stages that have fewer than `stages.min_samples_per_step` samples in some batch that has any of them.

    Raises:
        ConfigError: a decoder would never step.
    """
    wanted = recipe.stages.min_samples_per_step
    _check_decoders_step(wanted, _samples_in(recipe.train.steps, quotas, batches), recipe.train.steps)
    if recipe.stages.adaptive and wanted > 1:  # any stage may come to have fewer
        return frozenset(np.flatnonzero(quotas.quotas_K).tolist())
    every = [plan.quotas.quotas_K for plan in batches.every]
    return frozenset(k for quotas_K in every for k, n in enumerate(quotas_K.tolist()) if 0 < n < wanted)


def _samples_in(steps: int, quotas: StageQuotas, batches: BatchPlans) -> np.ndarray:
    """About how many samples each stage has in so many steps, [K]."""
    of_batch_K: np.ndarray = quotas.share_K * quotas.quotas_K.sum() if batches.changes else quotas.quotas_K
    return of_batch_K * steps


def _check_decoders_step(wanted: int, samples_K: np.ndarray, steps: int) -> None:
    """Refuse stages that have samples, but fewer in the run than their decoders gather for one step."""
    for k in np.flatnonzero((samples_K > 0) & (samples_K < wanted)).tolist():
        raise ConfigError(
            "stages.min_samples_per_step", wanted,
            f"stage {k} gets about {samples_K[k]:.0f} samples in {steps} steps: its decoder would never step",
            f"Use at most {max(1, int(samples_K[k]))}; a few hundred are enough.",
        )  # fmt: skip


def placed_costs(recipe: Recipe, cost_K: list[int], guide: GuideCosts | None) -> list[int]:
    """What one sample of each stage costs in the mean step of the run, which the placement balances."""
    if guide is None:
        return cost_K
    mean = guide.step_macs * guide.last_step // recipe.train.steps  # samples of all stages pass the guide alike
    return [cost + mean for cost in cost_K]


def plan_phases(
    recipe: Recipe, world_size: int, ranks_per_node: int | None = None, ends: StageEnds | None = None
) -> list[tuple[Phase, RunPlan]]:
    """The phases of a run, each planned as `plan_run` does.

    Args:
        ends: what was decided of the stages' ends so far; None: nothing.

    Raises:
        UserError: as `plan_run`, or a decoder would never step between the changes of stages that the recipe fixes.
    """
    planned = [(phase, plan_run(phase.recipe, world_size, ranks_per_node)) for phase in phases(recipe, ends)]
    wanted, K = recipe.stages.min_samples_per_step, recipe.stages.num_stages
    # With `ends` the run has begun, and stages may have ended by their held-out loss however few samples they had.
    if wanted > 1 and ends is None and len(planned) > 1:
        of_stages = [(phase, run) for phase, run in planned if phase.recipe.stages.num_stages == K]
        each = [_samples_in(phase.last - phase.first + 1, run.quotas, run.batches) for phase, run in of_stages]
        _check_decoders_step(wanted, np.sum(each, axis=0), recipe.train.steps)
    return planned


def _check_batch(recipe: Recipe, batch_size: int, world_size: int) -> None:
    """Refuse a batch that no rank could read: each reads its share of a step's samples at once."""
    size = "global" if recipe.train.micro_batch_size is None else "micro"
    field, value = f"train.{size}_batch_size", getattr(recipe.train, f"{size}_batch_size")
    share = -(-batch_size // world_size) * recipe.data.sample_bytes
    check_bytes(field, value, share, f"what a rank reads for one of {world_size} shares of a step")
    # Every rank knows of every sample its stage, time, micro batch and rank, each a number of 64 bits.
    if batch_size > MOST_SAMPLES:
        problem = (
            f"makes a step of {batch_size:,} samples, whose numbers take {batch_size / 2**24:,.0f} GiB on every rank"
        )
        raise ConfigError(field, value, problem, f"Use at most {MOST_SAMPLES:,} samples a step.")
    check_between("train.steps", recipe.train.steps, 1, 2**62 // batch_size)  # samples of the stream are numbered


def model_costs(recipe: Recipe, model: ModelConfig) -> ModelCosts:
    """Parameters and multiply-adds of `model` on the recipe's latents and context."""
    _, height, width = recipe.latent_shape
    tokens = recipe.data.context_shape[0] if recipe.data.context_shape else 1
    return costs(model, (height, width), tokens, recipe.train.freeze)


def recipe_costs(recipe: Recipe) -> ModelCosts:
    """Parameters and multiply-adds of the recipe's model on its latents and context."""
    counted = model_costs(recipe, recipe.model)
    # What the others cost does not depend on which stages have ended.
    decoders = [replace(d, trained=0) if k in recipe.stages.ended else d for k, d in enumerate(counted.decoders)]
    return replace(counted, decoders=tuple(decoders))


def workload(recipe: Recipe, run_plan: RunPlan, on_gpus: bool) -> Workload:
    """The workload of a recipe for a plan report. Without `on_gpus` it trains on CPUs like this one."""
    data, optimizer = recipe.data, recipe.optimizer
    payload = int(np.prod(data.x_shape)) * getattr(torch, data.x_dtype).itemsize
    if data.num_classes is not None:
        payload += 8  # an int64 label
    if data.context_shape is not None:
        payload += int(np.prod(data.context_shape)) * getattr(torch, data.latent_dtype).itemsize
    return Workload(
        cost_K=placed_costs(recipe, run_plan.cost_K, run_plan.guide),
        shared_params=run_plan.costs.encoder.params + (run_plan.guide.params if run_plan.guide else 0),
        stage_params_K=[d.params for d in run_plan.costs.decoders],
        shared_frozen=run_plan.costs.encoder.params - run_plan.costs.encoder.trained,
        stage_frozen_K=[d.params - d.trained for d in run_plan.costs.decoders],
        payload_bytes=payload,
        precision=expected_precision(recipe.train.precision, on_gpus),
        zero_shared=recipe.parallel.zero_shared,
        zero_decoders=recipe.parallel.zero_decoders,
        moments=OPTIMIZERS[optimizer.name].moments(optimizer),
        averages=1 + (len(recipe.ema.power.lengths) if recipe.ema.power else 0),
        latent_values=int(np.prod(recipe.latent_shape)),
        channels_last=channels_last(recipe, on_gpus),
        tf32=recipe.train.tf32,
        on_gpus=on_gpus,
        gathering=run_plan.gathering,
    )


def channels_last(recipe: Recipe, on_gpus: bool) -> bool:
    """Whether the network's activations have the channels of a pixel side by side."""
    asked = recipe.train.channels_last
    return on_gpus if asked is None else asked


def plan_warnings(recipe: Recipe, world_size: int) -> list[str]:
    """Faults of a recipe on `world_size` ranks that do not prevent a plan, but that `check_run` refuses."""
    lanes, warnings = recipe.data.lanes, list[str]()
    if lanes % world_size:
        warnings.append(
            f"data.lanes = {lanes} cannot be shared evenly by {world_size} ranks: to train, make it a multiple"
        )
    if recipe.stages.adaptive:
        warnings.append("stages.adaptive: samples, load and bytes are those of the first shares, which will change")
    return warnings


def check_run(
    recipe: Recipe,
    world_sizes: Sequence[int],
    find: Callable[[DataConfig], FoundData] = find_data,
    *,
    device_type: str | None,
) -> FoundData:
    """Check all that can be checked before any rank starts: placement, attention backend, metric sinks, what
    evaluations need, and of the data lanes, shards, manifests and first samples.

    Args:
        world_sizes: the numbers of ranks on which the run may start.
        device_type: what the ranks compute on, with what is installed here; None: it is not known what they have.
        find: reads the data, or returns what it has read before.

    Returns:
        The data.

    Raises:
        UserError: a check failed.
    """
    if recipe.model.attention_backend == "xformers" and device_type is not None:
        check_installation(device_type)
    if device_type is not None:
        check_installed(recipe.metrics)
        if recipe.evaluation.every:
            check_evaluation(recipe.evaluation, recipe.reference_images())
    batch_sizes = {size: plan_phases(recipe, size)[0][1].batch_size for size in world_sizes}
    return check_data(recipe, batch_sizes, find)


def check_data(
    recipe: Recipe, batch_sizes: Mapping[int, int], find: Callable[[DataConfig], FoundData] = find_data
) -> FoundData:
    """Check shards, manifests, lanes and the first sample of each source.

    Args:
        batch_sizes: samples per step, by number of ranks; the lanes must be dealt evenly to each of these.
        find: reads the data, or returns what it has read before.

    Returns:
        The data.

    Raises:
        UserError: what training would refuse at its start or at its first sample.
    """
    found = find(recipe.data)
    check_latents(recipe, found.manifests)
    for world_size, batch_size in batch_sizes.items():
        StepLoader(recipe.data, recipe.train.seed, batch_size, 0, world_size, index=found.shards)
    check_first_samples(recipe.data, recipe.train.seed, found.shards)
    return found


def look_at_data(recipe: Recipe, world_size: int) -> FoundData:
    """The data of a recipe, checked as `check_run` does; that its lanes fit the ranks is a matter of `plan_warnings`.

    Raises:
        UserError: the recipe cannot be planned, or what training would refuse of its data.
    """
    batch_size = plan_run(recipe, world_size).batch_size
    try:
        return check_data(recipe, {world_size: batch_size} if recipe.data.lanes % world_size == 0 else {})
    except UserError as e:
        remedy = f"{e.remedy} On a machine without the data, plan with --no-data."
        raise type(e)(e.field, e.value, e.problem, remedy) from None
