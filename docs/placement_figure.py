"""Draw images/placement.svg: how the planner lays the work of three stages along a line of ranks.

Example: python docs/placement_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msdiff_dist.apps.train.plan import RunPlan, plan_run
from msdiff_dist.recipe import load_recipe

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes/celebahq256_ldm_3stage.yaml"
WORLDS = (4, 8)
COLOURS = ("#2a6f97", "#e09f3e", "#9e2a2b")


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "placement", "font.size": 9, "svg.fonttype": "path"})
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, world in zip(figure.subplots(1, len(WORLDS), width_ratios=WORLDS, sharey=True), WORLDS, strict=True):
        _draw(axes, plan_run(load_recipe(RECIPE, [f"train.global_batch_size={48 * world}"]), world), world)
    handles = [matplotlib.patches.Patch(color=c, label=f"stage {k}") for k, c in enumerate(COLOURS)]
    figure.axes[0].set_ylabel("work of a rank / mean")
    figure.legend(handles=handles, loc="outside upper center", ncols=len(COLOURS), frameon=False)
    figure.savefig(HERE / "images/placement.svg", metadata={"Date": None})


def _draw(axes: Axes, plan: RunPlan, world: int) -> None:
    """A bar for each rank: its samples of each stage times their cost."""
    samples_WK = plan.placement.samples_WK
    work_WK = samples_WK * np.array(plan.cost_K)
    work_WK = work_WK / work_WK.sum(axis=1).mean()
    base_W = np.zeros(world)
    for k, colour in enumerate(COLOURS):
        axes.bar(range(world), work_WK[:, k], bottom=base_W, color=colour, width=0.85)
        for rank in np.flatnonzero(samples_WK[:, k]):
            middle = base_W[rank] + work_WK[rank, k] / 2
            axes.text(rank, middle, str(samples_WK[rank, k]), ha="center", va="center", color="white")
        base_W += work_WK[:, k]
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(world))
    axes.set_xlabel(f"rank of {world}, balance {plan.placement.balance(plan.cost_K):.1%}")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
