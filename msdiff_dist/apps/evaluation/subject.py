"""What is evaluated: a folder of image files, or a run, checkpoint or export whose images are sampled."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msdiff_dist.checkpoint.layout import INDEX
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import load_index
from msdiff_dist.data.tar_members import samples
from msdiff_dist.errors import CheckpointError, DataError
from msdiff_dist.evaluation.image_sets import ImageFolder
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.export.weights import CONFIG, Weights, open_checkpoint, open_weights
from msdiff_dist.recipe import Recipe, stored_recipe

FOLLOWED, TRAINING = "evaluations/.followed", "evaluations/.training"
"""Folders of a run that keep what is evaluated: checkpoints for a follower, and averages of a run that is trained."""


@dataclass(frozen=True)
class Subject:
    """A model, or a folder of images where `weights` is None.

    Attributes:
        path: run, checkpoint, export or folder.
        weights: the model's.
        recipe: of the model's training; None for exports.
    """

    path: Path
    weights: Weights | None = None
    recipe: Recipe | None = None

    @property
    def images(self) -> DataConfig | None:
        """The images that the model was trained on, themselves or their latents; None where unknown."""
        return None if self.recipe is None else self.recipe.reference_images()

    def sampled_into(self, job: SamplingJob) -> Path:
        """The folder for images of a job: a name for each job under the run's, or beside the export's, own folder."""
        assert self.weights is not None
        settings = json.dumps(job.settings(self.weights), sort_keys=True)
        return self.home / "evaluations" / hashlib.sha256(settings.encode()).hexdigest()[:12]

    @property
    def home(self) -> Path:
        """The folder that keeps the evaluations: the run's, for its checkpoints too."""
        if (self.path / INDEX).is_file():
            for place in ("checkpoints", FOLLOWED, TRAINING):
                if self.path.parent.parts[-place.count("/") - 1 :] == tuple(place.split("/")):
                    return self.path.parents[place.count("/") + 1]
        return self.path

    def described(self) -> dict[str, Any]:
        """The subject as JSON values."""
        kept = self.path.parent.name in (Path(FOLLOWED).name, Path(TRAINING).name)  # as long as it is evaluated
        about: dict[str, Any] = {"subject": str(self.home if kept else self.path)}
        if self.weights is not None:
            described = self.weights.description
            about |= {"recipe": described.name, "step": described.step, "weights": described.weights}
            about["sha256"] = self.weights.identity()
        return about


def open_subject(path: Path, ema: bool) -> Subject:
    """A model, or a folder of images.

    Raises:
        DataError: there is no such folder, or it holds neither.
        CheckpointError: its weights are corrupt.
    """
    if not path.is_dir():
        raise DataError("SUBJECT", str(path), "is no folder", "Name a run, checkpoint, export or folder of images.")
    is_checkpoint = (path / INDEX).is_file() or (path / "checkpoints").is_dir()
    if not is_checkpoint and not (path / CONFIG).is_file():
        try:
            ImageFolder(path, "SUBJECT").files  # noqa: B018
        except DataError:
            problem = "is no run, checkpoint or export, and holds no images"
            raise DataError("SUBJECT", str(path), problem, "Name one of these.") from None
        return Subject(path)
    weights = open_weights(path, ema=ema)
    recipe = stored_recipe(dict(open_checkpoint(path).index.recipe)) if is_checkpoint else None
    return Subject(path, weights, recipe)


def with_prompts(job: SamplingJob, weights: Weights, images: DataConfig | None) -> SamplingJob:
    """The job with the captions of the first images as prompts, for a model that takes text and has none.

    Raises:
        DataError: the images have no captions. CheckpointError: it is not known what the model was trained on.
    """
    if weights.description.text_encoder is None or job.prompts:
        return job
    if images is None:
        raise CheckpointError(
            "SUBJECT", weights.description.name, "takes prompts, and no reference images with captions are known",
            "Give --reference with shards that have captions.",
        )  # fmt: skip
    paths = [shard.path for shards in load_index(images) for shard in shards]
    found = itertools.islice(itertools.chain.from_iterable(samples(path) for path in paths), job.num)
    prompts = tuple(sample.get("txt", b"").decode("utf-8", "replace").strip() for sample in found)
    if not any(prompts):
        raise DataError("--reference", images.shards, "has no captions to make images from", "Pack them with captions.")
    return replace(job, prompts=prompts)
