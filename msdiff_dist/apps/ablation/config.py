"""The ablation file: variants of a recipe, their budget, and how they are scored."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from msdiff_dist.apps.ablation.grid import check_grid, with_grid
from msdiff_dist.bounds import check_between, check_different, check_name, check_seed
from msdiff_dist.config import from_mapping
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.held_out_loss import BINS
from msdiff_dist.evaluation.sampling_job import MOST_IMAGES
from msdiff_dist.evaluation.scores import METRICS
from msdiff_dist.files.yaml_places import Places
from msdiff_dist.recipe import read_mapping

LOSS = "loss"
"""The metric that needs no images: the held-out loss."""
TENTHS = tuple(f"{LOSS}_tenth_{number}" for number in range(1, BINS + 1))
"""What is taken with it: the loss in each tenth of the training's distribution of times, from the data on."""
Level = float | Literal["best"]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """The scores that are taken of each run at each point.

    metrics: `loss`, the held-out loss of the averaged weights, and names in `METRICS`; images are sampled once for all.
    features: feature spaces by name, or classifiers' files; every metric but `loss` is taken in each.
    feature_weights: paths of weights by the name of the feature space, for those that do not come with a package.
    reference: shards, a folder of images or an .npz file to compare with; None: what the baseline is trained on.
    reference_num: take only the first so many images of shards or of a folder; None: all. prdc holds the distances of
        all pairs of them in memory.
    num: number of images to generate, of all classes in turn. Most scores of different numbers do not compare.
    sampler: how the images are sampled.
    batch_size: number of images sampled at once.
    """

    metrics: tuple[str, ...] = (LOSS, "fid", "kid")
    features: tuple[str, ...] = ("mobilenet",)
    feature_weights: dict[str, str] = field(default_factory=dict)
    reference: str | None = None
    reference_num: int | None = None
    num: int = 2000
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch_size: int = 250

    def __post_init__(self) -> None:
        check_between("num", self.num, 2, MOST_IMAGES)
        check_between("reference_num", self.reference_num, 2, MOST_IMAGES)
        check_between("batch_size", self.batch_size, 1, MOST_IMAGES)
        for name, values in (("metrics", self.metrics), ("features", self.features)):
            check_different(name, values)
            if not values and (name == "metrics" or self.of_images):
                raise ConfigError(name, list(values), "is empty", "Give at least one.")
        for metric in self.of_images:
            if "text_NE" in METRICS.choose("metrics", metric).needs:
                problem = "compares images with prompts, of which an ablation has none"
                raise ConfigError("metrics", metric, problem, "Leave it out; `msdiff evaluate` computes it.")
        for name in self.feature_weights:
            if name not in self.features:
                raise ConfigError("feature_weights", name, "is not among the features", "Add it there, or remove it.")

    @property
    def of_images(self) -> tuple[str, ...]:
        """The metrics that are computed of images."""
        return tuple(name for name in self.metrics if name != LOSS)


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """An ablation file.

    recipe: path of the recipe, relative to this file.
    variants: by name, the dotted recipe fields that each changes; a field `recipe` among them replaces the common
        recipe. The first variant is the baseline.
    changes: dotted recipe fields that all variants change.
    grid: by the name of a variant, dotted recipe fields and the values that each takes. Every combination is a variant
        more, that one with these changes.
    budget: 1e15 floating-point operations of every run's training, forward and backward; train.steps follows from it.
    score: how runs are scored.
    baselines: variants besides the first to whose last scores the others are compared too.
    seeds: train.seed of each variant's runs, and the seed of the images generated with them.
    points: fractions of the budget after which a run is scored, ascending to 1.
    levels: the scores to which compute is compared: those that the baseline has after these fractions of its budget,
        and its best one.
    """

    recipe: str
    variants: dict[str, dict[str, Any]]
    budget: float
    score: ScoreConfig
    changes: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    points: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    levels: tuple[Level, ...] = (0.5, 0.75, 1.0, "best")

    def __post_init__(self) -> None:
        for name, values in (("variants", self.variants), ("seeds", self.seeds), ("points", self.points)):
            if not values:
                raise ConfigError(name, values, "is empty", "Give at least one.")
        for name in self.variants:
            if not re.fullmatch(r"[\w+=-][\w.+=-]*", name):
                raise ConfigError("variants", name, "cannot name a folder", "Use letters, digits, and any of _-+=.")
            check_name("variants", name)
        check_grid(self.variants, self.grid)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", list(self.seeds), "names a seed twice", "Remove one.")
        for seed in self.seeds:
            check_seed("seeds", seed)
        if not self.budget > 0:
            raise ConfigError("budget", self.budget, "must be above 0", "Give 1e15 operations of a run.")
        points = list(self.points)
        if points != sorted(set(points)) or not 0 < points[0] <= points[-1] == 1:
            raise ConfigError("points", points, "must ascend inside (0, 1] and end with 1", "Write [0.25, 0.5, 1].")
        check_different("levels", self.levels)
        for level in self.levels:
            if not isinstance(level, str) and not points[0] <= level <= 1:
                problem = f"lies outside the points, from {points[0]} to 1, between which scores are known"
                raise ConfigError("levels", level, problem, "Choose fractions of the budget among them, or best.")
        check_different("baselines", self.baselines)
        first, *others = self.variants
        for name in self.baselines:
            if name not in others and not self.grid:  # which gives more variants
                problem = "is the first variant, to which all are compared" if name == first else "is no variant"
                remedy = "Remove it." if name == first else f"Choose among {', '.join(others) or 'no others'}."
                raise ConfigError("baselines", name, problem, remedy)
        for fixed in ("train.steps", "train.seed"):
            if any(fixed in change for change in (self.changes, *self.variants.values(), *self.grid.values())):
                raise ConfigError(fixed, "given", "follows from the budget and the seeds", "Remove it.")


def load_ablation(path: Path, overrides: list[str]) -> tuple[AblationConfig, Places]:
    """Read an ablation file and apply dotted overrides (`budget=0.01`); also returns where each field was given.

    Its `grid` has become variants.

    Raises:
        ConfigError: naming every wrong field and its line.
    """
    document = read_mapping(path, overrides, "SWEEP")
    config, places = document.parsed(lambda mapping: from_mapping(AblationConfig, mapping)), document.places
    return replace(config, variants=with_grid(config.variants, config.grid, places), grid={}), places
