"""Fingerprints of data sets, and what they notice."""

from __future__ import annotations

import random
import shutil

import pytest

from msdiff_dist.data.fingerprint import changes, check_unchanged, fingerprint_shards
from msdiff_dist.data.index import Shard, read_index, resolve_shards
from msdiff_dist.data.make.shard_writer import write_shard
from msdiff_dist.errors import DataError


def fingerprint_of(folder):
    return fingerprint_shards([read_index(resolve_shards(str(folder)))])


@pytest.fixture
def folder(tmp_path, latent_shards):
    latent_shards(tmp_path / "data", [3, 5, 4])
    return tmp_path / "data"


def test_a_copy_elsewhere_is_the_same_data(folder, tmp_path):
    before = fingerprint_of(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint_of(tmp_path / "copy") == before
    assert check_unchanged(before, fingerprint_of(tmp_path / "copy"), 8, accept=False) is None


def test_what_was_added_removed_and_altered_is_named(folder):
    before = fingerprint_of(folder)
    write_shard(folder / "00003.tar", [("x", {"cls": b"1"})])
    (folder / "00001.tar").unlink()
    data = bytearray((folder / "00002.tar").read_bytes())
    data[700] ^= 1
    (folder / "00002.tar").write_bytes(data)
    now = fingerprint_of(folder)
    assert changes(before, now) == ["1 added (00003.tar)", "1 removed (00001.tar)", "1 altered (00002.tar)"]
    with pytest.raises(DataError, match=r"1 added \(00003\.tar\).*step 8.*data\.accept_changes: true"):
        check_unchanged(before, now, 8, accept=False)
    assert "1 altered (00002.tar)" in str(check_unchanged(before, now, 8, accept=True))


def test_another_order_and_another_number_of_sources_are_changes(folder):
    (lines,) = fingerprint_of(folder)
    assert changes([lines], [lines[::-1]]) == ["its shards are listed in another order"]
    assert changes([lines], [lines, lines]) == ["there were 1 sources and are 2"]


def test_a_sample_that_grows_in_a_large_shard_is_noticed(tmp_path):
    rng = random.Random(0)
    samples = [(f"{i:03d}", {"bin": rng.randbytes(5000)}) for i in range(200)]
    write_shard(tmp_path / "0.tar", samples)
    before = fingerprint_of(tmp_path)
    size = (tmp_path / "0.tar").stat().st_size
    samples[100] = ("100", {"bin": rng.randbytes(5200)})  # another block of the archive, hidden by its padding
    samples[120] = ("120", {"bin": rng.randbytes(4600)})
    write_shard(tmp_path / "0.tar", samples)
    assert (tmp_path / "0.tar").stat().st_size == size
    assert changes(before, fingerprint_of(tmp_path)) == ["1 altered (0.tar)"]


def test_shards_of_the_same_name_and_behind_addresses():
    shards = [
        Shard(path="s3://b/x/0.tar", num_samples=3, size=10),
        Shard(path="s3://b/y/0.tar", num_samples=4),
        Shard(path="pipe:cat a b", num_samples=1),
    ]
    assert fingerprint_shards([shards[:2]]) == [["/x/0.tar 3 10 -", "/y/0.tar 4 - -"]]
    assert fingerprint_shards([shards[2:]]) == [["pipe:cat%20a%20b 1 - -"]]
