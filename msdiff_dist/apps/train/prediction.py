"""What a recipe will need on a given number of ranks: memory of every rank, and on a known GPU whether it fits and how
long a step takes. Needs no device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from msdiff_dist.apps.train.guide import guide_fields
from msdiff_dist.apps.train.phases import phases
from msdiff_dist.apps.train.plan import channels_last, plan_phases, plan_run, plan_warnings, workload
from msdiff_dist.distributed.engine_costs import Workload
from msdiff_dist.distributed.gpus import Gpu
from msdiff_dist.distributed.memory import rank_bytes_W
from msdiff_dist.distributed.placement import GOOD_BALANCE
from msdiff_dist.distributed.plan_report import plan_report
from msdiff_dist.distributed.precision import expected_precision
from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.models.trace import ModelTrace, trace_model
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.batch_plans import OneStageBatches

_MOST_ACCUMULATED = 64  # micro batches of a step that a remedy may propose
_MOST_RANKS = 16  # times the ranks that a remedy may propose


def predict(
    recipe: Recipe,
    world_size: int,
    *,
    on_gpus: bool,
    ranks_per_node: int | None = None,
    gpu: Gpu | None = None,
) -> dict[str, Any]:
    """The report of `plan_report` for a recipe, with its learning rate `lr` before the schedule and the costs of its
    `guide` (None: none).

    It is that of the recipe's stages, of which none has ended by `stages.end`. `phases` has one for each phase of the
    run, as far as the recipe fixes them, with its `first` and `last` step and what it trains (`about`); it is empty for
    a run of one phase.

    With `gpu`, also `largest_micro_batch`: the largest mean number of samples per rank in a micro batch that fits (0:
    none does); and if the recipe does not fit, `gpu.remedies`: changes with which it does. All phases must fit.

    Args:
        on_gpus: training on GPUs, or else on CPUs like this one.
        ranks_per_node: ranks that share a node; None: all.

    Raises:
        UserError: the recipe cannot be planned, or the GPU does not compute in its precision.
    """
    on_gpus = on_gpus or gpu is not None
    recipe = _with_precision(recipe, on_gpus, gpu)
    report = _report(recipe, world_size, on_gpus, ranks_per_node, gpu)
    known = phases(recipe)
    report["phases"] = [
        {"first": phase.first, "last": phase.last, "about": phase.about}
        | _report(phase.recipe, world_size, on_gpus, ranks_per_node, gpu)
        for phase in (known if len(known) > 1 else ())
    ]
    if gpu is not None:
        report["gpu"]["fits"] = all(of_phase["gpu"]["fits"] for of_phase in [report, *report["phases"]])
        report["largest_micro_batch"] = largest_micro_batch(recipe, world_size, gpu)
        if not report["gpu"]["fits"]:
            report["gpu"]["remedies"] = list(_remedies(recipe, world_size, gpu))
    return report


def _report(
    recipe: Recipe, world_size: int, on_gpus: bool, ranks_per_node: int | None, gpu: Gpu | None
) -> dict[str, Any]:
    """The report of a recipe that trains the same in all steps."""
    run = plan_run(recipe, world_size, ranks_per_node)
    load, trace = workload(recipe, run, on_gpus), model_trace(recipe, on_gpus)
    report = plan_report(
        run.placement,
        load,
        trace,
        warnings=plan_warnings(recipe, world_size),
        ranks_per_node=ranks_per_node,
        gpu=gpu,
    )
    if isinstance(run.batches, OneStageBatches):
        _show_one_stage(report, run.batches, load, trace)
    report["lr"], report["lr_per"] = recipe.optimizer.rate(run.batch_size), recipe.optimizer.lr_per
    report["guide"] = None if run.guide is None else guide_fields(run.guide)
    return report


def _show_one_stage(report: dict[str, Any], batches: OneStageBatches, load: Workload, trace: ModelTrace) -> None:
    """Give the report of batches of the likeliest stage the highest peak of all batches, and their expected balance."""
    for plan in batches.every:
        for rank, needed in zip(report["ranks"], rank_bytes_W(plan.placement, load, trace), strict=True):
            rank["peak_bytes"] = max(rank["peak_bytes"], needed.fields(), key=lambda fields: fields["total"])
    if "gpu" in report:
        most = max(rank["peak_bytes"]["total"] for rank in report["ranks"])
        report["gpu"]["fits"] = most <= report["gpu"]["usable_bytes"]
    report["balance"] = balance = batches.balance(load.cost_K)
    stage = int(batches.share_K.argmax())
    report["warnings"].append(
        f"stages.batch = one_stage: samples, load and bytes are those of batches of stage {stage}, "
        f"{batches.share_K[stage]:.1%} of all; peak and balance are those of all batches"
    )
    if balance < GOOD_BALANCE:
        report["warnings"].append(
            f"ranks without the stage of a batch have nothing to compute: {balance:.1%} of the ranks' time is used. "
            "parallel.placement: auto gives every rank every stage"
        )


def model_trace(recipe: Recipe, on_gpus: bool) -> ModelTrace:
    """What the recipe's model allocates and computes in its precision, which must be known."""
    _, height, width = recipe.latent_shape
    tokens = recipe.data.context_shape[0] if recipe.data.context_shape else 1
    return trace_model(
        recipe.model,
        (height, width),
        tokens,
        torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
        recipe.activation_checkpointing,
        on_gpus=on_gpus,
        channels_last=channels_last(recipe, on_gpus),
        freeze=recipe.train.freeze,
    )


def largest_micro_batch(recipe: Recipe, world_size: int, gpu: Gpu) -> int:
    """The largest `train.micro_batch_size` that fits every rank; 0 if none does."""

    def fits(size: int) -> bool:
        return _fits(
            _changed(recipe, {"train.micro_batch_size": size, "train.global_batch_size": None}), world_size, gpu
        )

    # A batch may also be too small for its stages, so the search begins at the recipe's own size.
    accumulated = world_size * recipe.train.gradient_accumulation_steps
    low, high = 0, max(1, recipe.train.batch_size(world_size) // accumulated)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _remedies(recipe: Recipe, world_size: int, gpu: Gpu) -> Iterator[str]:
    """Changes of the recipe, or of the number of ranks, with which it fits."""
    batch_size = recipe.train.batch_size(world_size)
    for times in (2**i for i in range(1, _MOST_ACCUMULATED.bit_length())):
        accumulation = times * recipe.train.gradient_accumulation_steps
        changes = {
            "train.micro_batch_size": None,
            "train.global_batch_size": batch_size,
            "train.gradient_accumulation_steps": accumulation,
        }
        if accumulation <= _MOST_ACCUMULATED and _fits(_changed(recipe, changes), world_size, gpu):
            yield _words(changes)
            break
    others: list[dict[str, Any]] = [
        {"train.precision": "bf16"},
        {"activation_checkpointing.encoder": True, "activation_checkpointing.decoders": True},
        {"parallel.zero_shared": 3, "parallel.zero_decoders": 2},
    ]
    for changes in others:
        changed = _changed(recipe, changes)
        computes = gpu.tflops or changes.get("train.precision") != "bf16"
        if changed != recipe and computes and _fits(changed, world_size, gpu):
            yield _words(changes)
    for times in (2**i for i in range(1, _MOST_RANKS.bit_length())):
        if _fits(recipe, times * world_size, gpu):
            yield f"{times * world_size} ranks"
            break


def _fits(recipe: Recipe | None, world_size: int, gpu: Gpu) -> bool:
    """Whether every rank has the memory, in every phase; False for what is no recipe or cannot be planned."""
    if recipe is None:
        return False
    try:
        planned = [(phase.recipe, run) for phase, run in plan_phases(recipe, world_size)]
    except UserError:
        return False
    of_ranks = [
        of_rank
        for trained, run in planned
        for plan in run.batches.every
        for of_rank in rank_bytes_W(plan.placement, workload(trained, run, True), model_trace(trained, True))
    ]
    return max(of_rank.total for of_rank in of_ranks) <= gpu.usable_bytes


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe | None:
    """The recipe with other values of some `section.field`; None if that makes no sense."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    try:
        # All fields of a section at once: each change alone may contradict what it was.
        changed = {section: dataclasses.replace(getattr(recipe, section), **sections[section]) for section in sections}
        return dataclasses.replace(recipe, **changed)
    except ConfigError:
        return None


def _words(changes: Mapping[str, Any]) -> str:
    """Changes as the command line takes them."""
    return " ".join(f"{name}={'null' if value is None else str(value).lower()}" for name, value in changes.items())


def _with_precision(recipe: Recipe, on_gpus: bool, gpu: Gpu | None) -> Recipe:
    """The recipe with the precision in which it will be computed."""
    asked = recipe.train.precision
    if gpu is not None and not gpu.tflops:
        if asked == "bf16":
            raise ConfigError("train.precision", asked, f"{gpu.name} does not compute bf16", "Use fp32 or auto.")
        asked = "fp32"
    precision = expected_precision(asked, on_gpus)
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision=precision))
