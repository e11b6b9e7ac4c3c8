"""Counter-based random numbers: a value depends on (seed, purpose, counters), not on rank, worker or order of calls."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

_WORD = 2**64


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A fresh generator for one purpose at one counter position.

    The Philox key is (`seed`, hash of `purpose`); up to three non-negative `counters` fill the upper words of its
    256-bit counter. The lowest word is left to the stream itself, so streams of different counters never overlap.
    """
    assert len(counters) <= 3, "Philox has room for three counters"
    words = np.array([0, *counters, *[0] * (3 - len(counters))], dtype=np.uint64)
    key = np.array([seed % _WORD, _hash(purpose)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=words, key=key))


@functools.cache
def _hash(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
