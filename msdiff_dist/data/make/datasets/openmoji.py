"""OpenMoji's colour emoji, with their names and tags."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from msdiff_dist.data.make.datasets.labelled_image import Collection, Dataset, Split
from msdiff_dist.data.make.datasets.pictures import Picture, drawn
from msdiff_dist.data.make.packages import Package, data_of
from msdiff_dist.data.make.shard_writer import DatasetInfo
from msdiff_dist.errors import DataError

PACKAGE = Package(kind="npm", name="openmoji", version="17.0.0", folder="package")
_LIST = "data/openmoji.json"
_FOLDERS = ("color/svg", "color/618x618", "color/72x72")
_INFO = DatasetInfo(name="openmoji", licence="CC BY-SA 4.0", origin="OpenMoji, HfG Schwäbisch Gmünd: openmoji.org")


def openmoji(source: Path | None, split: Split, size: int, nproc: int = 1) -> Collection:
    """Emoji on white, captioned with their names and tags; the class is the emoji's group."""
    folder = data_of(PACKAGE, source, _LIST)
    images = next((folder / name for name in _FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise DataError("--source", str(folder), f"has none of {', '.join(_FOLDERS)}", PACKAGE.remedy())
    try:
        entries = json.loads((folder / _LIST).read_text(encoding="utf-8"))
        groups = tuple(sorted({entry["group"] for entry in entries}))
        pictures = [_picture(entry, images, groups) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        problem = f"is no list of emoji ({type(e).__name__}: {e})"
        raise DataError("--source", str(folder / _LIST), problem, "Fetch it again.") from e
    return drawn(pictures, replace(_INFO, classes=groups), split, size, nproc)


def _picture(entry: dict[str, Any], images: Path, groups: tuple[str, ...]) -> Picture:
    tags = [tag.strip() for field in ("tags", "openmoji_tags") for tag in entry.get(field, "").split(",")]
    words = dict.fromkeys([entry["annotation"], *filter(None, tags)])
    suffix = ".svg" if images.name == "svg" else ".png"
    return Picture(
        name=entry["hexcode"],
        content=images / f"{entry['hexcode']}{suffix}",
        caption=", ".join(words),
        label=groups.index(entry["group"]),
    )


OPENMOJI = Dataset(_INFO, 72, openmoji, ("nproc",))
