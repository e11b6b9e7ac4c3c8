"""Members and samples of tar files, compared with tarfile and webdataset."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from msdiff_dist.data.tar_members import TarError, members, sample_keys, samples

names = st.text(alphabet="abcé_-", min_size=1, max_size=40)
file_names = st.builds(lambda parts, key, ext: "/".join([*parts, key]) + ext, st.lists(names, max_size=4), names,
                       st.sampled_from([".png", ".cls", ".seg.png", "", ".JPG"]))  # fmt: skip
files = st.dictionaries(file_names, st.binary(max_size=1500), max_size=8)


def archive(content: dict[str, bytes], form: int, **header: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in header.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


@given(files, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_members_are_those_of_tarfile(content, form, with_data):
    if form == tarfile.USTAR_FORMAT:  # has no room for longer names
        content = {name: data for name, data in content.items() if len(name.encode()) <= 100}
    read = list(members(io.BytesIO(archive(content, form, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)), with_data))
    assert read == [(name, data if with_data else b"") for name, data in content.items()]


def test_other_kinds_of_members_are_left_to_tarfile():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b.png", tarfile.SYMTYPE), ("c.png", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)
    stream.seek(0)
    assert [name for name, _ in members(stream)] == ["a.png", "b.png", "c.png"]
    packed = io.BytesIO(gzip.compress(archive({"a.png": b"1"}, tarfile.USTAR_FORMAT)))
    assert list(members(packed)) == [("a.png", b"1")]


def test_samples_are_those_of_webdataset(tmp_path):
    content = {
        "__meta__/x.json": b"{}", "a/1.png": b"1", "a/1.cls": b"2", "a/1.seg.png": b"3", "README": b"no extension",
        "a/2.PNG": b"4", "b/2.png": b"5",
    }  # fmt: skip
    path = tmp_path / "x.tar"
    path.write_bytes(archive(content, tarfile.USTAR_FORMAT))
    theirs = [
        {k: v for k, v in s.items() if k != "__local_path__"}
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert list(samples(str(path))) == theirs
    assert len(list(sample_keys(str(path)))) == len(theirs) == 3


@pytest.mark.parametrize("at", [600, 3000, 4200])
def test_corruption_is_an_error(tmp_path, at):
    content = {f"{i}.png": bytes(700) for i in range(4)}
    whole = archive(content, tarfile.USTAR_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(whole[:at])
    with pytest.raises(TarError):
        list(sample_keys(str(path)))
    path.write_bytes(whole[:512] + b"x" * 512 + whole[1024:])
    with pytest.raises(TarError, match="byte 512"):
        list(sample_keys(str(path)))
    path.write_bytes(b"not an archive" * 100)
    with pytest.raises(TarError):
        list(sample_keys(str(path)))


@pytest.mark.parametrize("size", [b"00000000x12\0", b"0000000-012\0", b"00000000_12\0", b"00000000089\0"])
def test_a_size_that_is_no_octal_number_is_an_error(size):
    header = bytearray(archive({}, tarfile.USTAR_FORMAT)[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(TarError, match="no octal number in the header at byte 0"):
        list(members(io.BytesIO(bytes(header))))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archives_that_are_corrupt(compress):
    rng = random.Random(0)
    content = {f"{i}.png": bytes(rng.choices(range(8), k=3000)) for i in range(8)}
    whole = compress(archive(content, tarfile.USTAR_FORMAT))
    for at in range(10, len(whole), len(whole) // 15):
        for corrupt in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) * 9 + whole[at + 9 :]):
            try:
                list(members(io.BytesIO(corrupt)))
            except (TarError, OSError):
                continue
            assert compress is gzip.compress  # its checksum is at the end, which is not read


def test_what_comes_twice_is_refused_or_reported_and_skipped(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, mode="w") as tar:
        for content, name in enumerate(("a.png", "a.cls", "a.png", "b.png", "a.png", "c.png", "c.cls")):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(bytes([content])))
    for read in (samples, sample_keys):
        with pytest.raises(TarError, match=r"'a': its file a\.png comes twice"):
            list(read(str(path)))
    reported: list[tuple[str, str]] = []
    found = list(samples(str(path), on_duplicate=lambda *what: reported.append(what)))
    assert [s["__key__"] for s in found] == ["a", "b", "c"]
    assert (found[0]["png"], found[0]["cls"]) == (b"\0", b"\1")
    assert reported == [("a", "its file a.png comes twice"), ("a", "its key comes twice in the shard")]
    assert list(sample_keys(str(path), on_duplicate=lambda *what: None)) == ["a", "b", "c"]


def linked(kind: bytes, target: str) -> bytes:
    """Two files, and two links of this kind: one to the first file, one to `target`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, link in (("0.png", ""), ("1.png", "0.png"), ("2.png", ""), ("3.png", target)):
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = kind, link
                tar.addfile(member)
            else:
                member.size = 5
                tar.addfile(member, io.BytesIO(f"data{name[0]}".encode()))
    return stream.getvalue()


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_links_are_files_like_others(kind, tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(linked(kind, "2.png"))
    expected = {"0": b"data0", "1": b"data0", "2": b"data2", "3": b"data2"}
    assert {s["__key__"]: s["png"] for s in samples(str(path))} == expected
    assert [name for name, _ in members(io.BytesIO(path.read_bytes()), with_data=False)] == [
        f"{key}.png" for key in expected
    ]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_a_link_to_nothing_is_named(kind):
    with pytest.raises(TarError, match=r"'3\.png' is a link to 'gone\.png', which is not there"):
        list(members(io.BytesIO(linked(kind, "gone.png"))))


def test_a_device_is_named():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo("null")
        member.type = tarfile.CHRTYPE
        tar.addfile(member)
    with pytest.raises(TarError, match="'null' is a device or pipe"):
        list(members(io.BytesIO(stream.getvalue())))


def test_a_pointer_or_page_in_place_of_a_shard_is_named():
    for content, words in ((b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"<html>" * 200, "HTML")):
        with pytest.raises(TarError, match=words):
            list(members(io.BytesIO(content)))
