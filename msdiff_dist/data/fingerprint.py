"""What a data set was when a run began, so that a changed one is noticed when the run goes on.

A mark is one line per shard: name, samples, bytes and a digest of its content, `-` where that takes a connection. The
digest reads small shards whole and of large ones eight stretches: what a sample gains or loses moves all behind it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from msdiff_dist.data.access import base_name, is_local
from msdiff_dist.data.index import FIELD, Shard
from msdiff_dist.errors import DataError

_WHOLE_BYTES = 1 << 18
_STRETCHES, _STRETCH_BYTES = 8, 4096

Fingerprint = list[list[str]]  # by source


def fingerprint_shards(index: Sequence[Sequence[Shard]]) -> Fingerprint:
    """The marks of every source's shards. Where the data set lies does not matter."""
    return [
        [f"{name} {s.num_samples} {s.size or '-'} {_digest(s)}" for name, s in zip(_names(shards), shards, strict=True)]
        for shards in index
    ]


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What became of the shards, in words; empty if nothing changed."""
    if len(before) != len(now):
        return [f"there were {len(before)} sources and are {len(now)}"]
    found = []
    for old_lines, new_lines in zip(before, now, strict=True):
        old, new = (dict(mark.split(" ", 1) for mark in marks) for marks in (old_lines, new_lines))
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
    """A note on what changed since the checkpoint of `step`, if that is accepted; None if nothing did.

    Raises:
        DataError: the data set changed and `accept` is false.
    """
    what = "; ".join(changes(before, now))
    if what and not accept:
        raise DataError(
            FIELD, what, f"the data set is not that of the checkpoint of step {step}",
            "Restore it, or set data.accept_changes: true to go on with it, its samples in a new order.",
        )  # fmt: skip
    return f"the data set changed: {what}; from step {step} on its samples come in a new order" if what else None


def _names(shards: Sequence[Shard]) -> list[str]:
    names = [base_name(s.path) for s in shards]
    if len(set(names)) < len(names):
        prefix = os.path.commonprefix([s.path for s in shards]).rpartition("/")[0]  # noqa: RUF071
        names = [s.path.removeprefix(prefix) for s in shards]
    return [name.replace(" ", "%20") for name in names]


def _digest(shard: Shard) -> str:
    if not is_local(shard.path):
        return "-"
    size = Path(shard.path).stat().st_size
    with open(shard.path, "rb", buffering=0) as f:
        if size <= _WHOLE_BYTES:
            content = f.read()
        else:
            starts = [(size - _STRETCH_BYTES) * i // (_STRETCHES - 1) for i in range(_STRETCHES)]
            content = b"".join(os.pread(f.fileno(), _STRETCH_BYTES, start) for start in starts)
    return hashlib.blake2b(content, digest_size=8).hexdigest()
