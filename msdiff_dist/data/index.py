"""From the patterns of a recipe to a list of shards with their sample counts.

The counts come from the `index.json` beside the shards. A shard that no index lists is scanned for them.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from numpy.typing import NDArray

from msdiff_dist.data.access import (
    DEFAULT_ACCESS,
    PIPE,
    AbsentError,
    Access,
    base_name,
    beside,
    is_local,
    matching,
    read_bytes,
)
from msdiff_dist.data.corruption import Corruption, CorruptionReport
from msdiff_dist.data.portion import Portion
from msdiff_dist.data.tar_members import TarError, sample_keys
from msdiff_dist.errors import DataError
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.terminal import track

FIELD = "data.shards"
INDEX_NAME = "index.json"
STRICT = CorruptionReport(max_bad=0)  # raises at the first corruption and keeps nothing, so it can be shared


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file.

    Attributes:
        path: path or address.
        num_samples: samples in it; of a corrupt shard without index, those before the corruption.
        size: bytes; None if that is not known without opening it.
        problem: what was found wrong with it when samples were counted, as a clause.
        portion: which of its samples are used; None: all.
    """

    path: str
    num_samples: int
    size: int | None = None
    problem: str | None = None
    portion: Portion | None = None

    @cached_property
    def used(self) -> int:
        """How many samples are used."""
        return self.num_samples if self.portion is None else int(self.used_n.sum())

    @property
    def used_n(self) -> NDArray[np.bool_]:
        """Whether each sample is used, [num_samples]."""
        if self.portion is None:
            return np.ones(self.num_samples, np.bool_)
        return self.portion.of(base_name(self.path), self.num_samples)


class IndexFiles:
    """The `index.json` files beside shards. Each is read once, when it is first asked for."""

    def __init__(self, access: Access = DEFAULT_ACCESS) -> None:
        self.access = access
        self._read: dict[str, Mapping[str, Any]] = {}

    def entries(self, address: str | None) -> Mapping[str, Any]:
        """The entries of an index by file name; empty if there is no such file.

        Raises:
            DataError: the file cannot be read, or is not an index of shards.
        """
        if address is None:
            return {}
        if address not in self._read:
            self._read[address] = _load_index(address, self.access)
        return self._read[address]


def find_shards(
    patterns: str | Sequence[str], indexes: IndexFiles | None = None, corruption: CorruptionReport = STRICT
) -> list[Shard]:
    """The shards that a recipe names, with their sample counts. Raises as `resolve_shards` and `read_index` do."""
    indexes = indexes or IndexFiles()
    return read_index(resolve_shards(patterns, indexes), indexes, corruption)


def resolve_shards(patterns: str | Sequence[str], indexes: IndexFiles | None = None) -> list[str]:
    """Expand patterns to addresses of tar files, in a reproducible order.

    A pattern is one of
    - a local folder, or a path with braces or globs;
    - an address (`s3://`, ...) of a file, or of a folder or glob if its file system can list;
    - an `http(s)://` address of a file, or of a folder, which ends in `/` and holds an index.json;
    - `pipe:command`;
    - `@list` or `list.txt`: a text file with one pattern per line, whose paths are relative to it.

    Raises:
        DataError: a pattern matches nothing, shards are missing or named twice, or a command is not allowed.
    """
    indexes = indexes or IndexFiles()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths = [path for pattern in patterns for path in _resolve(pattern, indexes)]
    if not paths:
        raise DataError(FIELD, patterns, "matches no shards", "Correct it, or make shards with `msdiff data`.")
    missing = [path for path in paths if is_local(path) and not Path(path).is_file()]
    if missing:
        raise DataError(FIELD, patterns, f"shards not found: {_some(missing)}", "Correct the path or the range.")
    # `count` takes quadratic time, so it runs only if there is a duplicate to name.
    twice = [path for path in dict.fromkeys(paths) if paths.count(path) > 1] if len(set(paths)) < len(paths) else []
    if twice:
        raise DataError(FIELD, patterns, f"names shards twice: {_some(twice)}", "Remove the overlap.")
    return paths


def read_index(
    paths: Iterable[str], indexes: IndexFiles | None = None, corruption: CorruptionReport = STRICT
) -> list[Shard]:
    """Count samples by the `index.json` (wids format) beside the shards; scan the shards it does not list.

    Raises:
        DataError: an index is corrupt or describes other shards, more shards are corrupt than `corruption` allows, or
            there are no samples.
    """
    indexes, shards = indexes or IndexFiles(), []
    for path in track([*paths], "counting samples in", "shards"):
        at = beside(path, INDEX_NAME)
        entry = indexes.entries(at).get(base_name(path))
        shards.append(
            scan(path, indexes.access, corruption) if entry is None else _indexed(path, str(at), entry, corruption)
        )
    if not sum(shard.num_samples for shard in shards):
        raise DataError(FIELD, [s.path for s in shards[:3]], "the shards hold no samples", "Make them again.")
    return shards


def scan(path: str, access: Access = DEFAULT_ACCESS, corruption: CorruptionReport = STRICT) -> Shard:
    """Count the samples of a shard by reading its headers; of a corrupt shard, those before the corruption.

    Raises:
        DataError: there is more corruption than `corruption` allows.
    """
    count, problem = 0, None

    def duplicate(key: str, what: str) -> None:
        corruption.add(Corruption(path, key, what), DataError(FIELD, path, f"sample {key!r}: {what}", "Make it again."))

    try:
        for _ in sample_keys(path, access, duplicate):
            count += 1
    except (TarError, OSError) as e:
        error = DataError(FIELD, path, f"is not a readable tar file ({e})", "Copy or make the shard again.")
        problem = f"is readable up to sample {count} only ({e})"
        corruption.add(Corruption(path, None, problem), error)
    return Shard(path=path, num_samples=count, size=_size(path), problem=problem)


def _indexed(path: str, index: str, entry: Mapping[str, Any], corruption: CorruptionReport) -> Shard:
    # A remote shard is not opened to learn its size: the index's is taken, and nothing is compared.
    found, problem = _size(path), None
    size = entry.get("filesize") if found is None else found
    if entry.get("filesize", size) != size:
        problem = f"has {size} bytes, but {index} says {entry['filesize']}"
        remedy = "It is cut short or changed: copy it again, or delete the index to have shards counted anew."
        corruption.add(Corruption(path, None, problem), DataError(FIELD, path, problem, remedy))
    return Shard(path=path, num_samples=int(entry["nsamples"]), size=size, problem=problem)


def _resolve(pattern: str, indexes: IndexFiles) -> list[str]:
    if pattern.startswith(PIPE):
        if not indexes.access.allow_pipe:
            raise DataError(
                FIELD, pattern, "runs a command, which this recipe does not allow",
                "Set data.allow_pipe: true if you trust it.",
            )  # fmt: skip
        return [pattern]
    if pattern.startswith("@") or pattern.endswith(".txt"):
        return _resolve_list(pattern.removeprefix("@"), indexes)
    paths: list[str] = []
    for name in _expand_braces(pattern):
        if not is_local(name):
            found = _resolve_remote(name, indexes)
        elif Path(name).is_dir():
            found = sorted(glob.glob(f"{glob.escape(name)}/*.tar"))
        elif Path(name).exists() or not glob.has_magic(name):
            found = [name]  # a file whose name holds `[` or `*` is itself; a missing file is reported later
        else:
            found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise DataError(FIELD, pattern, "matches no shards", "Correct it, or make shards with `msdiff data`.")
        paths += found
    return paths


def _resolve_list(path: str, indexes: IndexFiles) -> list[str]:
    try:
        lines = [line.strip() for line in read_bytes(path, indexes.access).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(FIELD, f"@{path}", f"is not a readable list of shards ({e})", "Correct its path.") from e
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            relative = is_local(line) and not line.startswith(("@", "/"))
            found += _resolve((beside(path, line) or line) if relative else line, indexes)
    return found


def _resolve_remote(address: str, indexes: IndexFiles) -> list[str]:
    try:
        if not address.startswith(("http://", "https://")):
            return matching(address, indexes.access)
        if not address.endswith("/"):
            return [address]
        listed = indexes.entries(address + INDEX_NAME)
        return [str(beside(address, name)) for name in listed]
    except OSError as e:
        raise DataError(FIELD, address, f"cannot be listed ({e})", "Correct it, or name the shards.") from e


def _size(path: str) -> int | None:
    return Path(path).stat().st_size if is_local(path) else None


def _load_index(path: str, access: Access) -> dict[str, Mapping[str, Any]]:
    try:
        index = parse_mapping(read_bytes(path, access))
        if index["__kind__"] != "wids-shard-index-v1":
            raise ValueError(f"unknown kind {index['__kind__']!r}")
        return {base_name(str(entry["url"])): _checked(entry) for entry in index["shardlist"]}
    except (AbsentError, FileNotFoundError):
        return {}
    except OSError as e:
        raise DataError(FIELD, path, f"cannot be read ({e})", "Try again, or delete it to have shards counted.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(FIELD, path, f"is not a shard index ({e!r})", "Delete it to have shards counted anew.") from e


def _checked(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry whose numbers are numbers."""
    for field, value in (("nsamples", entry["nsamples"]), ("filesize", entry.get("filesize", 0))):
        if type(value) is not int or value < 0:
            raise ValueError(f"{entry['url']!r} has the {field} {str(value)[:20]}")
    return entry


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as e:
        raise DataError(FIELD, pattern, "has unbalanced braces", "Write a range as {00000..00007}.") from e


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
