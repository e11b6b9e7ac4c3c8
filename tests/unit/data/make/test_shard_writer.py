"""Writing shards, indexes and folders of them."""

from __future__ import annotations

import json
import tarfile

import pytest
import webdataset

from msdiff_dist.data.index import read_index, resolve_shards, scan
from msdiff_dist.data.make.shard_writer import DatasetInfo, even_sizes, write_dataset, write_shard
from msdiff_dist.errors import DataError, UserError

INFO = DatasetInfo(name="things", licence="CC0", origin="here", classes=("a", "b"))


def things(n):
    return [(f"{i:03d}", {"txt": f"thing {i}".encode(), "cls": str(i % 2).encode()}) for i in range(n)]


def test_shards_read_back_through_webdataset_and_the_index(tmp_path):
    written = write_dataset(tmp_path / "out", INFO, things(10), even_sizes(10, 3))
    assert (written.shards, written.samples, written.class_counts) == (3, 10, {0: 5, 1: 5})
    paths = resolve_shards(str(tmp_path / "out"))
    assert read_index(paths) == [scan(path) for path in paths]
    assert [scan(path).num_samples for path in paths] == [3, 3, 4]
    read = [
        (s["__key__"], {"txt": s["txt"], "cls": s["cls"]}) for s in webdataset.WebDataset(paths, shardshuffle=False)
    ]
    assert read == things(10)
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (about["name"], about["licence"], about["samples"]) == ("things", "CC0", 10)
    assert about["classes"] == [{"label": 0, "name": "a", "samples": 5}, {"label": 1, "name": "b", "samples": 5}]


def test_the_same_samples_make_the_same_bytes_in_plain_ustar(tmp_path):
    for name in ("one", "two"):
        write_dataset(tmp_path / name, INFO, things(4), [4])
    one, two = ((tmp_path / name / "00000.tar").read_bytes() for name in ("one", "two"))
    assert one == two
    assert one[257:265] == b"ustar\x0000"
    with tarfile.open(tmp_path / "one" / "00000.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in archive} == {(0, 0, 0, "")}


def test_sizes_with_fewer_samples_leave_no_empty_shard(tmp_path):
    assert write_dataset(tmp_path / "a", INFO, things(6), [2, 0, 2, 2, 2]).shards == 3
    assert write_dataset(tmp_path / "b", INFO, things(2), even_sizes(2, 5)).shards == 2


@pytest.mark.parametrize("present", ["file", "folder with a file"])
def test_an_output_in_use_is_refused_and_left_alone(tmp_path, present):
    out = tmp_path / "out"
    kept = out if present == "file" else out / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(DataError, match=r"--out.*not an empty folder"):
        write_dataset(out, INFO, things(3), [3])
    assert kept.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_folder_is_fine(tmp_path):
    (tmp_path / "out").mkdir()
    assert write_dataset(tmp_path / "out", INFO, things(3), [3]).samples == 3


def test_a_failure_leaves_nothing_behind(tmp_path):
    def failing():
        yield from things(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "out", INFO, failing(), [2, 2])
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.tar", failing())
    with pytest.raises(DataError, match="no samples"):
        write_dataset(tmp_path / "out", INFO, [], [2])
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--out = .*file/out.*file is not a folder"):
        write_dataset(tmp_path / "file" / "out", INFO, things(3), [3])
