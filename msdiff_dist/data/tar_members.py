"""Reading tar shards: members, and the samples they make up.

`tarfile` spends more time on a header than PIL on a small image. So plain USTAR and PAX members are parsed here. The
first header of another kind (GNU long names, links, sparse files, a compressed archive) hands the archive over to
`tarfile`.
Members are grouped into samples by webdataset's own function.

Bytes of a USTAR header that are used here (POSIX.1-1988): name 0-99, size 124-135 and checksum 148-155 in octal, type
156, magic 257-262, prefix of the name 345-499.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys

from msdiff_dist.data.access import DEFAULT_ACCESS, Access, open_address
from msdiff_dist.data.foreign import what_it_is
from msdiff_dist.data.latent_blocks import BLOCK_FIELD, BlockError, Chunk, block_keys, objects, read_block

OnDuplicate = Callable[[str, str], None]
"""Called with the key of a sample and what comes twice, as a clause."""

_LEAST_UNPACKED, _MOST_RATIO = (
    1 << 25,
    200,
)  # a compressed archive may hold so many bytes, and so many for each of its own
_MOST_SPARSE = 1 << 26  # bytes of a sparse file, which may be stored in a few
BLOCK = 512  # bytes; a header is one, and content is padded to whole ones
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own bookkeeping members
_OCTAL = re.compile(rb"[0-7]+")
_PAX_RECORD = re.compile(rb"([1-9]\d{0,5}) ([^=\n]+)=([^\n]*)\n")
# PAX records that do not change how the member after them is laid out; another one leaves the archive to `tarfile`.
_PAX_PLAIN = {b"path", b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}


class TarError(Exception):
    """The archive is corrupt, or something in it comes twice."""


def samples(
    path: str, access: Access = DEFAULT_ACCESS, on_duplicate: OnDuplicate | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of `chunks` one by one, as WebDataset yields them: `__key__`, `__url__`, an entry per extension."""
    for chunk in chunks(path, access, on_duplicate):
        for row in zip(*chunk.values(), strict=True):
            yield dict(zip(chunk, row, strict=True))


def chunks(path: str, access: Access = DEFAULT_ACCESS, on_duplicate: OnDuplicate | None = None) -> Iterator[Chunk]:
    """A shard's samples: each by itself, grouped from files by WebDataset's rules, or in blocks as they were packed.

    Args:
        on_duplicate: called for a file name or key that comes a second time, which is then skipped. None: an error.

    Raises:
        TarError: the archive is corrupt, or has a duplicate and there is no `on_duplicate`.
        OSError: the file cannot be read.
    """
    for sample in _grouped(path, access, on_duplicate or _refuse, with_data=True):
        if BLOCK_FIELD not in sample:
            yield {name: objects([value]) for name, value in sample.items()}
            continue
        try:
            yield read_block(sample[BLOCK_FIELD], path)
        except BlockError as e:
            raise TarError(f"block {sample['__key__']} {e}") from e


def sample_keys(path: str, access: Access = DEFAULT_ACCESS, on_duplicate: OnDuplicate | None = None) -> Iterator[str]:
    """The keys of a shard's samples, from headers alone but for blocks. Arguments and errors as for `chunks`."""
    for sample in _grouped(path, access, on_duplicate or _refuse, with_data=False):
        if BLOCK_FIELD not in sample:
            yield sample["__key__"]
            continue
        try:
            yield from block_keys(sample[BLOCK_FIELD])
        except BlockError as e:
            raise TarError(f"block {sample['__key__']} {e}") from e


def members(stream: BinaryIO, with_data: bool = True) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of an archive. Without `with_data`, content is empty but for blocks.

    Raises:
        TarError: the archive is corrupt or cut short.
    """
    offset, given = 0, 0
    records: dict[bytes, bytes] | None = None  # of the PAX header before this one
    while header := stream.read(BLOCK):
        kind = header[156:157]
        if header == bytes(BLOCK):
            if records is not None:
                raise TarError("cut short: its last header belongs to a member that is not there")
            return
        if not _checksum_holds(header):
            if offset == 0:  # perhaps a compressed archive
                yield from _through_tarfile(stream, given, with_data)
                return
            what = "cut short inside the" if len(header) < BLOCK else "corrupt"
            raise TarError(f"{what} header at byte {offset}")
        # Read here: regular files (0, and NUL of old archives), PAX headers (x), folders (5). A size whose first bit is
        # set is GNU's binary form, for files too large for the octal digits.
        if kind not in b"0\0x5" or header[124] & 0x80:
            yield from _through_tarfile(stream, given, with_data)
            return
        digits = header[124:136].strip(b" \0") or b"0"
        if not _OCTAL.fullmatch(digits):  # the checksum only says that the header was written so
            raise TarError(f"a size that is no octal number in the header at byte {offset}")
        # Archives older than ustar write a folder as a file whose name ends in a slash. A folder has no content: its
        # size is room for it, if anything (POSIX, ustar's typeflag 5).
        is_folder = kind == b"5" or (kind == b"\0" and header[:100].split(b"\0", 1)[0].endswith(b"/"))
        size = 0 if is_folder else int(digits, 8)
        padding = -size % BLOCK
        extended_name = records.get(b"path") if records else None
        name = (extended_name or _plain_name(header)).decode("utf-8", "surrogateescape")
        content = b""
        if with_data or kind == b"x" or name.endswith(BLOCK_FIELD):
            content = stream.read(size)
            if len(content) < size:
                raise TarError(f"cut short inside the member at byte {offset}")
            stream.read(padding)
        else:
            stream.seek(size + padding, 1)
        if kind == b"x":
            following, records = records, _pax_records(content)
            if records is None or following is not None or not records.keys() <= _PAX_PLAIN:
                yield from _through_tarfile(stream, given, with_data)
                return
        else:
            records = None
            if not is_folder:
                given += 1
                yield name, content
        offset += BLOCK + size + padding
    raise TarError("cut short: it has no end mark")


def _grouped(path: str, access: Access, on_duplicate: OnDuplicate, with_data: bool) -> Iterator[dict[str, Any]]:
    """The samples of an archive whose keys are new, as webdataset groups them."""
    repeated: list[str] = []  # file names that came twice in the sample that `group_by_keys` yields next

    # `group_by_keys` raises ValueError("NAME: duplicate file name ...") for a file that comes twice in a sample. True
    # makes it skip that file.
    def note_repeated(error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        repeated.append(str(error.args[0]).split(":", 1)[0])
        return True

    keys: set[str] = set()
    for sample in group_by_keys(_files(path, access, with_data), handler=note_repeated):
        key = sample["__key__"]
        new = key not in keys
        if not new:
            on_duplicate(key, "its key comes twice in the shard")
        for name in repeated:
            on_duplicate(key, f"its file {name} comes twice")
        repeated.clear()
        keys.add(key)
        if new:
            yield sample


def _refuse(key: str, what: str) -> None:
    raise TarError(f"sample {key!r}: {what}")


def _files(path: str, access: Access, with_data: bool) -> Iterator[dict[str, Any]]:
    """The files of an archive as webdataset's `group_by_keys` takes them."""
    with open_address(path, access) as stream:
        for name, content in members(stream, with_data):
            if not _META.match(name):
                yield {"fname": name, "data": content, "__url__": path}


def _checksum_holds(header: bytes) -> bool:
    if len(header) < BLOCK:
        return False
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    # The sum of all bytes, where the checksum's own count as spaces.
    return stated == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _pax_records(content: bytes) -> dict[bytes, bytes] | None:
    """The records of a PAX header; None if one is not plainly `LENGTH KEY=VALUE` in one line."""
    records, at = {}, 0
    while at < len(content):
        found = _PAX_RECORD.match(content, at)
        # The length counts the whole record. A value may hold line ends, which only the length shows.
        if found is None or int(found[1]) != found.end() - at or not found[3] or b"\0" in found[3]:
            return None
        records[found[2]], at = found[3], found.end()
    return None if records.get(b"path", b"").endswith(b"/") else records


def _plain_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _size(stream: BinaryIO) -> int | None:
    """Bytes in the whole stream; None if its source does not say."""
    try:
        return stream.seek(0, io.SEEK_END)
    except io.UnsupportedOperation:
        return None


class _Member(tarfile.TarInfo):
    """A header as `tarfile` reads it, but for one that is broken: there `tarfile` takes the archive to end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as e:
            # At the start, `tarfile` goes on to try compressed archives. Two empty blocks are the end mark.
            if archive.offset == 0 or isinstance(e, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise TarError(f"{e} at byte {archive.offset}") from e


def _through_tarfile(stream: BinaryIO, given: int, with_data: bool) -> Iterator[tuple[str, bytes]]:
    """`members` of the whole archive but for the first `given`, which have been yielded already.

    It is read from its start, because a link may lead to any earlier member. Archives of deduplicated copies have hard
    links in the place of files; as samples they are files like others.
    """
    packed = _size(stream)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:*", tarinfo=_Member) as archive:
            most = None if packed is None or archive.fileobj is stream else _LEAST_UNPACKED + _MOST_RATIO * packed
            files = (member for member in archive if not member.isdir())
            for member in itertools.islice(files, given, None):
                if most is not None and member.offset_data + member.size > most:
                    raise TarError(f"member {member.name!r} claims {member.size} bytes of {packed} compressed ones")
                yield member.name, _content(archive, member, with_data)
    except (TarError, OSError):
        raise
    # What its parsers of numbers, sparse files, nested headers and compressed data let through is of many kinds.
    except Exception as e:
        stream.seek(0)
        what = what_it_is(stream.read(512)) if isinstance(e, tarfile.ReadError) else None
        raise TarError(what or f"{type(e).__name__}: {e}") from e


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, with_data: bool) -> bytes:
    """Content of a file, or of the one that a link leads to; empty without `with_data`, but for blocks."""
    if not (member.isreg() or member.islnk() or member.issym()):
        raise TarError(f"member {member.name!r} is a device or pipe, not a file")
    # Sparse files state their size, and may have no content; what links lead to is one file of the archive.
    if member.size < 0 or (member.issparse() and member.size > _MOST_SPARSE):
        raise TarError(f"member {member.name!r} claims {member.size} bytes")
    try:
        content = archive.extractfile(member)
    except KeyError as e:
        raise TarError(f"member {member.name!r} is a link to {member.linkname!r}, which is not there") from e
    except RecursionError as e:
        raise TarError(f"member {member.name!r} is a link that leads to itself") from e
    if content is None:
        raise TarError(f"member {member.name!r} is a link to {member.linkname!r}, which is no file")
    return content.read() if with_data or member.name.endswith(BLOCK_FIELD) else b""
