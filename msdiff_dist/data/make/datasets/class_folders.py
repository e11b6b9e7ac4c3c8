"""Pictures in class folders, as two Debian packages install them: clip art, and stamps with captions."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from msdiff_dist.data.make.datasets.labelled_image import Collection, Dataset, Split
from msdiff_dist.data.make.datasets.pictures import Picture, drawn
from msdiff_dist.data.make.packages import Package, data_of
from msdiff_dist.data.make.shard_writer import DatasetInfo
from msdiff_dist.errors import DataError

_CLIPART = DatasetInfo(name="clipart", licence="public domain", origin="Open Clip Art Library: openclipart.org")
_STAMPS = DatasetInfo(
    name="stamps", licence="GPL-2.0-or-later", origin="Bill Kendrick and others: Tux Paint stamps, tuxpaint.org"
)


def class_folders(
    source: Path | None, split: Split, size: int, nproc: int = 1, *, package: Package, info: DatasetInfo
) -> Collection:
    """Every PNG file below a class folder, and every SVG file without a PNG file of its name, on white.

    A `NAME.txt` beside it begins with its English caption. Without one, the caption is the file's name.
    """
    folder = data_of(package, source, ".")
    found = sorted(path for path in folder.glob("*/**/*.png") if path.is_file())
    found += sorted(path for path in folder.glob("*/**/*.svg") if not path.with_suffix(".png").is_file())
    if not found:
        raise DataError("--source", str(folder), "holds no class folders with PNG or SVG files", package.remedy())
    classes = tuple(sorted({path.relative_to(folder).parts[0] for path in found}))
    pictures = [
        Picture(
            name=path.relative_to(folder).as_posix(),
            content=path,
            caption=_caption(path),
            label=classes.index(path.relative_to(folder).parts[0]),
        )
        for path in found
    ]
    return drawn(pictures, replace(info, classes=classes), split, size, nproc)


def _caption(path: Path) -> str:
    # A picture that Tux Paint has mirrored already shares the caption of the other.
    beside = path.with_name(path.stem.removesuffix("_mirror") + ".txt")
    if beside.is_file():
        lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip():
            return lines[0].strip()
    return " ".join(path.stem.replace("_", " ").replace("-", " ").split())


def _dataset(info: DatasetInfo, package: str, folder: str) -> Dataset:
    of = Package(kind="Debian", name=package, folder=folder)
    return Dataset(info, 64, functools.partial(class_folders, package=of, info=info), ("nproc",))


CLIPART = _dataset(_CLIPART, "openclipart-png", "usr/share/openclipart/png")
STAMPS = _dataset(_STAMPS, "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
