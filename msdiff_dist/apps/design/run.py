"""`msdiff stages design`: from a recipe and a budget to probes, laws, candidates, a plot and a recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msdiff_dist.apps.design.design import Candidate, candidates
from msdiff_dist.apps.design.probes import Probe, measurements, plan_probes, run_probes
from msdiff_dist.apps.recipe_text import recipe_text
from msdiff_dist.bounds import check_between
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.held_out_loss import BINS
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.recipe import Recipe
from msdiff_dist.shipped import refuse_existing
from msdiff_dist.stage_division.loss_laws import Floats, LossLaws, fit_laws

_REACH = 4  # times the samples of a measurement to which laws hold within some percent (docs/guides/design-stages.md)


@dataclass(frozen=True, kw_only=True)
class DesignRequest:
    """The options of `msdiff stages design` under their names.

    petaflops: training compute of the run to come. probe_share: what the probes may take, as a share of it and on top
    of it. world_size: ranks of the run to come. nproc: ranks of a probe, here. probes: folder of their runs.
    equal_decoders: all as wide as the encoder.
    """

    recipe: Recipe
    source: str
    petaflops: float
    probe_share: float
    most_stages: int
    equal_decoders: bool
    world_size: int
    nproc: int
    out: Path
    probes: Path


@dataclass(frozen=True, kw_only=True)
class Designed:
    """What was measured and what follows from it. `given` is None where nothing was measured of its decoders."""

    probes: list[Probe]
    laws: LossLaws
    given: Candidate | None
    designs: list[Candidate]
    refused: list[str]
    chosen: Candidate
    petaflops: float

    @property
    def probe_petaflops(self) -> float:
        return sum(p.petaflops for p in self.probes)

    @property
    def exponents(self) -> dict[str, Floats]:
        """Of the causes that differ between the probes."""
        laws = self.laws
        found = {"samples": laws.samples_B, "length": laws.length_B}
        if len({p.width for p in self.probes}) > 1:
            found["width"] = laws.width_B
        if len({p.depth for p in self.probes}) > 1:
            found["depth"] = laws.depth_B
        return found

    def fields(self) -> dict[str, Any]:
        """As `--json` prints it."""
        laws = self.laws
        return {
            "budget_petaflops": self.petaflops,
            "probe_petaflops": self.probe_petaflops,
            "probes": [
                {"name": p.name, "folder": str(p.folder), "steps": p.recipe.train.steps, "petaflops": p.petaflops}
                for p in self.probes
            ],
            "laws": {
                "floor": laws.floor_B.tolist(),
                **{name: exponent_B.tolist() for name, exponent_B in self.exponents.items()},
                "relative_error": laws.error,
            },
            "given": self.given.fields() if self.given else None,
            "designs": [c.fields() for c in self.designs],
            "refused": self.refused,
            "chosen": self.chosen.fields(),
        }


def check_design(request: DesignRequest) -> list[Probe]:
    """The probes of a request, checked without training.

    Raises:
        UserError: what is wrong with the options, the recipe or its data.
    """
    if not request.petaflops > 0:
        raise ConfigError("--budget", request.petaflops, "must be above 0", "Give 1e15 operations of training.")
    if not 0 < request.probe_share <= 1:
        problem = "must lie in (0, 1]"
        raise ConfigError("--probe-share", request.probe_share, problem, "Use 0.05: a twentieth of the budget.")
    check_between("--max-stages", request.most_stages, 1, BINS)
    refuse_existing(request.out)
    return plan_probes(
        request.recipe,
        request.petaflops,
        request.probe_share,
        request.nproc,
        request.probes,
        equal_decoders=request.equal_decoders,
    )


def design(request: DesignRequest, probes: Sequence[Probe]) -> Designed:
    """Measure, choose, and write the recipe.

    Raises:
        TrainingError: a probe failed or was stopped; the same call goes on.
    """
    run_probes(probes, request.nproc, lambda line: print(line, file=sys.stderr))
    laws = fit_laws(measurements(probes))
    given, designs, refused = candidates(
        request.recipe,
        laws,
        request.petaflops,
        request.world_size,
        request.most_stages,
        equal_decoders=request.equal_decoders,
    )
    if not designs:
        problem = f"no design can be placed: {'; '.join(refused)}"
        raise ConfigError("--world-size", request.world_size, problem, "Use another number of ranks.")
    best = min(designs, key=lambda c: c.predicted)
    name = f"{request.recipe.name}_designed"
    best = replace(best, recipe=replace(best.recipe, name=name))
    found = Designed(
        probes=list(probes),
        laws=laws,
        given=given,
        designs=designs,
        refused=refused,
        chosen=best,
        petaflops=request.petaflops,
    )
    atomic_write(request.out, _recipe(request, found))
    return found


def _recipe(request: DesignRequest, found: Designed) -> str:
    best, given = found.chosen, found.given
    beside = f", and {given.predicted:.4g} for the\nrecipe they started from" if given else ""
    title = (
        f"Stages designed for {request.petaflops:g} PFLOP on {request.world_size} ranks, from {request.source}.\n\n"
        f"Probes of {found.probe_petaflops:.3g} PFLOP predict a mean held-out loss of {best.predicted:.4g}{beside}.\n"
        f"The laws miss what was measured by {found.laws.error:.1%} (root mean square).\n"
    )
    commands = [f"msdiff plan {request.out} --world-size {request.world_size}", f"msdiff train {request.out}"]
    return recipe_text(best.recipe, title, commands, {})


def markdown(found: Designed) -> str:
    """The table of what was compared."""
    lines = [
        "| design | boundaries | decoders | blocks | shares | steps | balance | predicted loss |",
        "|---" * 8 + "|",
    ]
    for c in filter(None, (found.given, *found.designs)):
        r = c.recipe
        shares = r.stages.sampling if isinstance(r.stages.sampling, str) else [round(s, 3) for s in r.stages.sampling]
        mark = " (chosen)" if r.stages == found.chosen.recipe.stages and r.model == found.chosen.recipe.model else ""
        lines.append(
            f"| {c.note}{mark} | {list(r.stages.boundaries)} | {list(r.model.decoder_channels)} "
            f"| {r.model.num_res_blocks} | {shares} | {r.train.steps} | {c.balance:.1%} | {c.predicted:.4g} |"
        )
    cost = f"Probes took {found.probe_petaflops:.3g} PFLOP, {found.probe_petaflops / found.petaflops:.1%} of the budget"
    error = f"the laws miss the measured losses by {found.laws.error:.1%} (root mean square)"
    return "\n".join([*lines, "", f"{cost}; {error}.", _reach(found), *found.refused])


def _reach(found: Designed) -> str:
    """How far the laws are extrapolated."""
    longest = max(p.recipe.train.steps for p in found.probes)  # the batches are those of the run
    steps = found.chosen.recipe.train.steps
    rough = "predictions are rough" + (", and favour narrow decoders" if "width" in found.exponents else "")
    times = f"The run takes {steps / longest:.1f} times the samples of the longest probe"
    return f"{times}; beyond {_REACH} times, {rough}."


def plot(found: Designed, path: Path) -> None:
    """What was measured in each noise interval, what is predicted for each number of stages, and the chosen stages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    exponents, losses, chosen = figure.subplots(3)
    at = (np.arange(BINS) + 0.5) / BINS
    for name, values in found.exponents.items():
        exponents.plot(at, values, "o-", label="a shorter interval" if name == "length" else name)
    exponents.axhline(0, color="gray", linewidth=0.8)
    exponents.set_ylabel("exponent")
    exponents.set_xlabel("share of training's times, from the data to the noise")
    exponents.set_title("How fast the loss above its floor falls with")
    exponents.legend()
    counts = [c.recipe.stages.num_stages for c in found.designs]
    losses.plot(counts, [c.predicted for c in found.designs], "o-", label="designed")
    if found.given:
        losses.axhline(found.given.predicted, color="gray", linestyle="--", label="as given")
    losses.set_xticks(counts)
    losses.set_xlabel("stages")
    losses.set_ylabel("predicted held-out loss")
    losses.legend()
    recipe = found.chosen.recipe
    process = recipe.process()
    edges = [0.0, *(process.mass(process.lo, b) for b in recipe.stages.boundaries), 1.0]
    widths = list(recipe.model.decoder_channels)
    sampling = recipe.stages.sampling
    shares = [1.0] if isinstance(sampling, str) else [s / sum(sampling) for s in sampling]
    chosen.bar(edges[:-1], widths, np.diff(edges), align="edge", alpha=0.4, edgecolor="black")
    for k, share in enumerate(shares):
        middle = (edges[k] + edges[k + 1]) / 2
        label = f"{widths[k]} channels, {share:.0%} of samples"
        chosen.text(middle, widths[k] / 2, label, ha="center", va="center", rotation="vertical")
    chosen.set_ylabel("decoder channels")
    chosen.set_xlabel("share of training's times, from the data to the noise")
    chosen.set_title("Chosen stages")
    atomic_write(path, lambda f: figure.savefig(f, format=path.suffix[1:]))
