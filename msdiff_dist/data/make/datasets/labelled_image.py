"""What a module of a data set defines: images with captions and labels, and a `Dataset` that yields them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from msdiff_dist.data.make.shard_writer import DatasetInfo, Fields, encode_image
from msdiff_dist.randomness import generator

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One sample of a data set.

    Attributes:
        image: pixels, or a PNG file of them.
        source: what the image was made of, by name.
    """

    key: str
    image: Image.Image | bytes
    caption: str
    label: int | None = None
    source: str | None = None

    def fields(self) -> Fields:
        """The files of its sample, by extension."""
        png = self.image if isinstance(self.image, bytes) else encode_image(self.image)
        width, height = struct.unpack(">II", png[16:24])  # of the chunk IHDR, which is the first
        about = {"key": self.key, "caption": self.caption, "width": width, "height": height}
        fields = {"png": png, "txt": self.caption.encode()}
        if self.label is not None:
            fields["cls"] = str(self.label).encode()
            about["label"] = self.label
        if self.source is not None:
            about["source"] = self.source
        return {**fields, "json": json.dumps(about, ensure_ascii=False).encode()}


@dataclass(kw_only=True)
class Collection:
    """Images of a data set whose classes and licence depend on what is in its source.

    Attributes:
        info: what `dataset.json` is to say.
        images: all images of the split.
        most: how many images there are, if all can be made; None: not known.
        left_out: what no images can be made of, by name, each with the reason; complete after the last image.
    """

    info: DatasetInfo
    images: Iterable[LabelledImage]
    most: int | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """A data set that `msdiff data prepare` knows.

    Attributes:
        info: what `dataset.json` is to say about it.
        size: default height and width in pixels.
        images: maps (source path or None, split, size) to all images of the split, or to a `Collection` of them. A
            missing source is a `DataError` whose remedy says how to get it.
        options: further options of the command, which `images` takes as keywords where they are given.
    """

    info: DatasetInfo
    size: int
    images: Callable[..., Iterable[LabelledImage] | Collection]
    options: tuple[str, ...] = ()

    def collect(self, source: Path | None, split: Split, size: int | None, options: dict[str, Any]) -> Collection:
        """Its images, of its own size if `size` is None."""
        found = self.images(source, split, size or self.size, **options)
        return found if isinstance(found, Collection) else Collection(info=self.info, images=found)


def tenth_apart(samples: int, split: Split) -> list[int]:
    """The sample numbers of a split, in a fixed shuffled order. A fixed tenth of the samples is the test split."""
    order: list[int] = generator(0, "test split").permutation(samples).tolist()
    return order[: samples // 10] if split == "test" else order[samples // 10 :]


def centred(image: Image.Image, size: int, background: str) -> Image.Image:
    """The image in the middle of a square of height and width `size`; what does not fit is cut off."""
    canvas = Image.new(image.mode, (size, size), background)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
