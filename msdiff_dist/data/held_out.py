"""Shards divided into what is trained on and what is held out, and the held-out samples read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from msdiff_dist.data.access import base_name
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.index import FIELD, Shard
from msdiff_dist.data.portion import Portion, name_digest
from msdiff_dist.data.samples import Samples, decode
from msdiff_dist.data.tar_members import TarError, chunks
from msdiff_dist.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """Shards to train on and to validate on, each by source and with the portion of its samples that is meant."""

    trained: list[list[Shard]]
    held_out: list[list[Shard]]


def split(index: Sequence[Sequence[Shard]], fraction: float) -> Split:
    """Divide the samples of shards, by source.

    Raises:
        ConfigError: nothing is held out, or nothing of a source is left to train on.
    """
    found = Split(
        *([[replace(s, portion=Portion(fraction, held)) for s in shards] for shards in index] for held in (False, True))
    )
    held_out = sum(shard.used for shards in found.held_out for shard in shards)
    for count, what in ((held_out, "be held out"), *((sum(s.used for s in x), "train on") for x in found.trained)):
        if not count:
            samples = sum(shard.num_samples for shards in index for shard in shards)
            problem = f"of {samples} samples leaves none to {what}"
            raise ConfigError("validation.fraction", fraction, problem, "Choose another fraction, or add data.")
    return found


def read_samples(index: Sequence[Sequence[Shard]], config: DataConfig, num: int) -> Samples:
    """The first `num` samples, or all if there are fewer, of the used samples of shards. None is mirrored.

    Shards are taken in the order of a digest of their names: only as many are read as are needed, and those of no
    particular place in the data set.

    Raises:
        DataError: a shard or sample is corrupt, or there is none.
    """
    config = replace(config, flip=False, crop="center", captions=False)
    read: list[Samples] = []
    found = 0
    for shard in sorted((s for shards in index for s in shards), key=lambda s: name_digest(base_name(s.path))):
        for part in _decoded(shard, config):
            read.append(part)
            found += len(part.key_n)
            if found >= num:
                break
        if found >= num:
            break
    if not read:
        raise DataError(FIELD, config.shards, "hold no samples to validate on", "Name other shards.")
    columns = [None if column[0] is None else np.concatenate(column)[:num] for column in zip(*read, strict=True)]
    return Samples(*columns)  # type: ignore[arg-type]


def _decoded(shard: Shard, config: DataConfig) -> Iterator[Samples]:
    """The used samples of a shard. The posterior's noise, if any, is that of their positions."""
    used_n, first = shard.used_n, 0
    try:
        for chunk in chunks(shard.path, config.access):
            count = len(chunk["__key__"])
            rows = np.flatnonzero(used_n[first : first + count])
            if len(rows):
                yield decode({name: column[rows] for name, column in chunk.items()}, config, 0, first + rows)
            first += count
    except (TarError, OSError) as e:
        raise DataError(FIELD, shard.path, f"is corrupt ({e})", "Copy or make the shard again.") from e
