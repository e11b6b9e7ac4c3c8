"""Fixtures: small shards of latents whose content is their number, and a web server."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from msdiff_dist.data.make.shard_writer import write_index, write_shard
from tests.unit.data.http_server import Behaviour, http_server

MakeShards = Callable[..., list[str]]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_latent_shards(folder: Path, sizes: Sequence[int], index: bool = True, first: int = 0) -> list[str]:
    """Shards of 1x1x1 latents whose value, label (modulo 7) and key are the sample's number; returns the keys."""
    folder.mkdir(parents=True, exist_ok=True)
    number = itertools.count(first)
    keys, counts = [], {}
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            n = next(number)
            keys.append(f"{n:05d}")
            fields = {
                "latent.npy": npy(np.full((1, 1, 1), n, np.float32)),
                "cls": str(n % 7).encode(),
                "txt": f"sample {n}".encode(),
                "context.npy": npy(np.full((2, 3), n, np.float16)),
            }
            samples.append((keys[-1], fields))
        write_shard(folder / f"{shard:05d}.tar", samples)
        counts[f"{shard:05d}.tar"] = size
    if index:
        write_index(folder, "test", counts)
    return keys


@pytest.fixture
def latent_shards() -> MakeShards:
    return write_latent_shards


@pytest.fixture
def http_folder() -> Callable[[Path], AbstractContextManager[tuple[str, Behaviour]]]:
    return http_server
