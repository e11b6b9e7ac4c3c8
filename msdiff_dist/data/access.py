"""Opening what a recipe names: local files, http(s), anything fsspec knows (s3, gs, ...) and, if allowed, commands.

Everything that is not a local file is read through `_Remote`. When a connection breaks, it opens its source again at
the position it had reached. The wait before each further try doubles.
"""

from __future__ import annotations

import glob
import http.client
import io
import logging
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

from msdiff_dist.errors import DataError

PIPE = "pipe:"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
_TIMEOUT_S = 60.0  # of an http socket: to connect, and for each read
_SKIP_BYTES = 1 << 20  # a gap up to this size is read and discarded: cheaper than a new connection
_BUFFER_BYTES = 1 << 18
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """How shards may be reached.

    Attributes:
        retries: how often a failed operation is tried again.
        allow_pipe: whether `pipe:` addresses may run their shell commands.
    """

    retries: int = 5
    allow_pipe: bool = False


DEFAULT_ACCESS = Access()


class AbsentError(OSError):
    """The file is missing, may not be read, or changed while it was read: trying again would not help."""


def is_local(address: str) -> bool:
    """Whether the address is a path in the file system of this machine."""
    return "://" not in address and not address.startswith(PIPE)


def base_name(address: str) -> str:
    """File name of an address, without the query of an http address."""
    return (urlsplit(address).path if address.startswith(("http://", "https://")) else address).rsplit("/", 1)[-1]


def beside(address: str, name: str) -> str | None:
    """Address of the file `name` in the same folder; None for commands."""
    if address.startswith(PIPE):
        return None
    if address.startswith(("http://", "https://")):
        return urljoin(address, name)
    return str(Path(address).parent / name) if is_local(address) else f"{address.rsplit('/', 1)[0]}/{name}"


def open_address(address: str, access: Access) -> BinaryIO:
    """The file at an address, for reading; seekable.

    Raises:
        AbsentError: here or while reading; the file cannot be had, whatever the number of tries.
        OSError: here or while reading; all tries failed.
        DataError: the address is a command that may not run, or no installed package knows its protocol.
    """
    if is_local(address):
        return open(address, "rb", buffering=_BUFFER_BYTES)
    return io.BufferedReader(_Remote(address, _opener(address, access), access.retries), _BUFFER_BYTES)


def read_bytes(address: str, access: Access) -> bytes:
    """The whole content of a small file. Raises as `open_address` does."""
    with open_address(address, access) as stream:
        return stream.read()


def matching(pattern: str, access: Access) -> list[str]:
    """The tar files that a remote pattern names: matches of a glob, or content of a folder, sorted; else the pattern.

    Raises:
        AbsentError, OSError, DataError: as `open_address` does.
    """

    def find() -> list[str]:
        system, path = _file_system(pattern)
        if glob.has_magic(path):
            return sorted(system.unstrip_protocol(p) for p in system.glob(path))
        if system.isdir(path):
            return sorted(system.unstrip_protocol(p) for p in system.glob(f"{path.rstrip('/')}/*.tar"))
        return [pattern]

    return _retried(pattern, find, access.retries)


def _retried(address: str, action: Callable[[], T], retries: int) -> T:
    """The result of `action`, which is tried again after a failure that may pass."""
    for attempt in range(retries + 1):
        try:
            return action()
        except DataError:  # the address itself is wrong
            raise
        except (AbsentError, FileNotFoundError, PermissionError) as e:
            raise AbsentError(*e.args) from e
        except Exception as e:  # fsspec's file systems raise exceptions of their own
            if attempt == retries:
                raise OSError(f"{_reason(e)}; tried {retries + 1} times") from e
            wait = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
            _log.warning("%s: %s; trying again in %.1f s", address, _reason(e), wait)
            time.sleep(wait)
    raise AssertionError  # not reached: the last attempt returns or raises


def _reason(e: Exception) -> str:
    return f"{type(e).__name__}: {e}" if str(e) else type(e).__name__


@dataclass(kw_only=True)
class _Connection:
    """A source, opened for reading forward.

    Attributes:
        at: position in the file of the next byte that `read` returns.
        size: bytes in the whole file; None if the source does not say.
        tag: version of the content (HTTP's ETag); None if the source has none.
    """

    read: Callable[[int], bytes]
    close: Callable[[], None]
    at: int
    size: int | None = None
    tag: str | None = None


_Opener = Callable[[int], _Connection]  # opens a source at the given position, or before it


class _Remote(io.RawIOBase):
    """A seekable file over a source that can only be opened and read forward, and whose connections break."""

    def __init__(self, address: str, opener: _Opener, retries: int) -> None:
        self._address, self._opener, self._retries = address, opener, retries
        self._position = 0
        self._connection: _Connection | None = None
        self._known: tuple[int | None, str | None] | None = None  # (size, tag) at the first connection
        _retried(address, self._connect, retries)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            assert self._known is not None
            if self._known[0] is None:
                raise io.UnsupportedOperation(f"{self._address} does not report its size")
            offset += self._known[0]
        self._position = max(offset + self._position if whence == os.SEEK_CUR else offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = _retried(self._address, lambda: self._read(len(view)), self._retries)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _read(self, n: int) -> bytes:
        size = self._known[0] if self._known else None
        if size is not None and self._position >= size:
            return b""
        # A connection that failed is dropped. The next try opens a new one at `_position`, which has not moved.
        try:
            connection = self._connect()
            data = connection.read(n)
        except BaseException:
            self._disconnect()
            raise
        connection.at += len(data)
        # A response whose server hung up early looks like one that ended. Only the size shows that bytes are missing.
        if not data and n and size is not None:
            self._disconnect()
            raise ConnectionError(f"torn after {self._position} of {size} bytes")
        return data

    def _connect(self) -> _Connection:
        """A connection whose next byte is the one at `_position`."""
        connection = self._connection
        if connection is None or not 0 <= self._position - connection.at <= _SKIP_BYTES:
            self._disconnect()
            connection = self._connection = self._opener(self._position)
            # Joining two versions of a file would give corrupt samples that look sound.
            found = (connection.size, connection.tag)
            if self._known not in (None, found):
                raise AbsentError(f"changed while it was read: (size, tag) was {self._known}, is {found}")
            self._known = found
        # An opener may start before the position: commands and servers without ranges start at byte 0.
        while connection.at < self._position:
            skipped = connection.read(min(self._position - connection.at, _SKIP_BYTES))
            if not skipped:
                if connection.size is None:
                    break  # the position lies past the end, where reading gives no bytes
                raise ConnectionError(f"torn after {connection.at} of {connection.size} bytes")
            connection.at += len(skipped)
        return connection

    def _disconnect(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None


def _opener(address: str, access: Access) -> _Opener:
    if address.startswith(PIPE):
        if not access.allow_pipe:
            raise DataError(
                "data.shards", address, "runs a command, which this recipe does not allow",
                "Set data.allow_pipe: true if you trust it.",
            )  # fmt: skip
        # A command cannot start in the middle: it runs again, and `_Remote` discards what comes before the position.
        return lambda position: _open_pipe(address.removeprefix(PIPE))
    if address.startswith(("http://", "https://")):
        return lambda position: _open_http(address, position)
    return lambda position: _open_fsspec(address, position)


def _open_http(url: str, position: int) -> _Connection:
    request = urllib.request.Request(url, headers={"Range": f"bytes={position}-"} if position else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as e:
        e.close()
        # Request Timeout, Too Early and Too Many Requests pass with time; other 4xx statuses do not.
        if 400 <= e.code < 500 and e.code not in (408, 425, 429):
            raise AbsentError(f"HTTP status {e.code} {e.reason}") from e
        raise OSError(f"HTTP status {e.code} {e.reason}") from e
    length = response.headers.get("Content-Length")
    size = None if length is None else int(length)
    # A server that ignores the range answers 200 with the whole file. Content-Range reads "bytes 100-999/1000".
    at = 0
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        at, total = position, response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else None
    return _Connection(read=response.read, close=response.close, at=at, size=size, tag=response.headers.get("ETag"))


def _open_fsspec(address: str, position: int) -> _Connection:
    system, path = _file_system(address)
    stream = system.open(path, "rb")
    if position:
        stream.seek(position)
    return _Connection(read=stream.read, close=stream.close, at=position, size=getattr(stream, "size", None))


def _file_system(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
        return found
    except (ImportError, ValueError) as e:
        remedy = "Install support for it: pip install 'msdiff-dist[s3]' for s3, or the fsspec package of this protocol."
        raise DataError("data.shards", address, f"cannot be opened ({e})", remedy) from e


def _open_pipe(command: str) -> _Connection:
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    stdout = process.stdout

    def read(n: int) -> bytes:
        data = stdout.read(n)
        # The output of a command that failed ends like that of one that finished; only the status differs.
        if not data and process.wait():
            raise OSError(f"the command ended with status {process.returncode}")
        return data

    def close() -> None:
        stdout.close()
        process.kill()
        process.wait()

    return _Connection(read=read, close=close, at=0)
