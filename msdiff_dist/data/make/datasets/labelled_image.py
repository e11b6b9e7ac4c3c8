"""What a data set to prepare is made of."""

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
    """An image and what is known of it."""

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
        size: default height and width in pixels.
        images: (source path or None, split, size) to all images of the split. It refuses a missing source with
            a `DataError` that says how to get it.
    """

    info: DatasetInfo
    size: int
    images: Callable[[Path | None, Split, int], list[LabelledImage] | Iterator[LabelledImage]]


def tenth_apart(samples: int, split: Split) -> list[int]:
    """A fixed tenth of the samples is for test; both splits are in a fixed shuffled order."""
    order: list[int] = generator(0, "test split").permutation(samples).tolist()
    return order[: samples // 10] if split == "test" else order[samples // 10 :]


def centred(image: Image.Image, size: int, background: str) -> Image.Image:
    """The image in the middle of a square of `size` pixels; a larger one is cut."""
    canvas = Image.new(image.mode, (size, size), background)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
