"""Corrupt shards and samples: reported once, skipped, and replaced the same way from anywhere."""

from __future__ import annotations

import itertools
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.corruption import Corruption, CorruptionReport
from msdiff_dist.data.index import read_index, resolve_shards
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make.shard_writer import write_index, write_shard
from msdiff_dist.data.tar_members import samples
from msdiff_dist.errors import DataError


def config_of(folder: Path, **fields: object) -> DataConfig:
    known = {"kind": "latent", "latent_shape": (1, 1, 1), "latent_dtype": "float32", "num_classes": 7, "shuffle": 4}
    return DataConfig(shards=str(folder), **{**known, "lanes": 1, "max_bad": 50, **fields})  # type: ignore[arg-type]


def rewrite(path: Path, change) -> None:
    """Write a shard again with `change` applied to its list of (key, fields)."""
    content = [(s["__key__"], {k: v for k, v in s.items() if k[0] != "_"}) for s in samples(str(path))]
    write_shard(path, change(content))


def keys_read(config: DataConfig, n: int, start: int = 0, world_size: int = 1) -> tuple[list[str], set[Corruption]]:
    """`n` keys of the stream from sample number `start` on, joined from all ranks, and all corruption reported."""
    loaders = [StepLoader(config, 0, 1, rank, world_size, start) for rank in range(world_size)]
    steps = [list(itertools.islice(loader, n)) for loader in loaders]
    reported = [corruption for parts in steps for step in parts for corruption in step.corruption]
    for parts in steps:
        own = [corruption.place for step in parts for corruption in step.corruption]
        assert len(set(own)) == len(own)
    return [next(part.keys[0] for part in parts if part.keys) for parts in zip(*steps, strict=True)], set(reported)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def spoil_latent(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[512:520] = b"garbage!"
    path.write_bytes(data)


def drop_label(path: Path) -> None:
    rewrite(
        path, lambda content: [(k, {n: v for n, v in f.items() if n != "cls"}) for k, f in content[:1]] + content[1:]
    )


def repeat_key(path: Path) -> None:
    rewrite(path, lambda content: [*content, content[0]])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_last(path: Path) -> None:
    rewrite(path, lambda content: content[:-1])


HARMS = {
    tear: "cut short",
    spoil_latent: r"'latent\.npy' of sample '\d+' is not a readable",
    drop_label: "'cls' of sample '\\d+' is missing",
    repeat_key: "comes twice",
    empty: "cut short",
    lose_last: "samples, but",
}


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("harm", HARMS)
def test_every_harm_is_refused_or_named_and_its_places_filled(tmp_path, latent_shards, harm, index):
    keys = latent_shards(tmp_path, [6, 6, 6])
    harm(tmp_path / "00001.tar")
    if not index:
        (tmp_path / "index.json").unlink()
    else:  # with the size of the harmed file, which must be found by reading it
        write_index(tmp_path, "test", {f"0000{i}.tar": 6 for i in range(3)})
    counted = sum(s.num_samples for s in read_index(resolve_shards(str(tmp_path)), corruption=CorruptionReport(50)))
    if index or harm in (spoil_latent, drop_label, repeat_key):
        assert counted == 18
    if not (harm is lose_last and not index):
        with pytest.raises(DataError, match=HARMS[harm]):
            keys_read(config_of(tmp_path, max_bad=0), counted)
    read, reported = keys_read(config_of(tmp_path, max_bad=1), counted)
    again, reported_again = keys_read(config_of(tmp_path), 3 * counted)
    assert again[:counted] == read
    assert reported_again == reported
    assert set(read) <= set(keys)
    assert {key for key in keys if not "00006" <= key <= "00011"} <= set(read)
    if harm is lose_last and not index:
        assert not reported
        return
    (corruption,) = reported
    assert corruption.url == str(tmp_path / "00001.tar")
    assert (corruption.key is None) == (harm in (tear, empty, lose_last))
    assert corruption.key in (None, "00006")


def test_a_torn_shard_gives_its_own_samples_again_and_an_unreadable_one_those_after_it(tmp_path, latent_shards):
    latent_shards(tmp_path, [6, 6])
    tear(tmp_path / "00000.tar")
    empty(tmp_path / "00001.tar")
    write_index(tmp_path, "test", {"00000.tar": 6, "00001.tar": 6})
    read, _ = keys_read(config_of(tmp_path, shuffle=1), 12)
    assert sorted(read) == sorted(2 * ["00000", "00001", "00002", "00003", "00000", "00001"])
    empty(tmp_path / "00000.tar")
    write_index(tmp_path, "test", {"00000.tar": 6, "00001.tar": 6})
    with pytest.raises(DataError, match="nor any other shard can be read"):
        keys_read(config_of(tmp_path), 1)


def test_the_next_good_sample_fills_the_place_of_a_bad_one(tmp_path, latent_shards):
    latent_shards(tmp_path, [4])
    rewrite(
        tmp_path / "00000.tar",
        lambda content: [(k, {**f, "cls": b"?"} if k in "0000100002" else f) for k, f in content],
    )
    read, reported = keys_read(config_of(tmp_path, shuffle=1), 8)
    assert read == 2 * ["00000", "00003", "00003", "00003"]
    assert sorted(corruption.key for corruption in reported if corruption.key) == ["00001", "00002"]
    with pytest.raises(DataError, match=r"data\.max_bad = 1.*2 corrupt.*'00002'.*\n?.*log names them"):
        keys_read(config_of(tmp_path, shuffle=1, max_bad=1), 8)
    with pytest.raises(DataError, match="no sample of the lane"):
        keys_read(config_of(tmp_path, latent_shape=(9, 9, 9)), 1)


@given(
    harms=st.dictionaries(st.integers(0, 4), st.sampled_from(list(HARMS)), min_size=1, max_size=3),
    start=st.integers(0, 30),
    world_size=st.integers(1, 3),
    shuffle=st.integers(0, 9),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupt_data_reads_the_same_from_anywhere(tmp_path_factory, latent_shards, harms, start, world_size, shuffle):
    folder = tmp_path_factory.mktemp("harmed")
    latent_shards(folder, [5] * 5)
    for number, harm in harms.items():
        harm(folder / f"0000{number}.tar")
    write_index(folder, "test", {f"0000{i}.tar": 5 for i in range(5)})
    config = config_of(folder, lanes=6, shuffle=shuffle)
    reference, _ = keys_read(config, start + 30)
    assert keys_read(config, 30, start, world_size)[0] == reference[start:]
    with StepLoader(replace(config, workers=2), 0, 1, start_batch=start) as loader:
        assert [step.keys[0] for step in itertools.islice(loader, 10)] == reference[start : start + 10]
    shutil.rmtree(folder)


def test_corruption_is_logged_by_name(tmp_path, latent_shards, caplog):
    latent_shards(tmp_path, [4])
    drop_label(tmp_path / "00000.tar")
    keys_read(config_of(tmp_path), 8)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"skipped: sample '00000' of {tmp_path}/00000.tar: data.shards: field 'cls'")


def test_an_archive_of_another_kind_that_is_torn(tmp_path, latent_shards):
    latent_shards(tmp_path, [6])
    path = tmp_path / "00000.tar"
    content = list(samples(str(path)))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for s in content:
            member = tarfile.TarInfo("folder/" * 20 + s["__key__"] + ".cls")
            archive.addfile(member)
    path.write_bytes(path.read_bytes()[: 512 * 7])
    (tmp_path / "index.json").unlink()
    corruption = CorruptionReport(3)
    assert 0 < read_index([str(path)], corruption=corruption)[0].num_samples < 6
    assert len(corruption.take()) == 1
