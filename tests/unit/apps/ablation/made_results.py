"""An ablation that was not run: variants of known curves, for tests of its report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from msdiff_dist.apps.ablation.config import TENTHS, AblationConfig, ScoreConfig
from msdiff_dist.apps.ablation.plan import Trial
from msdiff_dist.apps.ablation.score_file import ScoreFile, ScoreSet
from msdiff_dist.apps.train.costs import cost_report
from msdiff_dist.apps.train.found_data import FoundData
from msdiff_dist.recipe import load_recipe

STEPS = (10, 20, 40, 80)
FACTORS = {"unified": 1.0, "half": 0.5, "worse": 4.0}
"""Compute of each variant to any quality, over that of `unified`."""
SETS = (
    ScoreSet(prefix="", metrics=("loss",), about={"of": "held out"}, label="held-out loss"),
    ScoreSet(prefix="mobilenet/", metrics=("fid", "prdc"), about={"of": "images"}, label="mobilenet"),
)


def made_ablation(folder: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> tuple[AblationConfig, list[Trial]]:
    """The ablation file and the trials, whose scores.json are written."""
    config = AblationConfig(
        recipe="recipe.yaml",
        variants={name: {"model.decoder_channels": [8]} for name in FACTORS},
        budget=80.0,
        score=ScoreConfig(metrics=("loss", "fid", "prdc")),
        seeds=seeds,
        points=(0.125, 0.25, 0.5, 1.0),
        levels=(0.25, 0.5, 1.0, "best"),
    )
    recipe = load_recipe(Path(__file__).parents[4] / "recipes/debug.yaml")
    costs, trials = cost_report(recipe), []
    for v, (name, factor) in enumerate(FACTORS.items()):
        for seed in seeds:
            trial = Trial(
                variant=name, seed=seed, recipe=recipe, folder=folder / f"v{v}" / f"seed_{seed}", costs=costs,
                petaflops=tuple(map(float, STEPS)), steps=STEPS, data=FoundData([], {}), sets=SETS,
            )  # fmt: skip
            trial.folder.mkdir(parents=True)
            scores = ScoreFile(trial.folder / "scores.json")
            for step in STEPS:
                better = np.log2(step / factor)  # a straight line in the logarithm of compute
                scores.petaflops[step] = float(step)
                # In the first tenth `half` is like `unified`, in the last one it takes a quarter of the compute.
                tenths = {
                    name: 10 - np.log2(step) + (2 * t / 9) * np.log2(factor) + 0.1 * seed
                    for t, name in enumerate(TENTHS)
                }
                scores.add(SETS[0], step, "loss", {"loss": 10 - better + 0.1 * seed, **tenths})
                scores.add(SETS[1], step, "fid", {"fid": 100 - 7 * better})
                scores.add(SETS[1], step, "prdc", {"precision": 0.1 * better, "recall": 0.05 * better})
            scores.write()
            trials.append(trial)
    return config, trials
