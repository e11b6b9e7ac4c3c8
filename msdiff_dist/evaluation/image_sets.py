"""Sets of images to score or to compare with: a folder of image files, shards, or a batch of images in an .npz file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.fingerprint import fingerprint_shards
from msdiff_dist.data.image_files import IMAGE_FIELDS, UNREADABLE, ImageReading, read_image
from msdiff_dist.data.loader import load_index
from msdiff_dist.data.make.images import read_images
from msdiff_dist.errors import DataError

_BATCH = 256


class ImageSet(Protocol):
    """Images of one shape, in a fixed order."""

    @property
    def key(self) -> str:
        """Digest of what the images are, for caches."""

    def batches(self) -> Iterator[Tensor]:
        """All images, as uint8 [n, C, H, W]."""


@dataclass(frozen=True)
class ImageFolder:
    """The image files of one folder, in the order of their names.

    Attributes:
        folder: where they are.
        option: the command's name for it, for messages.
        num: how many of them, from the first on; None: all.
    """

    folder: Path
    option: str
    num: int | None = None

    @property
    def files(self) -> list[Path]:
        """The files.

        Raises:
            DataError: there are none, or fewer than `num`.
        """
        found = sorted(p for p in self.folder.iterdir() if p.suffix[1:].lower() in IMAGE_FIELDS and p.name[0] != ".")
        found = [path for path in found if path.name != "grid.png"]  # as `msdiff sample` writes beside its images
        if len(found) < (self.num or 1):
            problem = f"holds {len(found)} images" + (f", not the {self.num} asked for" if self.num else "")
            raise DataError(self.option, str(self.folder), problem, "Name another folder, or lower --num.")
        return found[: self.num]

    @property
    def key(self) -> str:
        """Digest of the files' names, sizes and times."""
        stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in self.files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]

    def batches(self) -> Iterator[Tensor]:
        """All images; grey ones are RGB if the first image is RGB.

        Raises:
            DataError: a file cannot be read, or the images differ in size.
        """
        files, first = self.files, None
        for start in range(0, len(files), _BATCH):
            read = [self._read(path) for path in files[start : start + _BATCH]]
            first = read[0].shape if first is None else first
            for path, image in zip(files[start:], read, strict=False):
                if image.shape[1:] != first[1:]:
                    sizes = f"{image.shape[2]}x{image.shape[1]} pixels, and the first image {first[2]}x{first[1]}"
                    raise DataError(self.option, str(path), f"has {sizes}", "Bring all images to one size.")
                if image.shape[0] > first[0]:
                    raise DataError(self.option, str(path), "has colours, and the first image is grey", "Unify them.")
            yield torch.stack([image.expand(first[0], -1, -1) for image in read])

    def _read(self, path: Path) -> Tensor:
        try:
            pixels = np.asarray(read_image(path, ImageReading()))
        except UNREADABLE as e:
            raise DataError(self.option, str(path), f"is not a readable image ({e})", "Remove or replace it.") from e
        return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


@dataclass(frozen=True)
class ShardImages:
    """The images of shards, as a recipe's `data` reads them, without mirroring or random crops."""

    config: DataConfig
    num: int | None = None

    @property
    def key(self) -> str:
        """Digest of the shards' fingerprint and of how the images are read."""
        config = self.config
        read_as = (config.reading, config.x_shape, config.resize, self.num)
        return hashlib.sha256(repr((fingerprint_shards(load_index(config)), read_as)).encode()).hexdigest()[:16]

    def batches(self) -> Iterator[Tensor]:
        """All images, or the first `num`. Errors are those of `read_images`."""
        left = self.num
        for images, _ in read_images(replace(self.config, crop="center", num_classes=None)):
            if left is not None and left <= len(images):
                yield images[:left]
                return
            left = None if left is None else left - len(images)
            yield images


@dataclass(frozen=True)
class ImageArray:
    """The images of an .npz file as ADM's evaluation uses them: `arr_0`, uint8 [N, H, W, C]."""

    path: Path
    images_NHWC: np.ndarray

    @property
    def key(self) -> str:
        """Digest of the pixels."""
        return hashlib.sha256(self.images_NHWC.tobytes()).hexdigest()[:16]

    def batches(self) -> Iterator[Tensor]:
        """All images."""
        for start in range(0, len(self.images_NHWC), _BATCH):
            yield torch.from_numpy(self.images_NHWC[start : start + _BATCH]).permute(0, 3, 1, 2)
