"""`msdiff data pack`: a folder of image files to shards."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from msdiff_dist.data.make.shard_writer import (
    DatasetInfo,
    Fields,
    WrittenDataset,
    check_output,
    encode_image,
    write_dataset,
)
from msdiff_dist.data.samples import IMAGE_FIELDS
from msdiff_dist.errors import DataError
from msdiff_dist.randomness import generator

EXTENSIONS = frozenset((*IMAGE_FIELDS, "gif", "tif", "tiff"))
EXIF_ORIENTATION = 0x0112


@dataclass
class Packed:
    """The result of packing a folder.

    Attributes:
        dataset: the shards.
        left_out: the files that were skipped, each with the reason.
    """

    dataset: WrittenDataset
    left_out: list[tuple[Path, str]]


@dataclass(kw_only=True)
class _Folder:
    """A folder of images as samples.

    Attributes:
        classes: names of the top sub-folders, if they are classes; the label is the position.
        captioned: whether every image must have a caption file.
        size: height and width to crop and resize to; None keeps images as they are.
    """

    root: Path
    files: list[Path]
    classes: tuple[str, ...]
    captioned: bool
    size: int | None
    max_bad: int
    left_out: list[tuple[Path, str]] = field(default_factory=list)

    def samples(self) -> Iterator[tuple[str, Fields]]:
        """(key, fields) of every usable image; the others are added to `left_out`."""
        number = itertools.count()
        for i in generator(0, "pack order").permutation(len(self.files)).tolist():
            path = self.files[i]
            try:
                fields = self._fields(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
                self.left_out.append((path, str(e)))
                if len(self.left_out) > self.max_bad:
                    raise DataError(
                        "--max-bad", self.max_bad, f"more files than that are unusable; the last is {path} ({e})",
                        "Repair or remove them, or raise --max-bad.",
                    ) from e  # fmt: skip
            else:
                yield f"{next(number):08d}", fields

    def _fields(self, path: Path) -> Fields:
        extension, content, (width, height) = _image(path, self.size)
        fields = {extension: content}
        about: dict[str, object] = {"source": path.relative_to(self.root).as_posix(), "width": width, "height": height}
        name = path.relative_to(self.root).parts[0] if self.classes else None
        if name is not None:
            about["label"] = self.classes.index(name)
            fields["cls"] = str(about["label"]).encode()
        # The caption file decides. Without one, the class is the caption.
        side_car = path.with_suffix(".txt")
        if side_car.is_file():
            caption = side_car.read_text(encoding="utf-8").strip()
        elif self.captioned:
            raise ValueError(f"no caption {side_car.name} beside it")
        else:
            caption = name.replace("_", " ") if name else ""
        if caption:
            about["caption"] = caption
            fields["txt"] = caption.encode()
        return {**fields, "json": json.dumps(about, ensure_ascii=False).encode()}


def pack(images: Path, out: Path, size: int | None = None, samples_per_shard: int = 1000, max_bad: int = 10) -> Packed:
    """Write a folder of images as shards, in a fixed shuffled order.

    If every image lies in a sub-folder, the top sub-folders are classes. A `NAME.txt` beside `NAME.jpg` is its
    caption; if one image has one, all must. With `size`, images are cropped to the central square and resized.

    Raises:
        DataError: no images, more than `max_bad` unusable ones, or `out` is in use.
    """
    check_output(out)
    if not images.is_dir():
        raise DataError("IMAGES_DIR", str(images), "is not a folder", "Name the folder that holds the images.")
    files = sorted(p for p in images.rglob("*") if p.suffix.lower().lstrip(".") in EXTENSIONS and p.is_file())
    if not files:
        known = ", ".join(sorted(EXTENSIONS))
        raise DataError("IMAGES_DIR", str(images), "holds no images", f"Known extensions: {known}.")
    parts = [p.relative_to(images).parts for p in files]
    classes = tuple(sorted({p[0] for p in parts})) if all(len(p) > 1 for p in parts) else ()
    captioned = any(p.with_suffix(".txt").is_file() for p in files)
    folder = _Folder(root=images, files=files, classes=classes, captioned=captioned, size=size, max_bad=max_bad)
    info = DatasetInfo(name=images.resolve().name, licence="not stated", origin="msdiff data pack", classes=classes)
    dataset = write_dataset(out, info, folder.samples(), itertools.repeat(samples_per_shard))
    return Packed(dataset, folder.left_out)


def _image(path: Path, size: int | None) -> tuple[str, bytes, tuple[int, int]]:
    """(extension, file content, (width, height)). A file that needs no change is kept byte for byte, others are PNG."""
    with Image.open(path) as image:
        image.load()
        extension = path.suffix.lower().lstrip(".")
        is_plain = image.mode in ("L", "RGB") and image.getexif().get(EXIF_ORIENTATION, 1) == 1
        if size is None and is_plain and extension in IMAGE_FIELDS:
            return extension, path.read_bytes(), image.size
        upright = _opaque(ImageOps.exif_transpose(image))
    if size is not None:
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    return "png", encode_image(upright), upright.size


def _opaque(image: Image.Image) -> Image.Image:
    """The image in grey or RGB, with white behind what is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
