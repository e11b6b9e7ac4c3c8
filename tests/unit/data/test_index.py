"""Patterns of shards, and sample counts from indexes and scans."""

from __future__ import annotations

import json

import fsspec
import pytest

from msdiff_dist.data.access import Access
from msdiff_dist.data.index import IndexFiles, read_index, resolve_shards
from msdiff_dist.errors import DataError


def test_patterns_resolve_to_the_same_shards(tmp_path, latent_shards):
    latent_shards(tmp_path, [1] * 12)
    expected = [str(tmp_path / f"{i:05d}.tar") for i in range(12)]
    for pattern in (
        str(tmp_path),
        f"{tmp_path}/*.tar",
        f"{tmp_path}/{{00000..00011}}.tar",
        (f"{tmp_path}/{{00000..00003}}.tar", f"{tmp_path}/0000[4-9].tar", *expected[10:]),
    ):
        assert resolve_shards(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/*.tgz", "matches no shards"),
        ("{}/empty", "matches no shards"),
        ("{}/{{00000..00004}}.tar", r"shards not found: .*00002\.tar, .*00003\.tar, .*00004\.tar"),
        ("{}/{{00000..00009}}.tar", r"and 5 more"),
        ("{}/{{0,1.tar", "unbalanced braces"),
        ("s3://bucket/0.tar", "msdiff-dist\\[s3\\]"),
        ("pipe:cat x", "does not allow"),
        ("@{}/none.txt", r"@.*none\.txt.*not a readable list"),
        ("memory://empty/*.tar", "matches no shards"),
        ((), "matches no shards"),
        (("{}/*.tar", "{}/00001.tar"), r"twice: .*00001\.tar"),
    ],
)
def test_shards_that_cannot_be_found_are_named(tmp_path, latent_shards, pattern, message):
    latent_shards(tmp_path, [1, 1])
    (tmp_path / "empty").mkdir()
    patterns = pattern.format(tmp_path) if isinstance(pattern, str) else [p.format(tmp_path) for p in pattern]
    with pytest.raises(DataError, match=message) as caught:
        resolve_shards(patterns)
    assert caught.value.field == "data.shards"


def test_counts_come_from_the_index_or_a_scan_alike(tmp_path, latent_shards):
    sizes = [3, 0, 7]
    latent_shards(tmp_path / "with", sizes)
    latent_shards(tmp_path / "without", sizes, index=False)
    for folder in ("with", "without"):
        assert [s.num_samples for s in read_index(resolve_shards(str(tmp_path / folder)))] == sizes


def test_a_shard_the_index_does_not_list_is_scanned(tmp_path, latent_shards):
    latent_shards(tmp_path, [3, 5])
    index = json.loads((tmp_path / "index.json").read_text())
    del index["shardlist"][1]
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert [s.num_samples for s in read_index(resolve_shards(str(tmp_path)))] == [3, 5]


def test_a_shard_of_another_size_than_indexed_is_named(tmp_path, latent_shards):
    latent_shards(tmp_path, [3, 5])
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:2048])
    with pytest.raises(DataError, match=r"00001\.tar.*has 2048 bytes"):
        read_index(resolve_shards(str(tmp_path)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"__kind__": "other", "shardlist": []}'])
def test_a_corrupt_index_is_named(tmp_path, latent_shards, text):
    latent_shards(tmp_path, [1])
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json.*is not a shard index"):
        read_index(resolve_shards(str(tmp_path)))


def test_a_corrupt_shard_is_named(tmp_path, latent_shards):
    latent_shards(tmp_path, [1, 1], index=False)
    (tmp_path / "00001.tar").write_bytes(b"x" * 4000)
    with pytest.raises(DataError, match=r"00001\.tar.*is not a readable tar file"):
        read_index(resolve_shards(str(tmp_path)))


def test_shards_without_samples_are_refused(tmp_path, latent_shards):
    latent_shards(tmp_path, [0, 0])
    with pytest.raises(DataError, match="no samples"):
        read_index(resolve_shards(str(tmp_path)))


@pytest.mark.parametrize("name", ["{}/list.txt", "@{}/list.txt", "@{}/list"])
def test_a_text_file_lists_shards(tmp_path, latent_shards, name):
    latent_shards(tmp_path / "a", [1, 1])
    latent_shards(tmp_path / "b", [1])
    for file in ("list", "list.txt"):
        lines = ["# two folders", "", "a/{00000..00001}.tar", f" {tmp_path}/b ", "pipe:cat x", "https://host/0.tar"]
        (tmp_path / file).write_text("\n".join(lines))
    resolved = resolve_shards(name.format(tmp_path), IndexFiles(Access(allow_pipe=True)))
    local = [str(tmp_path / path) for path in ("a/00000.tar", "a/00001.tar", "b/00000.tar")]
    assert resolved == [*local, "pipe:cat x", "https://host/0.tar"]


@pytest.mark.parametrize("index", [True, False])
def test_shards_behind_a_web_server(tmp_path, latent_shards, http_folder, index):
    latent_shards(tmp_path, [3, 5], index)
    with http_folder(tmp_path) as (url, server):
        paths = resolve_shards(f"{url}{{00000..00001}}.tar")
        assert [(s.path, s.num_samples) for s in read_index(paths)] == [(f"{url}00000.tar", 3), (f"{url}00001.tar", 5)]
        assert ("/00000.tar" in [path for path, _ in server.requests]) != index
        if index:
            assert resolve_shards(url) == paths
        (tmp_path / "list.txt").write_text("00000.tar\n00001.tar\n")
        assert resolve_shards(f"@{url}list.txt") == paths
        with pytest.raises(DataError, match=r"00007\.tar.*404"):
            read_index([f"{url}00007.tar"])


def test_shards_in_a_bucket(tmp_path, latent_shards):
    latent_shards(tmp_path, [3, 5])
    system = fsspec.filesystem("memory")
    system.put(f"{tmp_path}/", "/bucket/", recursive=True)
    for pattern in ("memory://bucket", "memory://bucket/*.tar", "memory://bucket/{00000..00001}.tar"):
        assert [s.num_samples for s in read_index(resolve_shards(pattern))] == [3, 5]
