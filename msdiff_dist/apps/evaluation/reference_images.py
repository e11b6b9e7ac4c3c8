"""The reference that a name stands for: shards, a folder of images, or an .npz file of images or statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import load_index
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.evaluation.feature_spaces import FeatureSpace
from msdiff_dist.evaluation.image_sets import ImageFolder, ImageSet, ShardImages
from msdiff_dist.evaluation.reference import read_npz, reference_of
from msdiff_dist.evaluation.scores import Reference
from msdiff_dist.terminal import track

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ReferenceImages:
    """Reference images of one shape [C, H, W]; `images` is None for an .npz file, which is read for each space."""

    name: str
    image_shape: Shape
    images: ImageSet | None = None

    def of(self, space: FeatureSpace) -> tuple[Reference, dict[str, Any]]:
        """The reference in a feature space, from the cache if it is there, and what a record says of it.

        Raises:
            DataError: it cannot be read, has images of another shape, or statistics of another space.
        """
        images = self.images
        if images is None:
            found = read_npz(Path(self.name), space)
            if isinstance(found, Reference):
                return found, {"name": self.name, "key": None, "num": None}
            images = found
        reference, features = reference_of(images, space, self.name, shown("features of the reference"))
        if features.image_shape != self.image_shape:
            raise DataError(
                "--reference", self.name, f"has images {list(features.image_shape)}, and the subject "
                f"{list(self.image_shape)} [channels, height, width]", "Compare images of one shape.",
            )  # fmt: skip
        return reference, {"name": self.name, "key": images.key, "num": len(features.features_ND)}


def how_to_read(name: str | None, trained_on: DataConfig | None) -> DataConfig:
    """How reference images are read from shards: those of a name, or those of the training.

    Raises:
        ConfigError: there is no name, and it is not known what was trained on.
    """
    if name is not None:
        return replace(trained_on or DataConfig(shards=name, image_size=1), shards=name, sources=())
    if trained_on is None:
        raise ConfigError(
            "--reference", None, "is needed: it is not known which images this was trained on",
            "Give shards, a folder of images or an .npz file.",
        )  # fmt: skip
    return trained_on


def open_reference(name: str | None, config: DataConfig, image_shape: Shape, num: int | None = None) -> ReferenceImages:
    """The reference images of a name.

    Args:
        name: shards, a folder of images or an .npz file; None: the shards of `config`.
        config: how images are read from shards, as `how_to_read` has it.
        image_shape: of the images that are compared with them.
        num: of shards and folders the first so many images; None: all.
    """
    if name is not None and name.endswith(".npz"):
        return ReferenceImages(name, image_shape)
    if name is not None and _is_image_folder(Path(name)):
        return ReferenceImages(name, image_shape, ImageFolder(Path(name), "--reference", num))
    images = ShardImages(replace(config, channels=image_shape[0], image_size=image_shape[1]), num)
    return ReferenceImages(
        name or str(config.shards or [source.shards for source in config.sources]), image_shape, images
    )


def check_reference(name: str | None, config: DataConfig, space: FeatureSpace) -> None:
    """Refuse a reference that is not there, or is of another feature space.

    Raises:
        ConfigError, DataError: what is missing, or does not fit.
    """
    if name is not None and name.endswith(".npz"):
        read_npz(Path(name), space)
    elif name is not None and _is_image_folder(Path(name)):
        ImageFolder(Path(name), "--reference").files  # noqa: B018
    else:
        load_index(config)


def shown(what: str) -> Callable[[Iterable[Tensor]], Iterable[Tensor]]:
    """Batches, with their progress shown."""
    return lambda batches: track(batches, what, "batches")


def _is_image_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.tar"))
