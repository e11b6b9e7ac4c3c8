"""Tar archives: plain ones, PAX and GNU headers, links, sparse files, compression."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
from pathlib import Path
from typing import Any

from msdiff_dist.data.tar_members import TarError, chunks, members, sample_keys

from ..mutated_files import mutate_tar
from ..target import DisagreementError, Target


def archive(form: int, *files: tuple[str, bytes], **header: Any) -> bytes:
    """An archive of (name, content); `header`: fields of every member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in header.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue().rstrip(b"\0") + bytes(1024 + -len(stream.getvalue().rstrip(b"\0")) % 512)


_FILES = (("a.png", b"pixels"), ("a.cls", b"1"), ("a/b.seg.png", b"x" * 600), ("c.txt", b""))


def _links() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, link in (
            ("folder", tarfile.DIRTYPE, ""), ("a.png", tarfile.REGTYPE, ""), ("b.png", tarfile.LNKTYPE, "a.png"),
            ("c.png", tarfile.SYMTYPE, "a.png"), ("n" * 150 + ".png", tarfile.REGTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            tar.addfile(member)
    return stream.getvalue()[: 512 * 12]


def _tar_seeds() -> list[bytes]:
    plain = archive(tarfile.USTAR_FORMAT, *_FILES)
    return [
        plain,
        archive(tarfile.PAX_FORMAT, *_FILES, mtime=1.5),
        archive(tarfile.PAX_FORMAT, ("é" * 80 + ".png", b"1"), ("a.b.c.png", b"2")),
        archive(tarfile.GNU_FORMAT, ("n" * 120 + ".png", b"1"), ("a.b.c.png", b"2")),
        _links(),
        gzip.compress(plain),
        bz2.compress(plain),
        lzma.compress(plain),
    ]


def _header(name: bytes, size: bytes, kind: bytes, link: bytes = b"", rest: bytes = b"") -> bytes:
    block = bytearray(name.ljust(100, b"\0") + bytes(24) + size.ljust(12, b"\0") + bytes(12) + b" " * 8 + kind)
    block += link.ljust(100, b"\0") + b"ustar\x0000"
    block += bytes(345 - len(block)) + rest
    block += bytes(512 - len(block))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _record(text: bytes) -> bytes:
    length = len(text) + 3
    while len(b"%d %s\n" % (length, text)) != length:
        length += 1
    return b"%d %s\n" % (length, text)


def _pax(*records: bytes) -> bytes:
    content = b"".join(map(_record, records))
    return _header(b"pax", b"%011o" % len(content), b"x") + content + bytes(-len(content) % 512)


def _tar_hostile() -> dict[str, bytes]:
    end, one = bytes(1024), _header(b"a.png", b"%011o" % 1, b"0") + b"x".ljust(512, b"\0")
    sparse = struct.pack("12s12s", b"00000000000", b"00000000001").ljust(96, b"\0") + b"\0" + b"77777777777\0"
    return {
        "claims more than there is": _header(b"a.png", b"77777777777", b"0") + end,
        "claims more than there is, GNU": _header(b"a.png", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"0") + end,
        "negative size": _header(b"a.png", b"\xff" * 12, b"0") + end,
        "negative size after a member": one + _header(b"b.png", b"\xff" * 11 + b"\xfe", b"0") + end,
        "huge sparse file": _header(b"a.png", b"00000000001", b"S", rest=bytes(41) + sparse) + b"x".ljust(512) + end,
        "sparse file by PAX": _pax(b"GNU.sparse.size=99999999999", b"GNU.sparse.map=0,1", b"GNU.sparse.major=0")
        + one
        + end,
        "sparse file of version 1": _pax(
            b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=9999999999"
        )
        + one
        + end,
        "size by PAX": _pax(b"size=99999999999") + one + end,
        "negative size by PAX": _pax(b"size=-1024") + one + end,
        "size by PAX that is no number": _pax(b"size=x") + one + end,
        "name of two lines by PAX": _pax(b"path=a\nb.png") + one + end,
        "two PAX headers": _pax(b"path=b.png") + _pax(b"path=c.png") + one + end,
        "PAX header at the end": one + _pax(b"path=b.png") + end,
        "thousands of PAX headers": _pax(b"path=b.png") * 3000 + one + end,
        "thousands of long names": (_header(b"././@LongLink", b"00000000002", b"L") + b"b\0".ljust(512, b"\0")) * 3000
        + one
        + end,
        "link to itself": _header(b"a.png", b"", b"2", b"a.png") + end,
        "link to a folder": _header(b"d", b"", b"5") + _header(b"a.png", b"", b"2", b"d") + end,
        "links to each other": _header(b"a.png", b"", b"2", b"b.png") + _header(b"b.png", b"", b"2", b"a.png") + end,
        "folder with a size": _header(b"d", b"00000001000", b"5") + one + end,
        "folder of old archives": _header(b"d/", b"", b"\0") + one + end,
        "corrupt after a long name": _links()[:-512] + b"x" * 512 + end,
        "names that leave the folder": b"".join(
            _header(n, b"", b"0") for n in (b"../a.png", b"/a.png", b"..", b".", b"")
        )
        + end,
        "10000 empty members": b"".join(_header(b"%05d.png" % i, b"", b"0") for i in range(10000)) + end,
        "bomb, bzip2": bz2.compress(_header(b"a.png", b"%011o" % (1 << 29), b"0") + bytes(1 << 29) + end),
    }


def _read_tar(data: bytes, folder: Path) -> list[tuple[str, bytes]]:
    path = folder / "x.tar"
    path.write_bytes(data)
    found = list(members(io.BytesIO(data)))
    names = [name for name, _ in members(io.BytesIO(data), with_data=False)]
    assert names == [name for name, _ in found]
    keys = [key for chunk in chunks(str(path), on_duplicate=_ignore) for key in chunk["__key__"]]
    assert list(sample_keys(str(path), on_duplicate=_ignore)) == keys
    return found


def _ignore(key: str, what: str) -> None: ...


def _as_tarfile(data: bytes, found: list[tuple[str, bytes]]) -> None:
    theirs = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
            for member in archive:
                if not member.isdir():
                    stream = archive.extractfile(member)
                    theirs.append((member.name, b"" if stream is None else stream.read()))
    except Exception as e:
        raise DisagreementError(f"tarfile refuses: {type(e).__name__} {e}") from e
    # tarfile reads a prefix of the name where GNU archives of old kinds have times.
    if b"ustar  \0" in data:
        theirs, found = [("", content) for _, content in theirs], [("", content) for _, content in found]
    if theirs != found:
        raise DisagreementError(f"members: {found!r:.500} where tarfile has {theirs!r:.500}")


TARGETS = (
    Target(
        name="tar",
        read=_read_tar,
        seeds=_tar_seeds,
        hostile=_tar_hostile,
        refuses=(TarError, OSError),
        oracle=_as_tarfile,
        mutate=mutate_tar,
        largest=1 << 14,
    ),
)
