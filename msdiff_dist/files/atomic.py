"""Files and folders that are complete or absent, whatever happens while they are written.

Content is written aside in the same folder, brought to the disk (fsync) and renamed, and then the rename is brought to
the disk. A reader therefore sees the old content or the new one, after a crash of the machine too. What a killed
process leaves aside is `.NAME.XXXXXXXX.partial` (a file) or `.NAME.partial` (a folder, removed by the next writer).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from msdiff_dist.errors import UserError

_PARTIAL = re.compile(r"\.(.+?)(?:\.[0-9a-f]{8})?\.partial")


class WriteError(UserError):
    """A file or folder could not be written; what was there before is as it was."""


def atomic_write(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write the file `path`, replacing one that is there. Several processes may write it at once: one of them wins.

    Args:
        content: text (UTF-8), bytes, or a function that writes to the binary stream it is given.

    Raises:
        WriteError: no space, no such folder, no permission.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with writing("file", path, WriteError):
        try:
            with aside.open("xb") as f:
                if callable(content):
                    content(f)
                else:
                    f.write(content.encode() if isinstance(content, str) else content)
                f.flush()
                os.fsync(f.fileno())
            rename_to(path, aside)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` when the block ends without an error. For one writer at a time.

    Raises:
        WriteError: `path` is a file or a folder that holds something, now or at the end, or cannot be written.
    """
    with writing("folder", path, WriteError):
        _refuse_existing(path)
        with filled_aside(path) as aside:
            yield aside
            _refuse_existing(path)
            publish(aside, path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path of the same name to make a file or a folder at, which becomes `path` when the block ends without an error.

    Raises:
        WriteError: as `atomic_folder` does.
    """
    with writing("path", path, WriteError):
        _refuse_existing(path)
        with filled_aside(path) as aside:
            yield aside / path.name
            _refuse_existing(path)
            publish(aside / path.name, path)


@contextmanager
def writing(field: str, path: Path, error: type[UserError]) -> Iterator[None]:
    """Report that `path`, which the user gave as `field`, cannot be written, if anything inside cannot be written.

    Raises:
        UserError: `error`, in place of an OSError or a WriteError.
    """
    try:
        yield
    except WriteError as e:
        raise error(field, str(path), e.problem, e.remedy) from None
    except OSError as e:
        remedy = "Name a place you can write to, with room enough."
        raise error(field, str(path), f"cannot be written ({_reason(e)})", remedy) from e


def is_free(path: Path) -> bool:
    """Whether nothing is at `path`, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def aside_of(path: Path) -> Path:
    """Where the folder `path` is filled before it is published."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def filled_aside(path: Path) -> Iterator[Path]:
    """`aside_of(path)` as a new folder, in place of what a killed writer left there; gone at the end of the block."""
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, path: Path) -> None:
    """Bring a file or folder to the disk with all that is in it, then rename it; over an empty folder if one is there.

    Raises:
        OSError: it is not at `path` then.
    """
    if aside.is_dir():
        for folder, _, names in os.walk(aside):
            for name in names:
                _sync(Path(folder) / name)
            sync_folder(Path(folder))
    else:
        _sync(aside)
        if path.is_dir():
            path.rmdir()
    rename_to(path, aside)


def rename_to(path: Path, aside: Path) -> None:
    """Rename `aside`, whose content is on the disk, to `path`, and bring the new name to the disk."""
    aside.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can: some of networks' and users' cannot."""
    try:
        _sync(folder)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def partial_of(name: str) -> str | None:
    """The file or folder that a process began to write, by the name of what it left aside; None for other names."""
    found = _PARTIAL.fullmatch(name)
    return found[1] if found else None


def remove_partials(folder: Path, names: Iterable[str]) -> None:
    """Delete what killed processes left of these files of `folder`; for who alone writes them."""
    ours = set(names)
    for path in folder.iterdir():
        if partial_of(path.name) in ours:
            path.unlink()


def _refuse_existing(path: Path) -> None:
    if not is_free(path):
        raise WriteError("path", str(path), "exists already", "Name a new one, or remove it.")


def _reason(e: OSError) -> str:
    about = e.strerror or str(e) or type(e).__name__
    return f"{about}: {e.filename}" if e.filename else about


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
