"""The containers of `torch.save`: a zip archive, the format before torch 1.6, and a bare pickle.

zip       NAME/data.pkl, NAME/data/KEY: one file for each storage, not compressed
before    pickles of a magic number, a version, facts of the machine, the content, the storages' keys; then of each
          storage its number of elements as int64, and its bytes
bare      one pickle, of `pickle.dump`

The file is mapped once, and every tensor is a view of it.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from msdiff_dist.convert.pickles.machine import Budget, Machine
from msdiff_dist.convert.pickles.values import CALLS, Named, PickleError, Shell, Storage, size, storage_type

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6
_TAR, _SCRIPT = "torch.save's oldest format, a tar archive", "TorchScript, a program and no checkpoint"


class TorchFile:
    """Content of a file, as in `values`.

    Attributes:
        content: what was saved.
        bare: whether it is a bare pickle.

    Raises:
        PickleError: it is of another kind, corrupt, or holds more than a file of its length may.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise PickleError("it is empty")
            # Private and writable, as torch wants the memory of a tensor; the file is not changed.
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._memory = memoryview(self._mapping)
        self._budget = Budget(len(self._memory))
        self.bare = False
        if self._mapping[:4] == b"PK\x03\x04":
            self.content = self._zip(path)
        elif self._mapping[257:262] == b"ustar":
            raise PickleError(f"it is {_TAR}")
        else:
            self.bare, self.content = _unzipped(self._memory, self._budget, nested=False)

    def free_pages(self) -> None:
        """Let the system take back the memory of what was read. It is read again where it is used again."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def _zip(self, path: Path) -> Any:
        try:
            with zipfile.ZipFile(path) as archive:
                members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as e:
            raise PickleError(str(e)) from None
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if not roots:
            raise PickleError("it is a zip archive without data.pkl")
        root = min(roots, key=len)
        if f"{root}constants.pkl" in members:
            raise PickleError(f"it is {_SCRIPT}")
        if f"{root}byteorder" in members:
            start, end = self._place(members[f"{root}byteorder"])
            if self._mapping[start:end] == b"big":
                raise PickleError("it was written by a big-endian machine")

        def persistent(pid: Any) -> Storage:
            dtype, key, numel, _ = _storage_id(pid)
            info = members.get(f"{root}data/{key}")
            if info is None:
                raise PickleError(f"its member data/{key} is missing")
            start, end = self._place(info)
            nbytes = numel * dtype.itemsize
            if nbytes > end - start:
                raise PickleError(f"data/{key} holds {end - start} of {nbytes} bytes")
            return Storage(dtype, self._memory, start, nbytes)

        start, end = self._place(members[f"{root}data.pkl"])
        return Machine(self._memory, start, end, self._budget, persistent, _calls(self._budget)).load()

    def _place(self, info: zipfile.ZipInfo) -> tuple[int, int]:
        """First byte of an archive's member, and the byte after its last one.

        Raises:
            PickleError: it is compressed, or not where the archive says.
        """
        if info.compress_type != zipfile.ZIP_STORED:
            raise PickleError(f"{info.filename} was compressed by another program than torch.save")
        header = self._mapping[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise PickleError(f"{info.filename} is not where the archive says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > len(self._memory):
            raise PickleError(f"{info.filename} is cut short")
        return start, start + info.file_size


def _unzipped(data: memoryview, budget: Budget, nested: bool) -> tuple[bool, Any]:
    """Whether `data` is a bare pickle, and the content of that or of a file of torch before 1.6.

    Args:
        nested: whether the data are themselves part of a pickle.
    """
    end = len(data)
    calls = CALLS if nested else _calls(budget)
    first = Machine(data, 0, end, budget, _no_storages, calls)
    magic = first.load()
    if magic != _MAGIC or type(magic) is not int:
        return True, magic
    at = first.at
    for _ in range(2):
        at = _after(data, at, budget, _no_storages)
    # The storages come after the content that names them, so the content is read once to learn how long they are.
    dtypes: dict[str, Any] = {}

    def noting(pid: Any) -> Any:
        if not _is_storage(pid):
            return _class(pid)
        found = _storage_id(pid)
        dtypes.setdefault(found[1], found[0])
        return Storage(found[0], None, 0, 0)

    machine = Machine(data, at, end, budget, noting, calls)
    machine.load()
    listing = Machine(data, machine.at, end, budget, _no_storages)
    keys = listing.load()
    if not isinstance(keys, list):
        raise PickleError("it has no list of storages")
    places: dict[str, tuple[int, int]] = {}
    start = listing.at
    for key in map(str, keys):
        if start + 8 > end or key not in dtypes:
            raise PickleError("it is cut short")
        nbytes = size(struct.unpack("<q", data[start : start + 8])[0], "length of a storage") * dtypes[key].itemsize
        places[key] = start + 8, nbytes
        start += 8 + nbytes
    if start > end:
        raise PickleError("it is cut short")

    def persistent(pid: Any) -> Any:
        if not _is_storage(pid):
            return _class(pid)
        dtype, key, numel, view = _storage_id(pid)
        begin, nbytes = places.get(key, (0, 0))
        offset, numel = view or (0, numel)
        if (offset + numel) * dtype.itemsize > nbytes:
            raise PickleError(f"storage {key} holds {nbytes} bytes, fewer than its tensors")
        return Storage(dtype, data, begin + offset * dtype.itemsize, numel * dtype.itemsize)

    return False, Machine(data, at, end, budget, persistent, calls).load()


def _after(data: memoryview, at: int, budget: Budget, persistent: Callable[[Any], Any]) -> int:
    """The place after the pickle at `at`."""
    machine = Machine(data, at, len(data), budget, persistent)
    machine.load()
    return machine.at


def _calls(budget: Budget) -> Mapping[str, Callable[..., Any]]:
    """The calls that give more than a shell, with that for a storage inside a bare pickle: a file inside the file."""

    def load_from_bytes(*args: Any) -> Any:
        if len(args) != 1 or not isinstance(args[0], bytes | memoryview):
            return Shell("torch.storage._load_from_bytes", args)
        data = args[0]
        if isinstance(data, bytes):
            budget.charge(len(data))
            data = memoryview(bytearray(data))  # torch wants memory that can be written to
        return _unzipped(data, budget, nested=True)[1]

    return {**CALLS, "torch.storage._load_from_bytes": load_from_bytes}


def _is_storage(pid: Any) -> bool:
    return isinstance(pid, tuple) and bool(pid) and pid[0] in ("storage", b"storage")


def _class(pid: Any) -> Any:
    """Of the id of a module's class, which comes with its source: the class."""
    return pid[1] if isinstance(pid, tuple) and len(pid) > 1 else Shell("torch.nn.Module")


def _storage_id(pid: Any) -> tuple[Any, str, int, tuple[int, int] | None]:
    """Of the id of a storage: its elements' type, key and number; and, if it is a view, its offset and length."""
    if not _is_storage(pid) or len(pid) not in (5, 6):
        raise PickleError("a persistent id names no storage")
    view = pid[5] if len(pid) == 6 else None
    if view is not None:
        if not isinstance(view, tuple) or len(view) != 3:
            raise PickleError("a view of a storage is none")
        view = size(view[1], "offset of a storage"), size(view[2], "length of a storage")
    if not isinstance(pid[2], str | int):
        raise PickleError("the key of a storage is none")
    return storage_type(pid[1] if isinstance(pid[1], Named) else None), str(pid[2]), size(pid[4], "storage"), view


def _no_storages(pid: Any) -> NoReturn:
    raise PickleError("it names storages and is not of torch.save")
