"""Images inside a report: data URIs, reduced where they are large."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from msdiff_dist.apps.report.run_data import RunData

_MOST_GRIDS = 40  # of a run
_MOST_BYTES = 2_000_000  # of the grids of a run
_SIDES = (900, 640, 480, 320)  # pixels of the longer side
_GRID = re.compile(r"step_(\d+)\.png")


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with what is written under it."""

    uri: str
    label: str


def sample_grids(run: RunData, problems: list[str]) -> list[Picture]:
    """The run's sample grids through training: first and last, and an even choice of those between.

    Args:
        problems: is told of files that cannot be read.
    """
    folder = run.folder / "samples"
    found = sorted((int(m[1]), p) for p in folder.glob("step_*.png") if (m := _GRID.fullmatch(p.name)))
    if len(found) > _MOST_GRIDS:
        found = [found[round(i * (len(found) - 1) / (_MOST_GRIDS - 1))] for i in range(_MOST_GRIDS)]
    grids = []
    for step, path in found:
        try:
            grids.append(Picture(_grid(path, _MOST_BYTES // len(found)), f"step {step:,}"))
        except Exception as e:  # the many errors of a corrupt PNG
            problems.append(f"samples/{path.name} is not a readable image: {e}")
    return grids


def _grid(path: Path, most: int) -> str:
    """The file as it is where that is small enough, or else smaller and as JPEG."""
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        if path.stat().st_size <= most and max(image.size) <= _SIDES[0]:
            return _uri(path.read_bytes(), "png")
        picture = image.convert("RGB")
    for side in _SIDES:
        smaller = picture.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        smaller.save(content, format="JPEG", quality=85)
        if content.tell() <= most:
            break
    return _uri(content.getvalue(), "jpeg")


def picture_of(image: Image.Image) -> str:
    """A small image as a data URI, without loss."""
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return _uri(content.getvalue(), "png")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
