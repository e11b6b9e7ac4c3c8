"""The held-out split: which samples of a shard are never trained on, by arithmetic over names and positions alone.

A sample is held out if a number drawn for (name of its shard, position in it) is below the fraction. So the split is
the same on any ranks and for any order, and stays when shards are added or a shard grows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msdiff_dist.randomness import generator


@dataclass(frozen=True)
class Portion:
    """One side of the split.

    Attributes:
        fraction: share of the samples that is held out, in (0, 1).
        held_out: the samples that are held out; otherwise the others.
    """

    fraction: float
    held_out: bool

    def of(self, name: str, count: int) -> NDArray[np.bool_]:
        """Whether each of the `count` samples of the shard with this file name belongs to the portion, [count]."""
        below = generator(0, "held out", name_digest(name)).random(count) < self.fraction
        found: NDArray[np.bool_] = below if self.held_out else ~below
        return found


def name_digest(name: str) -> int:
    """64 bits that depend on a file name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
