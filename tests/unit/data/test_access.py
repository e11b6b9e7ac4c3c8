"""Opening addresses: positions, broken connections, retries, protocols, commands."""

from __future__ import annotations

import gzip
import random

import fsspec
import pytest

from msdiff_dist.data import access
from msdiff_dist.data.access import AbsentError, Access, base_name, beside, open_address, read_bytes
from msdiff_dist.data.tar_members import sample_keys, samples
from msdiff_dist.errors import DataError

CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(access, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def served(tmp_path, http_folder):
    (tmp_path / "file").write_bytes(CONTENT)
    with http_folder(tmp_path) as (url, server):
        yield url + "file", server


def test_names_of_addresses():
    assert base_name("https://h/a/0.tar?signed=x/y") == base_name("s3://b/a/0.tar") == base_name("a/0.tar") == "0.tar"
    assert beside("https://h/a/0.tar?signed=1", "index.json") == "https://h/a/index.json"
    assert beside("s3://b/a/0.tar", "index.json") == "s3://b/a/index.json"
    assert beside("a/0.tar", "index.json") == "a/index.json"
    assert beside("pipe:cat a/0.tar", "index.json") is None


@pytest.mark.parametrize("ranges", [True, False])
def test_any_way_of_reading_gives_the_content(served, ranges):
    url, server = served
    server.ranges = ranges
    rng = random.Random(1)
    with open_address(url, Access()) as stream:
        for _ in range(30):
            at, n = rng.randrange(len(CONTENT) + 10), rng.randrange(200_000)
            stream.seek(at)
            assert stream.read(n) == CONTENT[at : at + n]
        assert stream.seek(-10, 2) == len(CONTENT) - 10
        assert stream.read() == CONTENT[-10:]


def test_a_torn_download_resumes_where_it_stopped(served):
    url, server = served
    server.torn, server.torn_after = 3, 700_000
    assert read_bytes(url, Access(retries=1)) == CONTENT
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for _, asked in server.requests if asked]
    assert starts == [700_000, 1_400_000, 2_100_000]


def test_a_torn_download_begins_again_without_ranges(served):
    url, server = served
    server.ranges, server.torn, server.torn_after = False, 2, 700_000
    assert read_bytes(url, Access(retries=3)) == CONTENT


def test_a_server_that_stays_torn_is_given_up(served):
    url, server = served
    server.ranges, server.torn, server.torn_after = False, 10**6, 700_000
    with pytest.raises(OSError, match=r"torn after 700000 of 3000000 bytes; tried 3 times"):
        read_bytes(url, Access(retries=2))
    assert len(server.requests) == 1 + 2  # the first read, and two tries more


def test_passing_failures_are_tried_again_and_lasting_ones_are_not(served, caplog):
    url, server = served
    server.statuses = [503, 429, 500]
    assert read_bytes(url, Access(retries=3)) == CONTENT
    assert "503" in caplog.text
    assert "trying again" in caplog.text
    server.statuses = [403]
    with pytest.raises(AbsentError, match="403"):
        read_bytes(url, Access())
    server.statuses = [503] * 3
    with pytest.raises(OSError, match=r"503.*tried 3 times"):
        read_bytes(url, Access(retries=2))
    with pytest.raises(AbsentError, match="404"):
        read_bytes(url + "s", Access())


def test_waits_double(served, monkeypatch):
    url, server = served
    waits = []
    monkeypatch.setattr(access.time, "sleep", waits.append)
    monkeypatch.setattr(access, "FIRST_WAIT_S", 0.5)
    server.statuses = [503] * 9
    with pytest.raises(OSError, match="tried 9 times"):
        read_bytes(url, Access(retries=8))
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_file_that_changes_while_it_is_read_is_refused(served):
    url, server = served
    server.torn, server.torn_after = 1, 700_000
    with open_address(url, Access()) as stream:
        stream.read(10)
        server.tag = "2"
        with pytest.raises(AbsentError, match="changed while it was read"):
            stream.read()


def test_a_refused_connection_is_an_error(served):
    with pytest.raises(OSError, match="tried 2 times"):
        read_bytes("http://127.0.0.1:9/file", Access(retries=1))


def test_fsspec_addresses():
    with fsspec.open("memory://folder/a.bin", "wb") as f:
        f.write(CONTENT)
    with open_address("memory://folder/a.bin", Access()) as stream:
        stream.seek(2_000_000)
        assert stream.read(100) == CONTENT[2_000_000:2_000_100]
        stream.seek(5)
        assert stream.read() == CONTENT[5:]
    with pytest.raises(AbsentError):
        read_bytes("memory://folder/b.bin", Access())
    with pytest.raises(DataError, match="unknown://x"):
        read_bytes("unknown://x", Access())


def test_commands_run_only_if_allowed(tmp_path, latent_shards):
    latent_shards(tmp_path, [5])
    path = tmp_path / "00000.tar"
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    keys = [sample["__key__"] for sample in samples(str(path))]
    allowed = Access(retries=1, allow_pipe=True)
    for command in (f"pipe:cat {path}", f"pipe:cat {tmp_path}/0.tar.gz", f"pipe:gzip -dc {tmp_path}/0.tar.gz"):
        assert [sample["__key__"] for sample in samples(command, allowed)] == keys
        assert len(list(sample_keys(command, allowed))) == 5
    with pytest.raises(DataError, match="allow_pipe"):
        next(samples(f"pipe:cat {path}"))
    with pytest.raises(OSError, match="status 3"):
        list(samples(f"pipe:head -c 1000 {path}; exit 3", allowed))
    stream = open_address("pipe:yes", allowed)
    assert stream.read(4) == b"y\ny\n"
    stream.close()  # ends the command


def test_shards_over_http_are_those_on_disk(tmp_path, latent_shards, http_folder):
    latent_shards(tmp_path, [40])
    here = [{**s, "__url__": ""} for s in samples(str(tmp_path / "00000.tar"))]
    with http_folder(tmp_path) as (url, server):
        server.torn, server.torn_after = 4, 20_000
        assert [{**s, "__url__": ""} for s in samples(url + "00000.tar")] == here
        assert server.torn == 0
        assert len(list(sample_keys(url + "00000.tar"))) == 40
