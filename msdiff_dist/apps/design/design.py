"""From the laws of the loss to a recipe: designs of one to several stages, on a cluster, and the best of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from msdiff_dist.apps.design.probes import decoder_widths, probe_widths
from msdiff_dist.apps.train.costs import PETA, step_petaflops
from msdiff_dist.apps.train.plan import model_costs, plan_run, recipe_costs
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.timestep_sampler import stage_probabilities
from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.evaluation.held_out_loss import BINS
from msdiff_dist.models.unet_config import UNetConfig
from msdiff_dist.recipe import Recipe
from msdiff_dist.stage_division.design import (
    DecoderChoice,
    DesignedStage,
    StageDesign,
    design_stages,
    predicted_loss,
)
from msdiff_dist.stage_division.loss_laws import LossLaws

_MOST_WIDTHS = 12  # decoders to choose from: more make the search longer and the choice no better


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with designed stages on a cluster.

    Attributes:
        recipe: complete, with the number of steps that the budget buys.
        balance: of its ranks, in (0, 1]: the rest of the budget's time is waited.
        predicted: mean held-out loss, unweighted, for what the balance leaves of the budget.
        note: how it came about.
    """

    recipe: Recipe
    balance: float
    predicted: float
    note: str

    def fields(self) -> dict[str, Any]:
        """As `--json` prints it."""
        sampling = self.recipe.stages.sampling
        return {
            "stages": self.recipe.stages.num_stages,
            "boundaries": list(self.recipe.stages.boundaries),
            "decoder_channels": list(self.recipe.model.decoder_channels),
            "num_res_blocks": self.recipe.model.num_res_blocks,
            "sampling": sampling if isinstance(sampling, str) else list(sampling),
            "steps": self.recipe.train.steps,
            "balance": self.balance,
            "predicted_loss": self.predicted,
            "note": self.note,
        }


def candidates(
    recipe: Recipe, laws: LossLaws, petaflops: float, world_size: int, most_stages: int, *, equal_decoders: bool = False
) -> tuple[Candidate | None, list[Candidate], list[str]]:
    """The recipe as it is, the best design of each number of stages, and why others are left out.

    The first is None where probes with `equal_decoders` tell nothing of the recipe's own decoders.

    Args:
        petaflops: training compute of the run to come.
        equal_decoders: all as wide as the encoder, and of the recipe's depth.
    """
    refused: list[str] = []
    designs = []
    for stages in range(1, most_stages + 1):
        found = [
            (depth, _design(recipe, laws, petaflops, stages, depth, widths))
            for depth, widths in _measured_decoders(recipe, equal_decoders)
        ]
        blocks, design = min(found, key=lambda pair: pair[1].predicted_loss)
        designed = _with_stages(recipe, design, blocks)
        try:
            designs.append(_on_cluster(designed, laws, design.stages, petaflops, world_size, f"{stages} stages"))
        except UserError as e:
            refused.append(f"{stages} stages: {e}")
    own = as_designed(recipe)
    if equal_decoders and any(stage.decoder.width != 1.0 for stage in own):
        return None, designs, refused
    return _on_cluster(recipe, laws, own, petaflops, world_size, "as given"), designs, refused


def as_designed(recipe: Recipe) -> tuple[DesignedStage, ...]:
    """A recipe's own stages, their boundaries moved to the nearest edges of the bins."""
    process, model = recipe.process(), recipe.model
    assert isinstance(model, UNetConfig)
    assert isinstance(model.encoder_channels, int)
    below = [process.mass(process.lo, b) for b in recipe.stages.boundaries]
    edges = [0, *(round(BINS * m) for m in below), BINS]
    for k in range(1, len(edges) - 1):  # each stage keeps one bin at least
        edges[k] = min(max(edges[k], edges[k - 1] + 1), BINS - (len(edges) - 1 - k))
    shares = stage_probabilities(process, recipe.partition(), recipe.stages.sampling)
    macs = recipe_costs(recipe).step_macs_K
    return tuple(
        DesignedStage(
            first=edges[k],
            last=edges[k + 1],
            decoder=DecoderChoice(channels=channels, width=channels / model.encoder_channels, depth=1.0, macs=macs[k]),
            share=float(shares[k]),
        )
        for k, channels in enumerate(model.decoder_channels)
    )


def _measured_decoders(recipe: Recipe, equal_decoders: bool) -> list[tuple[int, list[int]]]:
    """Numbers of residual blocks, and the widths of decoders that each allows: those measured and what lies between."""
    model = recipe.model
    assert isinstance(model, UNetConfig)
    assert isinstance(model.encoder_channels, int)
    if equal_decoders:
        return [(model.num_res_blocks, [model.encoder_channels])]
    narrow, _, wide = probe_widths(model.unified(), model.encoder_channels)
    found = []
    for blocks in (model.num_res_blocks, model.num_res_blocks + 1):
        widths = decoder_widths(replace(model.unified(), num_res_blocks=blocks), range(narrow, wide + 1))
        chosen = sorted({round(x) for x in np.linspace(0, len(widths) - 1, _MOST_WIDTHS)})
        found.append((blocks, [widths[i] for i in chosen]))
    return found


def _design(
    recipe: Recipe, laws: LossLaws, petaflops: float, stages: int, blocks: int, widths: Sequence[int]
) -> StageDesign:
    model = recipe.model
    assert isinstance(model, UNetConfig)
    assert isinstance(model.encoder_channels, int)
    unified = replace(model.unified(), num_res_blocks=blocks)
    macs = model_costs(recipe, unified.of_widths(widths)).step_macs_K
    depth = (blocks + 1) / (model.num_res_blocks + 1)
    choices = [
        DecoderChoice(channels=w, width=w / model.encoder_channels, depth=depth, macs=m)
        for w, m in zip(widths, macs, strict=True)
    ]
    return design_stages(laws, choices, petaflops * PETA / 6, stages)


def _with_stages(recipe: Recipe, design: StageDesign, blocks: int) -> Recipe:
    model = recipe.model
    assert isinstance(model, UNetConfig)
    widths = [s.decoder.channels for s in design.stages]
    process = recipe.process()
    shares = tuple(round(s.share, 3) for s in design.stages)
    stages = replace(
        recipe.stages,
        boundaries=_edges(process, [s.last for s in design.stages[:-1]]),
        sampling=shares if len(shares) > 1 else "uniform",
    )
    built = replace(model.unified(), num_res_blocks=blocks).of_widths(widths)
    return dataclasses.replace(recipe, model=built, stages=stages)


def _edges(process: Process, ends: Sequence[int]) -> tuple[float, ...]:
    """Times of the edges after these numbers of bins, in the process's unit."""
    times = process.quantile(np.array(ends) / BINS, process.lo, process.hi)
    return tuple(int(t) if process.discrete else round(float(t), 4) for t in times)


def _on_cluster(
    recipe: Recipe, laws: LossLaws, stages: Sequence[DesignedStage], petaflops: float, world_size: int, note: str
) -> Candidate:
    """Place the stages, and predict the loss for the part of the budget in which ranks do not wait.

    Raises:
        UserError: the recipe cannot be placed on so many ranks.
    """
    plan = plan_run(recipe, world_size)
    balance = plan.placement.balance(plan.cost_K)
    per_step = step_petaflops(plan.quotas, plan.cost_K)
    steps = int(petaflops * balance / per_step)
    if steps < 1:
        problem = f"is less than one step, {per_step:.3g}"
        raise ConfigError("--budget", petaflops, problem, "Raise it, or lower train.global_batch_size.")
    trained = replace(recipe, train=replace(recipe.train, steps=steps))
    predicted = predicted_loss(laws, stages, petaflops * balance * PETA / 6)
    return Candidate(recipe=trained, balance=balance, predicted=predicted, note=note)
