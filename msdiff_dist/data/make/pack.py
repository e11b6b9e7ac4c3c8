"""`msdiff data pack`: a folder of image files to shards."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msdiff_dist.bounds import check_between
from msdiff_dist.data.image_files import (
    IMAGE_FIELDS,
    MOST_PIXELS_A_SIDE,
    UNREADABLE,
    ImageReading,
    fitted,
    is_plain,
    opened,
    read_image,
)
from msdiff_dist.data.make.shard_writer import (
    DatasetInfo,
    Fields,
    WrittenDataset,
    check_output,
    encode_image,
    write_dataset,
)
from msdiff_dist.errors import DataError
from msdiff_dist.randomness import generator
from msdiff_dist.terminal import track

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # and I;16 in several byte orders
_CAPTION = ".txt"


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How a folder is packed.

    Attributes:
        size: height and width to crop and resize to; None keeps images as they are.
        channels: 1 makes all images grey, 3 makes all RGB; None: RGB if any image has colours.
        classes: whether the top sub-folders are classes; None: if every image lies in one.
        reading: how image files are read.
        samples_per_shard: of every shard but the last.
        max_bad: how many unusable images are skipped.
    """

    size: int | None = None
    channels: int | None = None
    classes: bool | None = None
    reading: ImageReading = field(default_factory=ImageReading)
    samples_per_shard: int = 1000
    max_bad: int = 10

    def __post_init__(self) -> None:
        check_between("--size", self.size, 8, MOST_PIXELS_A_SIDE)


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
        images: the image files.
        captions: caption files, by the path of their images without extension, in lower case.
        classes: names of the top sub-folders, if they are classes; the label is the position.
        mode: L or RGB, of all images.
        left_out: files that are skipped, with the reason.
        unusable: how many of them are images that cannot be used.
    """

    root: Path
    images: list[Path]
    captions: dict[str, Path]
    classes: tuple[str, ...]
    mode: str
    options: PackOptions
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    unusable: int = 0

    def samples(self) -> Iterator[tuple[str, Fields]]:
        """(key, fields) of every usable image; the others are added to `left_out`."""
        number = itertools.count()
        order: list[int] = generator(0, "pack order").permutation(len(self.images)).tolist()
        for i in track(order, "packing", "images"):
            path = self.images[i]
            try:
                fields = self._fields(path)
            except UNREADABLE as e:
                self.left_out.append((path, str(e)))
                self.unusable += 1
                if self.unusable > self.options.max_bad:
                    raise DataError(
                        "--max-bad", self.options.max_bad,
                        f"more images than that are unusable; the last is {path} ({e})",
                        "Repair or remove them, or raise --max-bad.",
                    ) from e  # fmt: skip
            else:
                yield f"{next(number):08d}", fields

    def _fields(self, path: Path) -> Fields:
        extension, content, (width, height) = self._image(path)
        fields = {extension: content}
        about: dict[str, object] = {"source": path.relative_to(self.root).as_posix(), "width": width, "height": height}
        name = path.relative_to(self.root).parts[0] if self.classes else None
        if name is not None:
            about["label"] = self.classes.index(name)
            fields["cls"] = str(about["label"]).encode()
        # The caption file decides, also an empty one. Without one, the class is the caption.
        caption = name.replace("_", " ") if name else None
        if self.captions:
            beside = self.captions.get(_stem(path))
            if beside is None:
                raise ValueError(f"has no caption {path.stem}{_CAPTION} beside it")
            caption = _text(beside)
        if caption is not None:
            about["caption"] = caption
            fields["txt"] = caption.encode()
        return {**fields, "json": json.dumps(about, ensure_ascii=False).encode()}

    def _image(self, path: Path) -> tuple[str, bytes, tuple[int, int]]:
        """(extension, content, (width, height)). A file that needs no change is kept byte for byte, others are PNG."""
        size, reading = self.options.size, self.options.reading
        image = read_image(path, reading)
        with opened(path) as stored:
            if size is None and image.mode == self.mode and is_plain(stored, reading):
                return path.suffix.lower().lstrip("."), path.read_bytes(), image.size
        image = image if image.mode == self.mode else image.convert(self.mode)
        if size is not None:
            image = fitted(image, size, "cover", (0.5, 0.5))
        return "png", encode_image(image), image.size


def pack(images: Path, out: Path, options: PackOptions | None = None) -> Packed:
    """Write a folder of images as shards, in a fixed shuffled order.

    If every image lies in a sub-folder, the top sub-folders are classes. A `NAME.txt` beside `NAME.jpg` is its
    caption; if one image has one, all must. Hidden files and folders are skipped.

    Raises:
        DataError: no images, some in class folders and some beside them, more than `max_bad` unusable ones, or `out` is
            in use.
    """
    options = options or PackOptions()
    check_output(out)
    if not images.is_dir():
        raise DataError("IMAGES_DIR", str(images), "is not a folder", "Name the folder that holds the images.")
    found, captions, left_out = _sorted_out(images)
    if not found:
        known = ", ".join(sorted(IMAGE_FIELDS))
        raise DataError("IMAGES_DIR", str(images), "holds no images", f"Known extensions: {known}.")
    classes = _classes(images, found, options.classes)
    folder = _Folder(
        root=images,
        images=found,
        captions=captions,
        classes=classes,
        mode=_mode(found, options.channels),
        options=options,
        left_out=left_out,
    )
    info = DatasetInfo(name=images.resolve().name, licence="not stated", origin="msdiff data pack", classes=classes)
    dataset = write_dataset(out, info, folder.samples(), itertools.repeat(options.samples_per_shard))
    return Packed(dataset, folder.left_out)


def _sorted_out(root: Path) -> tuple[list[Path], dict[str, Path], list[tuple[Path, str]]]:
    """The images, the captions that have an image, and every other file with the reason why it is skipped."""
    images, texts, others = [], {}, []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        extension = path.suffix.lower()
        if any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts):
            others.append((path, "is hidden"))
        elif extension.lstrip(".") in IMAGE_FIELDS:
            images.append(path)
        elif extension == _CAPTION:
            texts[_stem(path)] = path
        else:
            others.append((path, "is neither an image of a known format nor a caption"))
    stems = {_stem(path) for path in images}
    others += [(path, "is a caption without an image") for stem, path in texts.items() if stem not in stems]
    return images, {stem: path for stem, path in texts.items() if stem in stems}, others


def _stem(path: Path) -> str:
    """What an image and its caption have in common: cameras and scripts disagree about upper case."""
    return str(path.with_suffix("")).lower()


def _classes(root: Path, images: Sequence[Path], asked: bool | None) -> tuple[str, ...]:
    """Names of the class folders; none if the images have no classes."""
    parts = [path.relative_to(root).parts for path in images]
    outside = [path for path, names in zip(images, parts, strict=True) if len(names) == 1]
    if asked is False or (asked is None and len(outside) == len(images)):
        return ()
    if outside:
        raise DataError(
            "IMAGES_DIR", str(outside[0]),
            f"lies beside the class folders, as do {len(outside) - 1} other images" if len(outside) < len(images)
            else "lies in no class folder",
            "Move them into a class folder, or give --no-classes.",
        )  # fmt: skip
    return tuple(sorted({names[0] for names in parts}))


def _mode(images: Sequence[Path], channels: int | None) -> str:
    """L or RGB. Only headers are read; files without a readable one do not count, and are reported when packed."""
    if channels is not None:
        return "L" if channels == 1 else "RGB"
    for path in track(images, "reading headers of", "images"):
        try:
            with opened(path) as image:
                if image.mode not in _GREY_MODES and not image.mode.startswith("I;16"):
                    return "RGB"
        except UNREADABLE:
            continue
    return "L"


def _text(path: Path) -> str:
    """A caption. Windows writes UTF-8 with a mark, and UTF-16."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding).strip()
    except UnicodeDecodeError:
        raise ValueError(f"has a caption {path.name} that is not UTF-8") from None
