"""Shard lists: which tar files, and how many samples each holds."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand

from msdiff_dist.data.shard_writer import INDEX_NAME
from msdiff_dist.data.tar_members import TarError, count_samples
from msdiff_dist.errors import DataError

FIELD = "data.shards"


@dataclass(frozen=True)
class Shard:
    """One tar file and the number of samples in it."""

    path: str
    num_samples: int


def resolve_shards(patterns: str | Sequence[str]) -> list[str]:
    """Expand folders, braces and globs to existing tar files, in a reproducible order.

    Raises:
        DataError: a pattern that matches nothing, shards that are missing or named twice, an address of another kind.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise DataError(FIELD, pattern, "is not a path on this machine", "Copy the shards to a local folder.")
        for name in _expand_braces(pattern):
            if Path(name).is_dir():
                found = sorted(glob.glob(f"{glob.escape(name)}/*.tar"))
            elif Path(name).exists() or not glob.has_magic(name):
                found = [name]
            else:
                found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise DataError(FIELD, pattern, "matches no shards", "Correct it, or make shards with `msdiff data`.")
            paths += found
    if not paths:
        raise DataError(FIELD, patterns, "matches no shards", "Correct it, or make shards with `msdiff data`.")
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise DataError(FIELD, patterns, f"shards not found: {_some(missing)}", "Correct the path or the range.")
    twice = [path for path in dict.fromkeys(paths) if paths.count(path) > 1] if len(set(paths)) < len(paths) else []
    if twice:
        raise DataError(FIELD, patterns, f"names shards twice: {_some(twice)}", "Remove the overlap.")
    return paths


def read_index(paths: Iterable[str]) -> list[Shard]:
    """Sample counts from the `index.json` (wids format) beside the shards; shards it does not list are scanned.

    Raises:
        DataError: a damaged index or shard, or an index that is not of these shards.
    """
    indexes: dict[Path, Mapping[str, Any]] = {}
    shards = []
    for path in paths:
        folder = Path(path).parent
        if folder not in indexes:
            indexes[folder] = _load_index(folder / INDEX_NAME)
        entry = indexes[folder].get(Path(path).name)
        if entry is None:
            shards.append(Shard(path, scan(path)))
            continue
        size = Path(path).stat().st_size
        if entry.get("filesize", size) != size:
            raise DataError(
                FIELD, path, f"has {size} bytes, but {folder / INDEX_NAME} says {entry['filesize']}",
                "The shard is cut short or changed: copy it again, or delete the index to have shards counted anew.",
            )  # fmt: skip
        shards.append(Shard(path, int(entry["nsamples"])))
    if not sum(shard.num_samples for shard in shards):
        raise DataError(FIELD, [s.path for s in shards[:3]], "the shards hold no samples", "Make them again.")
    return shards


def scan(path: str) -> int:
    """Samples in a shard, counted by reading its headers only."""
    try:
        return count_samples(path)
    except (TarError, OSError) as e:
        raise DataError(FIELD, path, f"is not a readable tar file ({e})", "Copy or make the shard again.") from e


def _load_index(path: Path) -> dict[str, Mapping[str, Any]]:
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text())
        if index["__kind__"] != "wids-shard-index-v1":
            raise ValueError(f"unknown kind {index['__kind__']!r}")
        return {Path(entry["url"]).name: entry for entry in index["shardlist"] if int(entry["nsamples"]) >= 0}
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(
            FIELD, str(path), f"is not a shard index ({e!r})", "Delete it to have shards counted anew."
        ) from e


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as e:
        raise DataError(FIELD, pattern, "has unbalanced braces", "Write a range as {00000..00007}.") from e


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
