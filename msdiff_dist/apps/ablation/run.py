"""Ablations: variants of a recipe, each trained with the same compute and several seeds, and scored on the way.

OUT/
  VARIANT/seed_N/          one run folder for each run, with its scores.json
  results.json results.csv results.md results.html quality.png
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from msdiff_dist.apps.ablation.plan import Trial
from msdiff_dist.apps.ablation.score_file import training_compute
from msdiff_dist.apps.ablation.scoring import Scoring
from msdiff_dist.apps.train.local import run_local
from msdiff_dist.checkpoint.layout import step_folder
from msdiff_dist.errors import TrainingError
from msdiff_dist.export.weights import open_weights
from msdiff_dist.recipe import recipe_mapping
from msdiff_dist.terminal import duration


def run_ablation(
    trials: Sequence[Trial], scoring: Scoring, nproc: int, after_trial: Callable[[], object] = lambda: None
) -> None:
    """Train and score what is not yet trained and scored of `trials`.

    Args:
        nproc: ranks of each run, on this machine.
        after_trial: called when a trial has all its scores.

    Raises:
        TrainingError: a run was stopped by a signal or failed; the same call resumes it.
    """
    open_trials = [trial for trial in trials if trial.unscored()]
    if not open_trials:
        return
    scoring.prepare()
    begun = time.monotonic()
    for number, trial in enumerate(open_trials):
        left = (time.monotonic() - begun) / number * (len(open_trials) - number) if number else None
        rest = "" if left is None else f"  ETA of all {duration(left)}"
        print(f"run {number + 1}/{len(open_trials)}: {trial.variant}, seed {trial.seed}{rest}", file=sys.stderr)
        if not all(step_folder(trial.checkpoints, step).is_dir() for step in trial.unscored()):
            outcome = run_local(recipe_mapping(trial.recipe), trial.folder, nproc, trial.data)
            if outcome != "finished":
                raise TrainingError(
                    f"{trial.folder} was stopped by a signal and saved; give the same command to resume"
                )
        score(trial, scoring)
        after_trial()


def score(trial: Trial, scoring: Scoring) -> None:
    """Take the scores that a trained run lacks, and keep each in its scores.json as it comes."""
    taken = trial.scores()
    for step in trial.unscored():
        weights = open_weights(trial.folder, step)
        taken.petaflops |= training_compute(trial.folder, {step: trial.petaflops[trial.steps.index(step)]})
        missing = {scores.digest: taken.missing(scores, step) for scores in trial.sets}
        for scores, metric, values in scoring.take(trial.subject, weights, missing, step):
            taken.add(scores, step, metric, values)
            taken.write()
