"""Fingerprints of data sets, kept in checkpoints, so that a changed data set is noticed when a run resumes.

A fingerprint has one line per shard: name, samples, bytes and a digest of its content. Bytes or digest are `-` where
finding them takes a connection. The digest covers small shards whole, and eight evenly spaced slices of large ones. A
sample that grows or shrinks shifts all content behind it, so a slice there changes too; an edit of single bytes
between slices is not noticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from msdiff_dist.data.access import base_name, is_local
from msdiff_dist.data.index import FIELD, Shard
from msdiff_dist.errors import DataError

_WHOLE_BYTES = 1 << 18  # shards up to this size are read whole
_SLICES, _SLICE_BYTES = 8, 4096

Fingerprint = list[list[str]]  # of each source, one line per shard


def fingerprint_shards(index: Sequence[Sequence[Shard]]) -> Fingerprint:
    """The fingerprint of every source's shards. It does not depend on where the data set lies."""
    return [
        [f"{name} {s.num_samples} {s.size or '-'} {_digest(s)}" for name, s in zip(_names(shards), shards, strict=True)]
        for shards in index
    ]


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What changed from one fingerprint to another, one phrase each; empty if nothing did."""
    if len(before) != len(now):
        return [f"there were {len(before)} sources and are {len(now)}"]
    found = []
    for old_lines, new_lines in zip(before, now, strict=True):
        old, new = (dict(line.split(" ", 1) for line in lines) for lines in (old_lines, new_lines))
        found += [
            f"{len(names)} {verb} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for verb, names in (
                ("added", [name for name in new if name not in old]),
                ("removed", [name for name in old if name not in new]),
                ("altered", [name for name in new if old.get(name, new[name]) != new[name]]),
            )
            if names
        ]
        if old == new and old_lines != new_lines:
            found.append("its shards are listed in another order")
    return found


def check_unchanged(before: Fingerprint, now: Fingerprint, step: int, accept: bool) -> str | None:
    """Compare the fingerprints of the checkpoint of `step` and of now.

    Returns a sentence that says what changed, None if nothing did.

    Raises:
        DataError: the data set changed and `accept` is false.
    """
    what = "; ".join(changes(before, now))
    if what and not accept:
        raise DataError(
            FIELD, what, f"the data set is not that of the checkpoint of step {step}",
            "Restore it, or set data.accept_changes: true to resume with it; its samples then come in a new order.",
        )  # fmt: skip
    return f"the data set changed: {what}; from step {step} on its samples come in a new order" if what else None


def _names(shards: Sequence[Shard]) -> list[str]:
    names = [base_name(s.path) for s in shards]
    # Shards of one name in several folders are named by their path below the common folder. `commonpath` would do, but
    # it makes `s3:/` of `s3://`.
    if len(set(names)) < len(names):
        prefix = os.path.commonprefix([s.path for s in shards]).rpartition("/")[0]  # noqa: RUF071
        names = [s.path.removeprefix(prefix) for s in shards]
    return [name.replace(" ", "%20") for name in names]  # spaces separate the columns of a line


def _digest(shard: Shard) -> str:
    if not is_local(shard.path):
        return "-"
    size = Path(shard.path).stat().st_size
    with open(shard.path, "rb", buffering=0) as f:
        if size <= _WHOLE_BYTES:
            content = f.read()
        else:
            starts = [(size - _SLICE_BYTES) * i // (_SLICES - 1) for i in range(_SLICES)]  # first to last bytes
            content = b"".join(os.pread(f.fileno(), _SLICE_BYTES, start) for start in starts)
    return hashlib.blake2b(content, digest_size=8).hexdigest()
