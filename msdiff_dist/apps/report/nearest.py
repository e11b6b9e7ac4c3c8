"""Copying or learning: the training images nearest to samples, in the features of a network that was not trained here.

A model that copies makes images that are nearer to a training image than training images are to each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.apps.evaluation.subject import Subject
from msdiff_dist.apps.report.pictures import Picture, picture_of
from msdiff_dist.apps.report.run_data import RunData
from msdiff_dist.apps.report.strip import as_image, preview_job
from msdiff_dist.errors import DataError
from msdiff_dist.evaluation.feature_spaces import load_feature_space
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.image_sets import ShardImages
from msdiff_dist.evaluation.reference import reference_of
from msdiff_dist.export.weights import CheckpointWeights, open_checkpoint
from msdiff_dist.terminal import track

_NEIGHBOURS = 4
_SPACE = "mobilenet"


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Samples with their nearest training images.

    Attributes:
        step: of the checkpoint that made the samples.
        rows: for each sample itself, then its neighbours with their distances.
        trained_on: number of training images that were looked at.
        closer: samples that are nearer to a training image than half of the training images are to another one.
        median: that distance: 1 - cosine of the features.
    """

    step: int
    rows: list[list[Picture]]
    trained_on: int
    closer: int
    median: float


def nearest_images(run: RunData, num: int, device: torch.device) -> Nearest:
    """Sample `num` images as the run's previews do, and find the training images nearest to each.

    Raises:
        DataError: the run's training images are not known or cannot be read.
        ConfigError: the weights of the feature network are not installed. CheckpointError: as `open_checkpoint`.
    """
    config = Subject(run.folder, recipe=run.recipe).images
    if config is None or run.recipe is None:
        raise DataError(
            "--nearest", str(run.folder), "it is not known which images this run was trained on",
            "Give it for runs on images, or on latents whose recipe has encode.data.",
        )  # fmt: skip
    space = load_feature_space(_SPACE, None, device)
    reader = open_checkpoint(run.folder)
    generator = ImageGenerator(CheckpointWeights(reader), device)
    job = preview_job(run, num)
    drawn = torch.cat([job.draw(generator, batch) for batch in job.batches])
    channels, size = drawn.shape[1], drawn.shape[2]
    images = ShardImages(replace(config, channels=channels, image_size=size))
    name = str(config.shards)
    _, features = reference_of(images, space, name, lambda batches: track(batches, "features", "batches"))
    own_ND, theirs_MD = _unit(space(drawn)[0].double().numpy()), _unit(features.features_ND)
    near_NM = 1 - own_ND @ theirs_MD.T
    found_NK = np.argsort(near_NM, axis=1)[:, :_NEIGHBOURS]
    pixels = _pixels(images, {int(i) for i in found_NK.ravel()})
    rows = [
        [
            Picture(picture_of(as_image(drawn[n])), f"sample {n}"),
            *(Picture(picture_of(as_image(pixels[int(m)])), f"{near_NM[n, m]:.3f}") for m in found_NK[n]),
        ]
        for n in range(num)
    ]
    median = _median_distance(theirs_MD)
    return Nearest(
        step=reader.index.step,
        rows=rows,
        trained_on=len(theirs_MD),
        closer=int((near_NM.min(axis=1) < median).sum()),
        median=median,
    )


def _unit(features_ND: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return np.asarray(features_ND / np.maximum(lengths, 1e-12))


def _median_distance(features_MD: np.ndarray) -> float:
    """Median over training images of the distance to the nearest other one; of a thousand among many."""
    chosen = np.linspace(0, len(features_MD) - 1, min(1000, len(features_MD))).astype(int)
    near_nM = 1 - features_MD[chosen] @ features_MD.T
    near_nM[np.arange(len(chosen)), chosen] = np.inf  # itself
    return float(np.median(near_nM.min(axis=1)))


def _pixels(images: ShardImages, wanted: set[int]) -> dict[int, Tensor]:
    """The images of a set with these numbers."""
    found: dict[int, Tensor] = {}
    start = 0
    for batch in images.batches():
        found |= {i: batch[i - start] for i in wanted if start <= i < start + len(batch)}
        start += len(batch)
        if len(found) == len(wanted):
            break
    return found
