"""The probe runs: a unified model, a deeper one, and models with a decoder for each fifth of training's times.

All spend the same compute. What differs between them tells how the held-out loss of each noise interval depends on
width, depth and a decoder of its own; how it falls inside each run tells how it depends on samples. Where all decoders
are to be as wide as the encoder, two of them tell all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msdiff_dist.apps.train.costs import step_petaflops
from msdiff_dist.apps.train.found_data import DataFinder, FoundData
from msdiff_dist.apps.train.local import run_local
from msdiff_dist.apps.train.plan import check_run, plan_run
from msdiff_dist.checkpoint.policy import CheckpointConfig
from msdiff_dist.config import to_mapping
from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import ConfigError, RunFolderError, TrainingError, UserError
from msdiff_dist.evaluation.held_out_loss import BINS, ValidationConfig
from msdiff_dist.models.unet_config import UNetConfig
from msdiff_dist.recipe import Recipe, comparable_mapping, recipe_mapping
from msdiff_dist.stage_division.loss_laws import Measurements
from msdiff_dist.training.run_folder import RunFolder

INTERVALS = 5
"""Stages of a probe with several: each serves a fifth of training's times."""
LEAST_STEPS = 60
"""Steps that a probe needs: fewer show hardly more than the warm-up."""
VALIDATIONS = 12
"""Held-out losses that are taken over a probe."""
EVALUATIONS = 1024
"""Evaluations of one held-out loss."""
_FIRST_USED = 0.3  # of the steps; before, the loss falls faster than any power law


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A run to measure with.

    width, depth: of its decoders, relative to the recipe's. intervals: its number of stages. quotas_K: samples of each
    stage in a batch.
    """

    name: str
    recipe: Recipe
    folder: Path
    width: float
    depth: float
    intervals: int
    quotas_K: tuple[int, ...]
    petaflops: float
    data: FoundData

    def measured(self) -> list[dict[str, Any]]:
        """The lines of its metrics that have a held-out loss."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if line.get("validation")]

    @property
    def complete(self) -> bool:
        measured = self.measured()
        return bool(measured) and measured[-1]["step"] == self.recipe.train.steps


def probe_widths(model: UNetConfig, encoder_width: int) -> tuple[int, int, int]:
    """Half, whole and one and a half times the encoder's width, or the nearest that the model can have."""
    wanted = [encoder_width / 2, encoder_width, 1.5 * encoder_width]
    fitting = decoder_widths(model, range(1, 2 * encoder_width + 1))
    narrow, middle, wide = (min(fitting, key=lambda w: (abs(w - target), -w)) for target in wanted)
    if not narrow < middle < wide:
        problem = f"leaves only decoders of {fitting} channels, too few to tell what width does"
        raise ConfigError("model.norm_groups", model.norm_groups, problem, "Use fewer groups.")
    return narrow, middle, wide


def decoder_widths(model: UNetConfig, among: Sequence[int]) -> list[int]:
    """Those of these widths that a decoder of the model can have."""
    fitting = []
    for width in among:
        try:
            model.of_widths([width])
        except ConfigError:  # groups or heads do not divide it
            continue
        fitting.append(width)
    return fitting


def plan_probes(
    recipe: Recipe, budget: float, share: float, nproc: int, folder: Path, *, equal_decoders: bool = False
) -> list[Probe]:
    """The probes, of equal compute, checked as far as is possible without training.

    Args:
        recipe: unified or not; its stages are replaced.
        budget: training compute of the run to come, in PFLOP. share: of it, for all probes together.
        equal_decoders: only the two probes without which nothing is known of a decoder of its own.

    Raises:
        ConfigError: the compute is too little; what training would refuse.
    """
    if not isinstance(recipe.model, UNetConfig) or not isinstance(recipe.model.encoder_channels, int):
        problem = "stages are designed for one encoder that all of them share"
        raise ConfigError("model.family", recipe.model.family, problem, "Use another family, or share_encoder: true.")
    for field, value in (
        ("grow", recipe.grow),
        ("stages.end", recipe.stages.end),
        ("stages.adaptive", recipe.stages.adaptive),
        ("stages.objectives", recipe.stages.objectives),
        ("stages.ended", recipe.stages.ended),
        ("train.freeze", recipe.train.freeze),
    ):
        if value:
            problem = "is for stages that are chosen already"
            raise ConfigError(field, to_mapping(value), problem, "Leave it out, and add it to the designed recipe.")
    unified = recipe.model.unified()
    width = recipe.model.encoder_channels
    widths: tuple[int, ...] = (width,)
    forms = [("unified", unified, width, 1)]
    if not equal_decoders:
        widths = probe_widths(unified, width)
        deeper = replace(unified, num_res_blocks=unified.num_res_blocks + 1)
        forms = [("unified", unified, widths[1], 1), ("unified_deeper", deeper, widths[1], 1)]
    forms += [(f"intervals_{width}", unified, width, INTERVALS) for width in widths]
    find = DataFinder()
    probes = [
        _probe(recipe, name, model, width, intervals, budget * share / len(forms), nproc, folder, find)
        for name, model, width, intervals in forms
    ]
    short = min(probes, key=lambda p: p.recipe.train.steps)
    steps = short.recipe.train.steps
    if steps < LEAST_STEPS:
        problem = f"leaves {steps} steps to the probe {short.name}, and fewer than {LEAST_STEPS} tell nothing"
        enough = budget * LEAST_STEPS / (steps + 1)
        raise ConfigError("--budget", budget, problem, f"Use {enough:.2g} or more, or a larger --probe-share.")
    return probes


def _probe(
    recipe: Recipe,
    name: str,
    model: UNetConfig,
    width: int,
    intervals: int,
    petaflops: float,
    nproc: int,
    folder: Path,
    find: DataFinder,
) -> Probe:
    process = recipe.process()
    edges = process.quantile(np.arange(1, intervals) / intervals, process.lo, process.hi)
    try:
        # Stages of equal probability that are drawn as training draws: a sample then counts alike in every probe.
        stages = replace(recipe.stages, boundaries=tuple(edges.tolist()), sampling="uniform")
        planned = replace(recipe, stages=stages, model=model.of_widths([width] * intervals))
        plan = plan_run(planned, nproc)
        per_step = step_petaflops(plan.quotas, plan.cost_K)
        steps = max(1, int(petaflops / per_step))
        planned = replace(
            planned,
            name=name,
            train=replace(recipe.train, steps=steps),
            # One kind of rate in all: a probe's moments then measure how training goes on, not where a schedule ends.
            lr_schedule=replace(
                recipe.lr_schedule, kind="constant", warmup_steps=min(recipe.lr_schedule.warmup_steps, steps // 10)
            ),
            validation=_validation(recipe.validation, steps),
            checkpoint=CheckpointConfig(every=0, keep_last=1),
            preview=replace(recipe.preview, every=0),
        )
        found = check_run(planned, [nproc], find, device_type=this_device().type)
        RunFolder(folder / name, comparable_mapping).check(recipe_mapping(planned))
    except UserError as e:
        raise e.within(f"probe {name}: ") from None
    assert isinstance(recipe.model, UNetConfig)
    assert isinstance(recipe.model.encoder_channels, int)
    return Probe(
        name=name,
        recipe=planned,
        folder=folder / name,
        width=width / recipe.model.encoder_channels,
        depth=(model.num_res_blocks + 1) / (recipe.model.num_res_blocks + 1),
        intervals=intervals,
        quotas_K=tuple(plan.quotas.quotas_K.tolist()),
        petaflops=per_step * steps,
        data=found,
    )


def _validation(given: ValidationConfig | None, steps: int) -> ValidationConfig:
    every = max(1, steps // VALIDATIONS)
    base = given or ValidationConfig(fraction=0.02)
    return replace(base, every=every, num=max(EVALUATIONS, base.num), weights="ema")


def run_probes(probes: Sequence[Probe], nproc: int, say: Callable[[str], object]) -> None:
    """Train what is not yet trained.

    Args:
        say: is given a line before each run.

    Raises:
        TrainingError: a run was stopped by a signal or failed; the same command resumes it.
    """
    for number, probe in enumerate(probes, 1):
        if probe.complete:
            continue
        say(f"probe {number}/{len(probes)}: {probe.name}, {probe.recipe.train.steps} steps")
        if run_local(recipe_mapping(probe.recipe), probe.folder, nproc, probe.data) != "finished":
            raise TrainingError(f"{probe.folder} was stopped by a signal and saved; give the same command to resume")


def measurements(probes: Sequence[Probe]) -> Measurements:
    """The held-out losses of all probes.

    Raises:
        RunFolderError: a run has none, or losses that are not numbers.
    """
    columns: dict[str, list[Any]] = {"width": [], "depth": [], "samples": [], "length": [], "loss": []}
    for probe in probes:
        in_bin = np.repeat(np.array(probe.quotas_K) / sum(probe.quotas_K), BINS // probe.intervals)
        in_bin = in_bin / (BINS // probe.intervals)
        used = [m for m in probe.measured() if m["step"] >= _FIRST_USED * probe.recipe.train.steps]
        for line in used:
            loss_B = np.array(line["validation"]["loss_per_bin"], dtype=float)
            if loss_B.shape != (BINS,) or not np.isfinite(loss_B).all():
                problem = f"has losses of step {line['step']} that are not {BINS} numbers"
                raise RunFolderError("probe", str(probe.folder), problem, "Lower optimizer.lr; remove the folder.")
            columns["loss"].append(loss_B)
            columns["samples"].append(line["images_seen"] * in_bin)
            columns["width"].append(probe.width)
            columns["depth"].append(probe.depth)
            columns["length"].append(1 / probe.intervals)
        if not used:
            raise RunFolderError("probe", str(probe.folder), "has no held-out losses", "Remove the folder.")
    return Measurements(
        width_N=np.array(columns["width"]),
        depth_N=np.array(columns["depth"]),
        samples_NB=np.array(columns["samples"]),
        length_N=np.array(columns["length"]),
        loss_NB=np.array(columns["loss"]),
    )
