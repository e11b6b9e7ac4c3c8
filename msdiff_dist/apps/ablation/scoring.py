"""The scores of one checkpoint: the held-out loss, and metrics of its images in several feature spaces.

The images are sampled once, and each batch passes through all feature spaces before the next is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist.apps.ablation.config import LOSS, ScoreConfig
from msdiff_dist.apps.ablation.held_out import HeldOut
from msdiff_dist.apps.ablation.score_file import ScoreSet, json_values
from msdiff_dist.apps.evaluation.reference_images import ReferenceImages, how_to_read, open_reference
from msdiff_dist.apps.evaluation.subject import with_prompts
from msdiff_dist.apps.train.found_data import FoundData
from msdiff_dist.config import to_mapping
from msdiff_dist.diffusion.sampling import sampler_restarts
from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.evaluation.feature_spaces import FeatureSpace, load_feature_space
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.reference import Features, joined
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.evaluation.scores import METRICS, Reference, ScoredImages
from msdiff_dist.export.weights import Weights
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.recipe import Recipe
from msdiff_dist.terminal import LongWork

_FIELDS = {
    "--features": "score.features",
    "--feature-weights": "score.feature_weights",
    "--metrics": "score.metrics",
    "--reference": "score.reference",
}
"""Fields of an ablation file by the options of `msdiff evaluate`, which messages name."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is scored: a recipe that was trained, and the seed of the images that are made with it."""

    recipe: Recipe
    seed: int


class Scoring:
    """The scores of an ablation.

    Args:
        baseline: the first variant's recipe, which decides on held-out samples and reference images.
        found: its data.

    Raises:
        ConfigError, DataError: weights, images or held-out samples are missing, or do not fit each other.
    """

    def __init__(self, config: ScoreConfig, baseline: Recipe, found: FoundData, device: torch.device) -> None:
        self.config, self.device = config, device
        self._held_out = HeldOut(baseline, found) if LOSS in config.metrics else None
        self._held_out_about = self._held_out.about() if self._held_out else {}
        self._image_shape = image_shape(baseline)
        self._spaces: list[FeatureSpace] = []
        self._references: dict[str, Reference] = {}
        if not config.of_images:
            return
        with _fields_named():
            self._images_config = how_to_read(config.reference, baseline.reference_images())
            self._reference = open_reference(
                config.reference, self._images_config, self._image_shape, config.reference_num
            )
            self._reference_key = _key(self._reference)
            self._spaces = [self._opened(name) for name in config.features]
        for name in {space.name for space in self._spaces}:
            if [space.name for space in self._spaces].count(name) > 1:
                problem = "two of them have this name, by which results tell them apart"
                raise ConfigError("score.features", name, problem, "Rename a file.")

    def check(self, recipe: Recipe) -> None:
        """Refuse a variant whose scores cannot be taken, or do not compare with the baseline's.

        Raises:
            ConfigError: naming the field.
        """
        if self._held_out:
            self._held_out.check(recipe)
        if not self.config.of_images:
            return
        self.config.sampler.for_process(recipe.process())
        if image_shape(recipe) != self._image_shape:
            problem = f"makes images {list(image_shape(recipe))}, and the baseline {list(self._image_shape)}"
            raise ConfigError("data", recipe.name, problem, "Compare images of one shape.")

    def sets(self, subject: Subject) -> list[ScoreSet]:
        """What is taken of each checkpoint of a run."""
        sets = []
        if self._held_out:
            sets.append(ScoreSet(prefix="", metrics=(LOSS,), about=self._held_out_about, label="held-out loss"))
        for space in self._spaces:
            sampler = self.config.sampler.for_process(subject.recipe.process())
            named = to_mapping(sampler)
            if not sampler_restarts(subject.recipe.process(), subject.recipe.partition(), sampler):
                del named["restart"]  # which decides nothing
            about = {
                "features": space.identity,
                "num": self.config.num,
                "seed": subject.seed,
                "sampler": json_values(named),
                "reference": self._reference_key,
            }
            sets.append(ScoreSet(prefix=f"{space.name}/", metrics=self.config.of_images, about=about, label=space.name))
        return sets

    def prepare(self) -> None:
        """Compute the features of the reference images, or read them from the cache: before runs are trained.

        Raises:
            DataError: the reference cannot be read, is of another shape, or lacks what a metric needs.
        """
        with _fields_named():
            for space in self._spaces:
                if space.name not in self._references:
                    self._references[space.name], _ = self._reference.of(space)

    def take(
        self, subject: Subject, weights: Weights, missing: dict[str, list[str]], step: int
    ) -> Iterator[tuple[ScoreSet, str, dict[str, float]]]:
        """Take scores of a checkpoint: for each its set, metric and values.

        Args:
            missing: metrics to take, by the digest of their set.
        """
        model = ImageGenerator(weights, self.device)
        sets = [scores for scores in self.sets(subject) if missing.get(scores.digest)]
        for scores in sets:
            if self._held_out and not scores.prefix:
                yield scores, LOSS, self._held_out.of(subject.recipe, model)
        of_images = [scores for scores in sets if scores.prefix]
        if not of_images:
            return
        self.prepare()
        spaces = [space for space in self._spaces if f"{space.name}/" in {scores.prefix for scores in of_images}]
        features = self._features(subject, weights, model, spaces, f"scoring step {step}: sampling")
        for scores, space, found in zip(of_images, spaces, features, strict=True):
            images = ScoredImages(features_ND=found.features_ND, logits_NK=found.logits_NK)
            for metric in missing[scores.digest]:
                with _fields_named():
                    yield scores, metric, METRICS[metric].compute(images, self._references[space.name])

    def _features(
        self, subject: Subject, weights: Weights, model: ImageGenerator, spaces: list[FeatureSpace], what: str
    ) -> list[Features]:
        job = SamplingJob(
            num=self.config.num,
            seed=subject.seed,
            sampler=self.config.sampler.for_process(subject.recipe.process()),
            batch_size=self.config.batch_size,
        )
        job = with_prompts(job, weights, self._images_config)
        found: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in spaces]
        with LongWork(what, job.num, "images") as work:
            for index_n in job.batches:
                images = job.draw(model, index_n, work)
                for batches, space in zip(found, spaces, strict=True):
                    batches.append(space(images))
        with _fields_named():
            return [
                joined(batches, self._image_shape, space, "score.features")
                for batches, space in zip(found, spaces, strict=True)
            ]

    def _opened(self, name: str) -> FeatureSpace:
        """A feature space that takes the images and has what the metrics need, tried on one black image."""
        given = self.config.feature_weights.get(name)
        space = load_feature_space(name, Path(given).expanduser() if given else None, self.device)
        _, logits = space(torch.zeros((1, *self._image_shape), dtype=torch.uint8))
        for metric in self.config.of_images:
            if logits is None and "logits_NK" in METRICS[metric].needs:
                problem = f"needs classes in the feature space, and {space.name} has none"
                raise ConfigError("--metrics", metric, problem, "Leave it out, or choose another feature space.")
        return space


def image_shape(recipe: Recipe) -> tuple[int, int, int]:
    """[C, H, W] of the images that models of a recipe make."""
    if recipe.data.kind == "image":
        return recipe.data.x_shape
    _, height, width = recipe.latent_shape
    factor, encoded = recipe.autoencoder.factor, recipe.encode.data
    channels = encoded.channels if encoded else recipe.latent_shape[0] if recipe.autoencoder.kind == "pixel" else 3
    return channels, height * factor, width * factor


def _key(reference: ReferenceImages) -> str:
    if reference.images is not None:
        return reference.images.key
    try:
        return sha256_of(Path(reference.name))[:16]
    except OSError as e:
        raise ConfigError("--reference", reference.name, f"cannot be read ({e.strerror})", "Correct it.") from None


@contextmanager
def _fields_named() -> Iterator[None]:
    """Let errors name the fields of an ablation file instead of the options of `msdiff evaluate`."""
    try:
        yield
    except UserError as e:
        remedy = e.remedy
        for option, field in _FIELDS.items():
            remedy = remedy.replace(option, field)
        raise type(e)(_FIELDS.get(e.field, e.field), e.value, e.problem, remedy) from None
