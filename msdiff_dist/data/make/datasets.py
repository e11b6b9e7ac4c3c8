"""Data sets that need no download: scikit-learn's digits, Debian's Fashion-MNIST, the Noto colour emoji."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from msdiff_dist.data.make.idx import read_idx
from msdiff_dist.data.make.shard_writer import (
    DatasetInfo,
    Fields,
    WrittenDataset,
    check_output,
    encode_picture,
    even_sizes,
    write_dataset,
)
from msdiff_dist.errors import DataError
from msdiff_dist.randomness import generator
from msdiff_dist.registry import Table

Split = Literal["train", "test"]
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_PIXELS = 109  # the one size of the font's bitmaps
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture and what is known of it."""

    key: str
    image: Image.Image
    caption: str
    label: int | None = None

    def fields(self) -> Fields:
        """The files of its sample, by extension."""
        about = {"key": self.key, "caption": self.caption, "width": self.image.width, "height": self.image.height}
        fields = {"png": encode_picture(self.image), "txt": self.caption.encode()}
        if self.label is not None:
            fields["cls"] = str(self.label).encode()
            about["label"] = self.label
        return {**fields, "json": json.dumps(about, ensure_ascii=False).encode()}


@dataclass(frozen=True)
class Dataset:
    """A data set that `msdiff data prepare` knows.

    Attributes:
        size: default height and width in pixels.
        pictures: (source path or None, split, size) to all pictures of the split. It refuses a missing source with
            a `DataError` that says how to get it.
    """

    info: DatasetInfo
    size: int
    pictures: Callable[[Path | None, Split, int], list[Picture] | Iterator[Picture]]


def prepare(
    name: str, out: Path, source: Path | None = None, split: Split = "train", shards: int = 24, size: int | None = None
) -> WrittenDataset:
    """Write a known data set as shards.

    Raises:
        DataError: the source is missing or damaged, or `out` is in use.
    """
    known = DATASETS.choose("DATASET", name)
    check_output(out)
    pictures = list(known.pictures(source, split, size or known.size))
    samples = ((picture.key, picture.fields()) for picture in pictures)
    return write_dataset(out, known.info, samples, even_sizes(len(pictures), shards))


def digits(source: Path | None, split: Split, size: int) -> Iterator[Picture]:
    """8x8 handwritten digits, enlarged to three quarters of the picture. A fixed tenth of them is the test split."""
    from sklearn.datasets import load_digits

    if source is not None:
        raise DataError("--source", str(source), "has no meaning for digits: they come with scikit-learn", "Remove it.")
    data = load_digits()
    for i in _split(len(data.target), split):
        small = Image.fromarray((data.images[i] * (255 / 16)).round().astype(np.uint8))
        inner = max(size * 3 // 4, 1)
        label = int(data.target[i])
        image = _centred(small.resize((inner, inner), Image.Resampling.BICUBIC), size, "black")
        yield Picture(f"{i:05d}", image, f"a handwritten digit {label}", label)


def fashion_mnist(source: Path | None, split: Split, size: int) -> Iterator[Picture]:
    """28x28 clothes from the four IDX files, in their own order; padded, or shrunk if `size` is below 28."""
    folder = source or FASHION_FOLDER
    stem = "train" if split == "train" else "t10k"
    images = _read_fashion(folder, f"{stem}-images-idx3-ubyte", dimensions=3)
    labels = _read_fashion(folder, f"{stem}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise DataError("--source", str(folder), f"has {len(images)} images, {len(labels)} labels", "Get it anew.")
    for i, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        image = Image.fromarray(pixels)
        if size < image.width:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        caption = FASHION_CLASSES[label].lower().replace("t-shirt", "T-shirt")
        yield Picture(f"{i:05d}", _centred(image, size, "black"), caption, label)


def emoji(source: Path | None, split: Split, size: int) -> Iterator[Picture]:
    """The font's single-character pictures on white, captioned with their Unicode names. A fixed tenth is for test."""
    path = source or EMOJI_FONT
    if not path.is_file():
        remedy = "Install it (`apt-get install fonts-noto-color-emoji`) or give its file with --source."
        raise DataError("--source", str(path), "font not found", remedy)
    try:
        font = ImageFont.truetype(str(path), EMOJI_PIXELS, layout_engine=ImageFont.Layout.BASIC)
        characters = [chr(code) for code in range(0x80, 0x20000) if _is_emoji(chr(code), font)]
    except OSError as e:
        raise DataError("--source", str(path), f"is not Noto Color Emoji ({e})", "Give NotoColorEmoji.ttf.") from e
    for i in _split(len(characters), split):
        character = characters[i]
        left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
        edge = max(right - left, bottom - top)
        image = Image.new("RGB", (edge, edge), "white")
        at = ((edge - right - left) // 2, (edge - bottom - top) // 2)
        ImageDraw.Draw(image).text(at, character, font=font, embedded_color=True)
        caption = unicodedata.name(character).lower()
        yield Picture(f"{ord(character):05x}", image.resize((size, size), Image.Resampling.LANCZOS), caption)


DATASETS: Table[Dataset] = Table(
    "data set",
    {
    "digits": Dataset(
        DatasetInfo(
            "digits", "CC BY 4.0", "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, in scikit-learn",
            tuple("0123456789"),
        ),
        16, digits,
    ),
    "fashion-mnist": Dataset(
        DatasetInfo("fashion-mnist", "MIT", "Zalando Research: Fashion-MNIST", FASHION_CLASSES), 32, fashion_mnist
    ),
    "emoji": Dataset(DatasetInfo("emoji", "SIL OFL 1.1", "Google: Noto Color Emoji, with Unicode names"), 64, emoji),
})  # fmt: skip


def _split(samples: int, split: Split) -> list[int]:
    """A fixed tenth of the samples is for test; both splits are in a fixed shuffled order."""
    order = generator(0, "test split").permutation(samples).tolist()
    return order[: samples // 10] if split == "test" else order[samples // 10 :]


def _centred(image: Image.Image, size: int, background: str) -> Image.Image:
    canvas = Image.new(image.mode, (size, size), background)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def _is_emoji(character: str, font: ImageFont.FreeTypeFont) -> bool:
    name = unicodedata.name(character, "")
    if unicodedata.category(character) not in ("So", "Sm", "Po", "Pd", "Ll") or name.startswith("REGIONAL INDICATOR"):
        return False
    _, top, _, bottom = font.getbbox(character)
    return bool(name) and bottom > top


def _read_fashion(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """An array of bytes from an IDX file, gzipped or not."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        remedy = "Install it (`apt-get install dataset-fashion-mnist`) or give its folder with --source."
        raise DataError("--source", str(folder), f"{name}[.gz] not found", remedy)
    try:
        found = read_idx(path)
        if found.ndim != dimensions:
            raise ValueError(f"{found.ndim} dimensions, not {dimensions}")
        return found
    except (OSError, ValueError) as e:
        raise DataError("--source", str(path), f"is damaged ({e})", "Install or copy it again.") from e
