"""The runs of an ablation: each variant with each seed, checked as far as is possible without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from msdiff_dist.apps.ablation.config import AblationConfig
from msdiff_dist.apps.ablation.score_file import ScoreFile, ScoreSet, read_scores
from msdiff_dist.apps.ablation.scoring import Scoring, Subject
from msdiff_dist.apps.train.costs import CostReport, cost_report, petaflops_after, steps_within
from msdiff_dist.apps.train.found_data import DataFinder, FoundData
from msdiff_dist.apps.train.plan import check_run, plan_phases
from msdiff_dist.checkpoint.layout import complete_checkpoints, step_of
from msdiff_dist.checkpoint.policy import CheckpointConfig
from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import ConfigError, RunFolderError, UserError, collecting, raise_all
from msdiff_dist.files.text import Override
from msdiff_dist.files.yaml_places import Places
from msdiff_dist.recipe import Recipe, comparable_mapping, load_recipe, recipe_mapping
from msdiff_dist.sweep import overrides_of
from msdiff_dist.training.config import MOST_STEPS
from msdiff_dist.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a variant with one seed.

    Attributes:
        steps: after which it is scored; the last is also its number of steps.
        petaflops: 1e15 operations up to each of `steps`, forward and backward, as they are planned.
        data: the recipe's data, found once for all trials that share it.
        sets: the scores that are taken at each point; empty until the ablation's `Scoring` is known.
    """

    variant: str
    seed: int
    recipe: Recipe
    folder: Path
    costs: CostReport
    petaflops: tuple[float, ...]
    steps: tuple[int, ...]
    data: FoundData
    sets: tuple[ScoreSet, ...] = ()

    @property
    def step_petaflops(self) -> float:
        """1e15 operations of a step, as it is planned; of a run whose steps differ, of the mean one."""
        return self.petaflops[-1] / self.steps[-1]

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def subject(self) -> Subject:
        """What is scored."""
        return Subject(recipe=self.recipe, seed=self.seed)

    def scores(self) -> ScoreFile:
        """The scores taken so far.

        Raises:
            RunFolderError: their file holds something else.
        """
        return read_scores(self.folder)

    def unscored(self) -> list[int]:
        """The steps after which scores are missing."""
        taken = self.scores()
        return [step for step in self.steps if not taken.complete(self.sets, step)]


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """All runs, those of the first seed first, and how they are scored."""

    config: AblationConfig
    trials: tuple[Trial, ...]
    scoring: Scoring


def plan_ablation(config: AblationConfig, places: Places, base: Path, out: Path, nproc: int) -> AblationPlan:
    """Plan all runs. Networks of feature spaces are loaded and held-out samples read.

    Args:
        places: where the ablation file gives its fields.
        base: folder that recipe paths are relative to.

    Raises:
        UserError: naming the variant and the field; of recipes, every wrong field of every variant.
    """
    find, trials, errors = DataFinder(), list[Trial](), list[ConfigError]()
    for name in config.variants:
        with collecting(errors):
            trials += _trials(config, places, name, base, out, nproc, find)
    raise_all(errors)
    scoring = Scoring(config.score, trials[0].recipe, trials[0].data, this_device())
    for trial in trials:
        if trial.seed == config.seeds[0]:
            with collecting(errors), _of_variant(trial.variant):
                scoring.check(trial.recipe)
    raise_all(errors)
    trials = [replace(trial, sets=tuple(scoring.sets(trial.subject))) for trial in trials]
    for trial in trials:
        _check_folder(trial)
    ordered = sorted(trials, key=lambda t: config.seeds.index(t.seed))
    return AblationPlan(config=config, trials=tuple(ordered), scoring=scoring)


def _trials(
    config: AblationConfig, places: Places, name: str, base: Path, out: Path, nproc: int, find: DataFinder
) -> Iterator[Trial]:
    changes = {**config.changes, **config.variants[name]}
    path = base / str(changes.pop("recipe", config.recipe))
    given = [f"variants.{name}.{key}" if key in config.variants[name] else f"changes.{key}" for key in changes]
    with _of_variant(name):
        recipe = load_recipe(
            path, [Override(o, places.of(at)) for o, at in zip(overrides_of(changes), given, strict=True)]
        )
        config.score.sampler.for_process(recipe.process())
        planned = plan_phases(recipe, nproc)
        found = check_run(recipe, [nproc], find, device_type=this_device().type)
    # Rounded down, but a budget of exactly n steps must not lose one to the rounding of the division.
    last = int(steps_within(planned, recipe.guide, config.budget) * (1 + 1e-9))
    if last < 1:
        problem = f"is less than one step of {name}, {petaflops_after(planned, 1):.3g}"
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
        with _of_variant(name):  # a step at which its stages change may lie beyond the budget
            trained = replace(
                recipe,
                name=f"{name}_seed_{seed}",
                train=replace(recipe.train, steps=last, seed=seed),
                checkpoint=CheckpointConfig(every=recipe.checkpoint.every, keep_last=1, at=steps),
                preview=replace(recipe.preview, every=0),
            )
            planned = plan_phases(trained, nproc)
        yield Trial(
            variant=name,
            seed=seed,
            recipe=trained,
            folder=out / name / f"seed_{seed}",
            costs=costs,
            petaflops=tuple(petaflops_after(planned, step) for step in steps),
            steps=steps,
            data=found,
        )


@contextmanager
def _of_variant(name: str) -> Iterator[None]:
    """Let errors name the variant."""
    try:
        yield
    except UserError as e:
        raise e.within(f"variants.{name}: ") from None


def _check_folder(trial: Trial) -> None:
    """Refuse the folder of another run, and a run past a step at which scores and checkpoint are missing."""
    RunFolder(trial.folder, comparable_mapping).check(recipe_mapping(trial.recipe))
    done = [step_of(p) for p in complete_checkpoints(trial.checkpoints)]
    lost = [s for s in trial.unscored() if s not in done and s <= max(done, default=0)]
    if lost:
        problem = f"has trained {max(done)} steps and kept no checkpoint of step {lost[0]}"
        raise RunFolderError(
            "--out", str(trial.folder), problem, "Name another --out, or restore budget, points and score."
        )
