"""Ablations: variants of a recipe, each trained with the same compute and several seeds, and scored on the way.

OUT/
  VARIANT/seed_N/          one run folder for each run, with its scores.json
  results.csv results.md quality.png
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msdiff_dist.apps.train.costs import CostReport, cost_report, step_petaflops
from msdiff_dist.apps.train.found_data import DataFinder, FoundData
from msdiff_dist.apps.train.local import run_local
from msdiff_dist.apps.train.plan import check_run, plan_run
from msdiff_dist.bounds import check_name, check_seed
from msdiff_dist.checkpoint.layout import complete_checkpoints, step_folder, step_of
from msdiff_dist.checkpoint.policy import CheckpointConfig
from msdiff_dist.config import from_mapping, to_mapping
from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import ConfigError, RunFolderError, TrainingError, UserError, collecting, raise_all
from msdiff_dist.evaluation.feature_classifier import load_classifier
from msdiff_dist.evaluation.frechet import ScoreConfig, Scorer
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.export.weights import open_weights
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.files.json_text import read_mapping as read_json
from msdiff_dist.files.text import Override
from msdiff_dist.files.yaml_places import Places
from msdiff_dist.recipe import Recipe, comparable_mapping, load_recipe, read_mapping, recipe_mapping
from msdiff_dist.sweep import overrides_of
from msdiff_dist.terminal import duration
from msdiff_dist.training.config import MOST_STEPS
from msdiff_dist.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """An ablation file.

    recipe: path of the recipe, relative to this file.
    variants: by name, the dotted recipe fields that each changes; a field `recipe` among them replaces the common
        recipe. The first variant is the baseline.
    changes: dotted recipe fields that all variants change.
    budget: 1e15 floating-point operations of every run's training, forward and backward; train.steps follows from it.
    score: how runs are scored.
    seeds: train.seed of each variant's runs, and the seed of the images generated with them.
    points: fractions of the budget after which a run is scored, ascending to 1.
    """

    recipe: str
    variants: dict[str, dict[str, Any]]
    budget: float
    score: ScoreConfig
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    points: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        for name, values in (("variants", self.variants), ("seeds", self.seeds), ("points", self.points)):
            if not values:
                raise ConfigError(name, values, "is empty", "Give at least one.")
        for name in self.variants:
            if not re.fullmatch(r"[\w+=-][\w.+=-]*", name):
                raise ConfigError("variants", name, "cannot name a folder", "Use letters, digits, and any of _-+=.")
            check_name("variants", name)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", list(self.seeds), "names a seed twice", "Remove one.")
        for seed in self.seeds:
            check_seed("seeds", seed)
        if not self.budget > 0:
            raise ConfigError("budget", self.budget, "must be above 0", "Give 1e15 operations of a run.")
        points = list(self.points)
        if points != sorted(set(points)) or not 0 < points[0] <= points[-1] == 1:
            raise ConfigError("points", points, "must ascend inside (0, 1] and end with 1", "Write [0.25, 0.5, 1].")
        for fixed in ("train.steps", "train.seed"):
            if any(fixed in change for change in (self.changes, *self.variants.values())):
                raise ConfigError(fixed, "given", "follows from the budget and the seeds", "Remove it.")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a variant with one seed.

    steps: after which it is scored; the last is also its number of steps. step_petaflops: of one step, forward and
    backward. data: the recipe's data, found once for all trials that share it.
    """

    variant: str
    seed: int
    recipe: Recipe
    folder: Path
    costs: CostReport
    step_petaflops: float
    steps: tuple[int, ...]
    data: FoundData

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def scores(self, settings: dict[str, Any]) -> dict[int, float]:
        """The scores taken so far with these settings, by step.

        Raises:
            RunFolderError: their file holds something else.
        """
        path = self.folder / "scores.json"
        remedy = "Remove it to have the run scored again."
        stored = read_json(path, RunFolderError, remedy) if path.is_file() else {}
        if stored.get("settings") != settings:
            return {}
        try:
            return {int(k): float(v) for k, v in stored["scores"].items()}
        except (KeyError, AttributeError, TypeError, ValueError):
            raise RunFolderError(str(path), None, "holds no scores by step", remedy) from None


def load_ablation(path: Path, overrides: list[str]) -> tuple[AblationConfig, Places]:
    """Read an ablation file and apply dotted overrides (`budget=0.01`); also returns where each field was given.

    Raises:
        ConfigError: naming every wrong field and its line.
    """
    document = read_mapping(path, overrides, "SWEEP")
    return document.parsed(lambda mapping: from_mapping(AblationConfig, mapping)), document.places


def plan_ablation(config: AblationConfig, places: Places, base: Path, out: Path, nproc: int) -> list[Trial]:
    """All runs, those of the first seed first, each checked as far as is possible without training.

    Args:
        places: where the ablation file gives its fields.
        base: folder that recipe paths are relative to.

    Raises:
        UserError: naming the variant and the field; of recipes, every wrong field of every variant.
    """
    shape = load_classifier(Path(config.score.classifier)).info.image_shape
    find, trials, errors = DataFinder(), list[Trial](), list[ConfigError]()
    for name in config.variants:
        with collecting(errors):
            trials += _trials(config, places, name, base, out, nproc, find)
    raise_all(errors)
    for trial in trials:
        _check_image_shape(trial, shape, config.score.classifier)
        _check_folder(trial, score_settings(config.score))
    return sorted(trials, key=lambda t: config.seeds.index(t.seed))


def _trials(
    config: AblationConfig, places: Places, name: str, base: Path, out: Path, nproc: int, find: DataFinder
) -> Iterator[Trial]:
    changes = {**config.changes, **config.variants[name]}
    path = base / str(changes.pop("recipe", config.recipe))
    given = [f"variants.{name}.{key}" if key in config.variants[name] else f"changes.{key}" for key in changes]
    try:
        recipe = load_recipe(
            path, [Override(o, places.of(at)) for o, at in zip(overrides_of(changes), given, strict=True)]
        )
        config.score.sampler.for_process(recipe.process())
        plan = plan_run(recipe, nproc)
        found = check_run(recipe, [nproc], find, device_type=this_device().type)
    except UserError as e:
        raise e.within(f"variants.{name}: ") from None
    per_step = step_petaflops(plan.quotas, plan.cost_K)
    # Rounded down, but a budget of exactly n steps must not lose one to the rounding of the division.
    last = int(config.budget / per_step * (1 + 1e-9))
    if last < 1:
        problem = f"is less than one step of {name}, {per_step:.3g}"
        raise ConfigError("budget", config.budget, problem, "Raise it, or lower train.global_batch_size.")
    if last > MOST_STEPS:
        problem = f"is {last:,} steps of {name}, and a run has at most {MOST_STEPS:,}"
        raise ConfigError("budget", config.budget, problem, "Lower it: it counts 1e15 operations.")
    steps = tuple(max(1, round(point * last)) for point in config.points)
    if len(set(steps)) < len(steps):
        problem = f"two of them are the same step of {name}, which trains {last} steps"
        raise ConfigError("points", list(config.points), problem, "Raise the budget, or remove some.")
    # Sampling costs are those of the score's sampler, not of previews, which an ablation does not draw.
    costs = cost_report(replace(recipe, preview=replace(recipe.preview, sampler=config.score.sampler)))
    for seed in config.seeds:
        planned = replace(
            recipe,
            name=f"{name}_seed_{seed}",
            train=replace(recipe.train, steps=last, seed=seed),
            checkpoint=CheckpointConfig(every=recipe.checkpoint.every, keep_last=1, at=steps),
            preview=replace(recipe.preview, every=0),
        )
        yield Trial(
            variant=name,
            seed=seed,
            recipe=planned,
            folder=out / name / f"seed_{seed}",
            costs=costs,
            step_petaflops=per_step,
            steps=steps,
            data=found,
        )


def _check_image_shape(trial: Trial, shape: tuple[int, int, int], classifier: str) -> None:
    _, height, width = trial.recipe.latent_shape
    factor, data = trial.recipe.autoencoder.factor, trial.recipe.data
    made = (data.channels if data.kind == "image" else shape[0], height * factor, width * factor)
    if made != shape:
        problem = f"takes images of shape {list(shape)}, and {trial.variant} makes {list(made)}"
        raise ConfigError("score.classifier", classifier, problem, "Train one on such images.")


def _check_folder(trial: Trial, settings: dict[str, Any]) -> None:
    """Refuse the folder of another run, and a run past a step at which it is neither scored nor has a checkpoint."""
    RunFolder(trial.folder, comparable_mapping).check(recipe_mapping(trial.recipe))
    done = [step_of(p) for p in complete_checkpoints(trial.checkpoints)]
    scored = trial.scores(settings)
    lost = [s for s in trial.steps if s not in scored and s not in done and s <= max(done, default=0)]
    if lost:
        problem = f"has trained {max(done)} steps and kept no checkpoint of step {lost[0]}"
        raise RunFolderError("--out", str(trial.folder), problem, "Name another --out, or restore budget and points.")


def run_ablation(
    config: AblationConfig, trials: Sequence[Trial], nproc: int, after_trial: Callable[[], object] = lambda: None
) -> None:
    """Train and score what is not yet trained and scored of `trials`.

    Args:
        nproc: ranks of each run, on this machine.
        after_trial: called when a trial has all its scores.

    Raises:
        TrainingError: a run was stopped by a signal or failed; the same call resumes it.
    """
    settings = score_settings(config.score)
    open_trials = [t for t in trials if not set(t.steps) <= t.scores(settings).keys()]
    if not open_trials:
        return
    device = this_device()
    scorer = Scorer(config.score, device)
    begun = time.monotonic()
    for number, trial in enumerate(open_trials):
        left = (time.monotonic() - begun) / number * (len(open_trials) - number) if number else None
        rest = "" if left is None else f"  ETA of all {duration(left)}"
        print(f"run {number + 1}/{len(open_trials)}: {trial.variant}, seed {trial.seed}{rest}", file=sys.stderr)
        scores = trial.scores(settings)
        missing = [s for s in trial.steps if s not in scores]
        if not all(step_folder(trial.checkpoints, s).is_dir() for s in missing):
            outcome = run_local(recipe_mapping(trial.recipe), trial.folder, nproc, trial.data)
            if outcome != "finished":
                raise TrainingError(
                    f"{trial.folder} was stopped by a signal and saved; give the same command to resume"
                )
        for step in missing:
            generator = ImageGenerator(open_weights(trial.folder, step), device)
            scores[step] = scorer(generator, trial.seed, f"scoring step {step}: sampling")
            # Written after each score: a kill then costs one score at most.
            stored = {"settings": settings, "scores": {str(k): scores[k] for k in sorted(scores)}}
            atomic_write(trial.folder / "scores.json", json.dumps(stored, indent=1) + "\n")
        after_trial()


def score_settings(config: ScoreConfig) -> dict[str, Any]:
    """What must be equal for scores to be comparable: the settings, with the classifier's digest, not its path."""
    return {**to_mapping(config), "classifier": sha256_of(Path(config.classifier))}
