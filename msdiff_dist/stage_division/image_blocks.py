"""A whole data set as blocks of flat samples, for statistics that stream over it: shards, images, or an IDX file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msdiff_dist.data.index import find_shards
from msdiff_dist.data.make.idx import read_idx
from msdiff_dist.data.make.pack import EXTENSIONS
from msdiff_dist.data.samples import IMAGE_FIELDS
from msdiff_dist.data.tar_members import TarError, samples
from msdiff_dist.errors import DataError

Samples = NDArray[Any]

_ROWS = 2000
_KEPT_BYTES = 2 << 30


@dataclass(frozen=True)
class BlockSource:
    """Samples first .. first + count - 1 of a data set; `read` returns them as [count, d], uint8 pixels or floats."""

    first: int
    count: int
    read: Callable[[], Samples]


class DataBlocks:
    """Blocks (first index, [b, d]) of a data set, in order. What was decoded is kept for the next pass, up to 2 GiB.

    Args:
        rank, world_size: this one yields every world_size-th part only.

    Raises:
        DataError: while reading, samples that are corrupt or of different sizes; at once, fewer parts than ranks.
    """

    def __init__(self, parts: Sequence[BlockSource], rank: int = 0, world_size: int = 1) -> None:
        self.count = sum(part.count for part in parts)
        if len(parts) < world_size:
            problem = f"has {len(parts)} parts for {world_size} ranks"
            raise DataError("--data", self.count, problem, "Use fewer ranks, or more and smaller shards.")
        self._parts = parts[rank::world_size]
        self._kept: dict[int, Samples] = {}
        self._size: int | None = None

    def __iter__(self) -> Iterator[tuple[int, Samples]]:
        for part in self._parts:
            rows = self._kept.get(part.first)
            if rows is None:
                rows = part.read()
                if sum(kept.nbytes for kept in self._kept.values()) + rows.nbytes <= _KEPT_BYTES:
                    self._kept[part.first] = rows
            self._size = self._size or rows.shape[1]
            if rows.shape[1] != self._size:
                problem = f"sample {part.first} has {rows.shape[1]} values, others {self._size}"
                raise DataError("--data", part.first, problem, "Bring all samples to one size.")
            for start in range(0, len(rows), _ROWS):
                yield part.first + start, rows[start : start + _ROWS]


def shard_parts(patterns: str | Sequence[str]) -> list[BlockSource]:
    """One part a shard: its images, or its .npy latents.

    Raises:
        DataError: no such shards, or corrupt ones.
    """
    shards = find_shards(patterns)
    firsts = accumulate((shard.num_samples for shard in shards), initial=0)
    return [
        BlockSource(first, shard.num_samples, partial(_read_shard, shard.path))
        for first, shard in zip(firsts, shards, strict=False)
        if shard.num_samples
    ]


def image_parts(path: Path) -> list[BlockSource]:
    """The images below a folder in the order of their names, or an IDX file of images, gzipped or not.

    Raises:
        DataError: neither of them, or nothing inside.
    """
    if not path.is_dir():
        rows = _read_idx_images(path)
        groups = [rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)]
        return [BlockSource(i * _ROWS, len(group), partial(np.asarray, group)) for i, group in enumerate(groups)]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower().lstrip(".") in EXTENSIONS and p.is_file())
    if not files:
        raise DataError("--images", str(path), "holds no images", f"Known: {', '.join(sorted(EXTENSIONS))}.")
    return [
        BlockSource(i, len(files[i : i + _ROWS]), partial(_read_images, files[i : i + _ROWS]))
        for i in range(0, len(files), _ROWS)
    ]


def _read_shard(path: str) -> Samples:
    try:
        return _stack(_flat_sample(raw) for raw in samples(path))
    except (TarError, OSError) as e:
        raise DataError("--data", path, f"is corrupt ({e})", "Copy or make the shard again.") from e


def _flat_sample(raw: dict[str, Any]) -> Samples:
    image = next((raw[name] for name in IMAGE_FIELDS if name in raw), None)
    if image is not None:
        return _pixels(image, f"{raw['__key__']} in {raw['__url__']}")
    latent = next((raw[name] for name in ("latent.npy", "npy") if name in raw), None)
    if latent is None:
        problem = f"sample {raw['__key__']!r} has neither an image nor a latent"
        raise DataError("--data", raw["__url__"], problem, "Name shards of images, or of .npy or .latent.npy arrays.")
    found: Samples = np.load(io.BytesIO(latent), allow_pickle=False).ravel()
    return found


def _read_images(files: Sequence[Path]) -> Samples:
    return _stack(_pixels(path.read_bytes(), str(path)) for path in files)


def _pixels(data: bytes, name: str) -> Samples:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")).ravel()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError("--data", name, f"is not a readable image ({e})", "Remove it.") from e


def _stack(rows: Iterator[Samples]) -> Samples:
    listed = list(rows)
    if len({len(row) for row in listed}) > 1:
        sizes = sorted({len(row) for row in listed})
        raise DataError("--data", sizes, "samples have different numbers of values", "Bring all samples to one size.")
    return np.stack(listed)


def _read_idx_images(path: Path) -> Samples:
    try:
        images = read_idx(path)
        if images.ndim < 2:
            raise ValueError("not an IDX file of images")
        return images.reshape(len(images), -1)
    except FileNotFoundError:
        raise DataError("--images", str(path), "does not exist", "Name a folder of images or an IDX file.") from None
    except (OSError, ValueError) as e:
        raise DataError(
            "--images", str(path), f"is not readable ({e})", "Name a folder of images or an IDX file."
        ) from e
