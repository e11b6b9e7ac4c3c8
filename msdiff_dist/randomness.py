"""Counter-based random numbers, and everything that one training step draws.

A value depends on (seed, purpose, counters), not on rank, worker or order of calls. What a step draws is addressed in
one of two ways, both the same on any number of ranks:

- by `batch`, the number of the global batch from 0, and a sample's `index` in it: stage, time, noise, augmentation and
  dropped conditions;
- by `g`, the number of a sample in the stream from 0 (batch * global batch size + index): what loader workers draw when
  they read a sample, which are mirroring, cropping and the autoencoder's posterior.

Optimizer step n, counted from 1, trains on global batch n - 1. Steps are counted from 1 everywhere else.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = 2**64
_FLIPS = 1024  # coins per generator: to make a generator costs more than to draw a thousand numbers from it
Ints = NDArray[np.int64]


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A fresh generator for one purpose at one counter position.

    The Philox key is (`seed`, hash of `purpose`); up to three non-negative `counters` fill the upper words of its
    256-bit counter. The lowest word is left to the stream itself, so streams of different counters never overlap.
    """
    assert len(counters) <= 3, "Philox has room for three counters"
    words = np.array([0, *counters, *[0] * (3 - len(counters))], dtype=np.uint64)
    key = np.array([seed % _WORD, _hash(purpose)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=words, key=key))


def _streams(seed: int, purpose: str, *counters: int, last_n: Ints) -> Iterator[np.random.Generator]:
    """`generator(seed, purpose, *counters, i)` for each i of `last_n`: draw from one before asking for the next.

    It is one object that is moved from stream to stream, which costs a tenth of making one: of a small sample, making
    the generators would take longer than drawing the noise.
    """
    random = generator(seed, purpose, *counters, 0)
    start = random.bit_generator.state  # a copy; nothing is drawn yet, so it holds no leftover numbers
    counter: NDArray[np.uint64] = start["state"]["counter"]
    for last in last_n.tolist():
        counter[1 + len(counters)] = last
        random.bit_generator.state = start
        yield random


@functools.cache
def _hash(purpose: str) -> int:
    """64 bits of BLAKE2b. Python's own `hash` of text differs between processes."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def stage_order(seed: int, batch: int, batch_size: int) -> Ints:
    """Permutation [batch_size] that gives the samples of a global batch, sorted by stage, their indices in it."""
    return generator(seed, "stage", batch).permutation(batch_size)


def stage_uniform(seed: int, batch: int) -> float:
    """Uniform number in [0, 1) that becomes the stage of a global batch of one stage."""
    return float(generator(seed, "stage of batch", batch).random())


def time_uniforms(seed: int, batch: int, batch_size: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), [batch_size], that become times within each sample's stage."""
    return generator(seed, "time", batch).random(batch_size)


def noise(seed: int, batch: int, index_n: Ints, shape: Sequence[int], *, pinned: bool = False) -> Tensor:
    """Standard normal noise, float32 [n, *shape], for the samples with these indices in the global batch.

    Args:
        pinned: whether to draw it into page-locked memory, from which a GPU copies while the program goes on.
    """
    out = torch.empty(len(index_n), *shape, pin_memory=pinned)
    # numpy draws without the interpreter's lock, so another thread can compute meanwhile.
    for row, random in zip(out.numpy(), _streams(seed, "noise", batch, last_n=index_n), strict=True):
        random.standard_normal(out=row, dtype=np.float32)
    return out


def held_out_noise(seed: int, row_n: Ints, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 [n, *shape], of the evaluations of the held-out loss with these numbers."""
    out = torch.empty(len(row_n), *shape)
    for row, random in zip(out.numpy(), _streams(seed, "held out noise", last_n=row_n), strict=True):
        random.standard_normal(out=row, dtype=np.float32)
    return out


def dropped_conditions(seed: int, batch: int, index_n: Ints, probability: float) -> Tensor:
    """Whether the condition of each sample is dropped, bool [n], for the samples with these indices."""
    if len(index_n) == 0:
        return torch.zeros(0, dtype=torch.bool)
    # One stream per batch, of which sample i takes number i: the numbers up to the largest index are drawn.
    uniform_n = generator(seed, "condition dropout", batch).random(index_n.max() + 1)[index_n]
    return torch.from_numpy(uniform_n < probability)


def augmentations(seed: int, batch: int, index_n: Ints) -> Iterator[np.random.Generator]:
    """Generators for the augmentation of the samples with these indices: draw from one before asking for the next."""
    return _streams(seed, "augmentation", batch, last_n=index_n)


def module_seed(seed: int, batch: int, first_index: int) -> int:
    """Seed of torch's own generator for the dropout layers of a micro batch whose first sample has `first_index`.

    The masks are the same if a resumed run takes the step again on as many ranks. On another number of ranks they
    differ, because torch draws them for a rank's whole batch.
    """
    return int(generator(seed, "dropout", batch, first_index).integers(2**63))


def flips(seed: int, g_n: Ints) -> NDArray[np.bool_]:
    """Whether each sample of the stream is mirrored, bool [n]."""
    return np.array([_coins(seed, g // _FLIPS)[g % _FLIPS] for g in g_n.tolist()])


@functools.lru_cache(maxsize=64)
def _coins(seed: int, block: int) -> NDArray[np.bool_]:
    return generator(seed, "flip", block).random(_FLIPS) < 0.5


def crop_position(seed: int, g: int) -> tuple[float, float]:
    """Where a sample of the stream is cropped: from (0, 0), left and top, to (1, 1), right and bottom."""
    x, y = generator(seed, "crop", g).random(2).tolist()
    return x, y


def posterior_noise(seed: int, g_n: Ints, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal noise, [n, *shape], with which each sample's latent is drawn from the autoencoder's posterior."""
    out = np.empty((len(g_n), *shape), np.float32)
    for row, random in zip(out, _streams(seed, "posterior", last_n=g_n), strict=True):
        random.standard_normal(out=row, dtype=np.float32)
    return out
