"""What a module of a data set defines: images with captions and labels, and a `Dataset` that yields them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from msdiff_dist.data.make.shard_writer import DatasetInfo, Fields, encode_image
from msdiff_dist.randomness import generator

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One sample of a data set."""

    key: str
    image: Image.Image
    caption: str
    label: int | None = None

    def fields(self) -> Fields:
        """The files of its sample, by extension."""
        about = {"key": self.key, "caption": self.caption, "width": self.image.width, "height": self.image.height}
        fields = {"png": encode_image(self.image), "txt": self.caption.encode()}
        if self.label is not None:
            fields["cls"] = str(self.label).encode()
            about["label"] = self.label
        return {**fields, "json": json.dumps(about, ensure_ascii=False).encode()}


@dataclass(frozen=True)
class Dataset:
    """A data set that `msdiff data prepare` knows.

    Attributes:
        info: what `dataset.json` is to say about it.
        size: default height and width in pixels.
        images: maps (source path or None, split, size) to all images of the split. A missing source is a `DataError`
            whose remedy says how to get it.
    """

    info: DatasetInfo
    size: int
    images: Callable[[Path | None, Split, int], list[LabelledImage] | Iterator[LabelledImage]]


def tenth_apart(samples: int, split: Split) -> list[int]:
    """The sample numbers of a split, in a fixed shuffled order. A fixed tenth of the samples is the test split."""
    order: list[int] = generator(0, "test split").permutation(samples).tolist()
    return order[: samples // 10] if split == "test" else order[samples // 10 :]


def centred(image: Image.Image, size: int, background: str) -> Image.Image:
    """The image in the middle of a square of height and width `size`; what does not fit is cut off."""
    canvas = Image.new(image.mode, (size, size), background)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
