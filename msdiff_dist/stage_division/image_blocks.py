"""A whole data set as blocks of flat samples, for statistics that pass over it. It is shards, images or an IDX file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msdiff_dist.data.image_files import IMAGE_FIELDS, UNREADABLE, ImageReading, read_image
from msdiff_dist.data.index import find_shards
from msdiff_dist.data.make.idx import read_idx
from msdiff_dist.data.npy import read_npy
from msdiff_dist.data.tar_members import TarError, samples
from msdiff_dist.errors import DataError

Samples = NDArray[Any]
"""Flat samples [n, d], or one [d]: uint8 pixels or floating-point latents."""

_ROWS = 2000  # samples in a block, and in a source where there are no shards
_KEPT_BYTES = 2 << 30  # decoded samples that are kept in memory between passes


@dataclass(frozen=True)
class BlockSource:
    """The samples `first` to `first + count - 1` of a data set. `read` decodes them, [count, d]."""

    first: int
    count: int
    read: Callable[[], Samples]


class DataBlocks:
    """Passes over a data set. Each iteration yields (index of the first sample, samples [b, d]), in order.

    Up to 2 GiB of decoded samples are kept for the next pass.

    Args:
        sources: the whole data set, in order.
        rank, world_size: this rank passes over every world_size-th source, beginning with number `rank`.

    Attributes:
        count: number of samples of the whole data set.

    Raises:
        DataError: there are fewer sources than ranks. While iterating: samples are corrupt or of different sizes.
    """

    def __init__(self, sources: Sequence[BlockSource], rank: int = 0, world_size: int = 1) -> None:
        self.count = sum(source.count for source in sources)
        if len(sources) < world_size:
            problem = f"is read in {len(sources)} pieces, too few for {world_size} ranks"
            raise DataError("--data", self.count, problem, "Use fewer ranks, or more and smaller shards.")
        self._sources = sources[rank::world_size]
        self._kept: dict[int, Samples] = {}
        self._size: int | None = None  # d, from the first sample

    def __iter__(self) -> Iterator[tuple[int, Samples]]:
        for source in self._sources:
            rows = self._kept.get(source.first)
            if rows is None:
                rows = source.read()
                if sum(kept.nbytes for kept in self._kept.values()) + rows.nbytes <= _KEPT_BYTES:
                    self._kept[source.first] = rows
            self._size = self._size or rows.shape[1]
            if rows.shape[1] != self._size:
                problem = f"sample {source.first} has {rows.shape[1]} values, and others have {self._size}"
                raise DataError("--data", source.first, problem, "Bring all samples to one size.")
            for start in range(0, len(rows), _ROWS):
                yield source.first + start, rows[start : start + _ROWS]


def shard_sources(patterns: str | Sequence[str]) -> list[BlockSource]:
    """One source per shard that has samples: its images, or its .npy latents.

    Raises:
        DataError: there are no such shards, or some are corrupt.
    """
    shards = find_shards(patterns)
    firsts = accumulate((shard.num_samples for shard in shards), initial=0)
    return [
        BlockSource(first, shard.num_samples, partial(_read_shard, shard.path))
        for first, shard in zip(firsts, shards, strict=False)
        if shard.num_samples
    ]


def image_sources(path: Path) -> list[BlockSource]:
    """Images in a folder and its subfolders, in the order of their paths, or an IDX file of images, gzipped or not.

    Raises:
        DataError: the path is neither, or there are no images.
    """
    if not path.is_dir():
        rows = _read_idx_images(path)
        groups = [rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)]
        return [BlockSource(i * _ROWS, len(group), partial(np.asarray, group)) for i, group in enumerate(groups)]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_FIELDS and p.is_file())
    if not files:
        raise DataError("--images", str(path), "holds no images", f"Known: {', '.join(sorted(IMAGE_FIELDS))}.")
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
    try:
        return read_npy(latent).ravel()
    except (ValueError, OSError, EOFError) as e:
        name = f"{raw['__key__']} in {raw['__url__']}"
        raise DataError("--data", name, f"is not a readable .npy array ({e})", "Remove it.") from e


def _read_images(files: Sequence[Path]) -> Samples:
    return _stack(_pixels(path.read_bytes(), str(path)) for path in files)


def _pixels(data: bytes, name: str) -> Samples:
    try:
        return np.asarray(read_image(data, ImageReading())).ravel()
    except UNREADABLE as e:
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
