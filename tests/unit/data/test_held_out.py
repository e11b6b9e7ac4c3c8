"""The held-out split: membership by arithmetic, never trained on, and read back."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.held_out import read_samples, split
from msdiff_dist.data.index import Shard, find_shards
from msdiff_dist.data.latent_blocks import BLOCK_FIELD, pack_block
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make.shard_writer import write_index, write_shard
from msdiff_dist.errors import ConfigError
from tests.unit.data.conftest import MakeShards

FRACTION = 0.2
CONFIG = DataConfig(shards="x", kind="latent", latent_shape=(1, 1, 1), latent_dtype="float32", lanes=6, shuffle=8)


def _keys(config: DataConfig, index: list[list[Shard]], batches: int, rank: int = 0, ranks: int = 1) -> list[str]:
    with StepLoader(config, 3, 12, rank, ranks, index=index) as loader:
        return [key for step in itertools.islice(loader, batches) for key in step.keys]


def _held_out(index: list[list[Shard]], config: DataConfig) -> set[str]:
    return set(read_samples(split(index, FRACTION).held_out, config, 10**6).key_n.tolist())


def test_every_sample_is_on_one_side(latent_shards: MakeShards, tmp_path: Path) -> None:
    keys = latent_shards(tmp_path, [40, 1, 25, 54])
    index = [find_shards(str(tmp_path))]
    divided = split(index, FRACTION)
    held_out = _held_out(index, CONFIG)
    assert 0 < len(held_out) < len(keys)
    used = sum(shard.used for shard in divided.trained[0])
    assert used == len(keys) - len(held_out)
    # Two epochs, of batches that divide neither: each of the others twice, and none that is held out.
    for ranks in (1, 3):
        seen = Counter(
            key for rank in range(ranks) for key in _keys(CONFIG, divided.trained, -(-2 * used // 12), rank, ranks)
        )
        assert not seen.keys() & held_out
        assert seen.keys() | held_out == set(keys)
        assert min(seen.values()) == 2


def test_the_share_is_the_fraction() -> None:
    shards = [Shard(path=f"{i:05d}.tar", num_samples=1000) for i in range(50)]
    held_out = sum(shard.used for shard in split([shards], 0.03).held_out[0])
    assert abs(held_out / 50_000 - 0.03) < 4 * (0.03 / 50_000) ** 0.5


def test_membership_stays_when_shards_are_added_moved_or_grow() -> None:
    before = [Shard(path=f"/here/{i:05d}.tar", num_samples=200) for i in range(4)]
    after = [replace(s, path=s.path.replace("here", "there"), num_samples=300) for s in before]
    after = [Shard(path="/there/extra.tar", num_samples=77), *reversed(after)]
    rows = {Path(s.path).name: s.used_n for s in split([before], FRACTION).held_out[0]}
    found = {Path(s.path).name: s.used_n for s in split([after], FRACTION).held_out[0]}
    for name, used_n in rows.items():
        assert np.array_equal(found[name][:200], used_n)
    assert not np.array_equal(rows["00000.tar"], rows["00001.tar"])


def test_blocks_are_divided_by_row(tmp_path: Path) -> None:
    import torch

    values = torch.arange(60.0).reshape(60, 1, 1, 1)
    blocks = [
        (
            f"{i:08d}",
            {BLOCK_FIELD: pack_block([f"{n}" for n in range(i, i + 20)], {"latent.npy": values[i : i + 20]}, None)},
        )
        for i in range(0, 60, 20)
    ]
    write_shard(tmp_path / "00000.tar", blocks)
    write_index(tmp_path, "blocks", {"00000.tar": 60})
    index = [find_shards(str(tmp_path))]
    config = replace(CONFIG, lanes=1)
    divided = split(index, FRACTION)
    samples = read_samples(divided.held_out, config, 10**6)
    assert samples.key_n.tolist() == [str(int(value)) for value in samples.x_nCHW.ravel()]
    seen = set(_keys(config, divided.trained, 10))
    assert not seen & set(samples.key_n)
    assert seen | set(samples.key_n) == {str(n) for n in range(60)}


def test_a_shard_that_lost_samples_repeats_its_own(latent_shards: MakeShards, tmp_path: Path) -> None:
    latent_shards(tmp_path, [30, 30])
    index = [find_shards(str(tmp_path))]
    held_out = _held_out(index, CONFIG)
    cut = tmp_path / "00000.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    seen = set(_keys(replace(CONFIG, max_bad=9), split(index, FRACTION).trained, 12))
    assert not seen & held_out


def test_few_samples_need_few_shards(latent_shards: MakeShards, tmp_path: Path) -> None:
    latent_shards(tmp_path, [50] * 6)
    divided = split([find_shards(str(tmp_path))], FRACTION).held_out
    few = read_samples(divided, CONFIG, 7).key_n.tolist()
    assert len(few) == 7
    assert few == read_samples(divided, CONFIG, 30).key_n.tolist()[:7]
    for path in tmp_path.glob("*.tar"):  # all but the one that was read may be gone
        if not any(path.name == f"{int(key) // 50:05d}.tar" for key in few):
            path.unlink()
    assert few == read_samples(divided, CONFIG, 7).key_n.tolist()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_sides_without_samples_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"validation\.fraction"):
        split([[Shard(path="a.tar", num_samples=9)]], fraction)
