"""The stream of one lane, from any position."""

from __future__ import annotations

import itertools
import os

import pytest

from msdiff_dist.data.index import Shard
from msdiff_dist.data.order import StreamOrder
from msdiff_dist.data.stream import LaneStream
from msdiff_dist.errors import DataError


def shards_in(folder, sizes):
    return [Shard(path=str(folder / f"{i:05d}.tar"), num_samples=n) for i, n in enumerate(sizes)]


def keys_of(shards, order, lane, g, n):
    stream, keys, asked = LaneStream(shards, order, lane, g), [], itertools.cycle([1, 3, 8])
    while len(keys) < n:
        picked = stream.take(min(next(asked), n - len(keys)))
        placed = {place: key for p in picked for place, key in zip(p.place_n, p.chunk["__key__"], strict=True)}
        keys += [placed[place] for place in range(len(placed))]
    return keys


@pytest.mark.parametrize("shuffle", [1, 4, 7, 100])
def test_resuming_a_lane_at_every_position_gives_the_tail(tmp_path, latent_shards, shuffle):
    sizes = [5, 11, 3]
    keys = latent_shards(tmp_path, sizes)
    shards, order = shards_in(tmp_path, sizes), StreamOrder(sizes, 1, shuffle, seed=5)
    N = len(keys)
    whole = keys_of(shards, order, 0, 0, 3 * N)
    assert sorted(whole[:N]) == sorted(whole[N : 2 * N]) == keys
    for g in range(2 * N):
        assert keys_of(shards, order, 0, g, N) == whole[g : g + N]


def test_resuming_opens_only_the_shards_from_the_window_on(tmp_path, latent_shards):
    sizes = [8] * 6
    latent_shards(tmp_path, sizes)
    shards, order = shards_in(tmp_path, sizes), StreamOrder(sizes, 1, 4, seed=0)
    expected = keys_of(shards, order, 0, 33, 7)
    for number in order.epoch(0).shards[0][:4]:
        os.remove(shards[number].path)
    assert keys_of(shards, order, 0, 33, 7) == expected


@pytest.mark.parametrize("stated", [4, 6])
def test_a_count_that_is_not_the_shards_is_an_error(tmp_path, latent_shards, stated):
    latent_shards(tmp_path, [5])
    shards, order = shards_in(tmp_path, [stated]), StreamOrder([stated], 1, 1, seed=0)
    with pytest.raises(DataError, match=r"00000\.tar.*were counted"):
        keys_of(shards, order, 0, 0, 12)


def test_a_torn_shard_is_an_error_that_names_it(tmp_path, latent_shards):
    latent_shards(tmp_path, [5])
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:2600])
    with pytest.raises(DataError, match=r"00000\.tar.*cut short"):
        keys_of(shards_in(tmp_path, [5]), StreamOrder([5], 1, 1, seed=0), 0, 0, 5)
