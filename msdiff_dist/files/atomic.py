"""Files and folders that are complete or absent, whatever happens while they are written.

Content is written aside in the same folder, flushed to the disk (fsync) and renamed; then the rename is flushed to the
disk. So a reader sees the old content or the new, even after a crash of the machine. A killed process leaves
`.NAME.XXXXXXXX.partial` (a file) or `.NAME.partial` (a folder, which the next writer removes).
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
from typing import IO, Literal

from msdiff_dist.errors import UserError

# The shortest NAME is taken, so that the eight hex digits do not count as its suffix.
_PARTIAL = re.compile(r"\.(.+?)(?:\.[0-9a-f]{8})?\.partial")


class WriteError(UserError):
    """A file or folder could not be written. What was there before is unchanged."""


def atomic_write(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write the file `path`, and replace one that is there. Of several processes that write at once, the last wins.

    Args:
        content: text (UTF-8), bytes, or a function that writes to the binary stream it is given.

    Raises:
        WriteError: no space, no such folder, no permission.
    """
    # A random name: writers at the same time do not disturb each other.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with writing("file", path, WriteError):
        if path.exists() and not path.is_file():  # the rename would replace a device by a file
            raise WriteError("file", str(path), "exists and is not a file", "Name another one.")
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
    """Yield a new folder to fill, which becomes `path` when the block ends without an error. For one writer at a time.

    Raises:
        WriteError: `path` is a file or a folder that is not empty, now or at the end, or it cannot be written.
    """
    with writing("folder", path, WriteError):
        _refuse_existing(path)
        with filled_aside(path) as aside:
            yield aside
            _refuse_existing(path)  # another process may have made it meanwhile
            publish(aside, path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path at which to make a file or a folder, which becomes `path` when the block ends without an error.

    The yielded path has the name of `path`, for writers that go by its extension.

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
    """Report an OSError or WriteError of the block as the user error that `path`, given as `field`, cannot be written.

    Raises:
        UserError: of class `error`, in place of the OSError or WriteError.
    """
    try:
        yield
    except WriteError as e:
        raise error(field, str(path), e.problem, e.remedy) from None
    except OSError as e:
        remedy = "Name a place that you can write to and that has enough space."
        raise error(field, str(path), f"cannot be written ({_reason(e)})", remedy) from e


def check_place(field: str, path: Path, kind: Literal["file", "new file", "folder", "new folder", "new"]) -> None:
    """Refuse, before work begins, a place where what an option names cannot be written. Nothing is left there.

    Args:
        field: the option that names `path`.
        kind: what will be written. A new one must not exist, but for an empty folder; "new" may be either.

    Raises:
        WriteError: something else is there or on the way to it, or it cannot be written to.
    """
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if existing != path:
        if not existing.is_dir():
            raise WriteError(field, str(path), f"cannot be made: {existing} is not a folder", "Name another place.")
        if kind == "file" and existing != path.absolute().parent:
            raise WriteError(field, str(path), f"there is no folder {path.parent}", "Make it, or name another place.")
    elif kind != "new" and not (path.is_dir() if "folder" in kind else path.is_file()):
        what = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
        raise WriteError(field, str(path), f"is {what}", f"Name a {kind.removeprefix('new ')}.")
    elif kind.startswith("new") and not is_free(path):
        raise WriteError(field, str(path), "exists already", "Name a new one, or remove it.")
    # A file is written beside what it replaces, and so is a folder that is filled aside.
    inside = existing != path or kind == "folder"
    beside = existing if inside else existing.absolute().parent
    with writing(field, path, WriteError):
        # Only writing shows all that may be in the way: permissions, read-only and full file systems, quotas.
        probe = beside / f".{secrets.token_hex(4)}.partial"
        try:
            with probe.open("xb") as f:
                f.write(b"0")
        finally:
            probe.unlink(missing_ok=True)


def is_free(path: Path) -> bool:
    """Whether `path` does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def aside_of(path: Path) -> Path:
    """The path at which the folder `path` is filled before it is published."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def filled_aside(path: Path) -> Iterator[Path]:
    """Yield `aside_of(path)` as a new empty folder, without what a killed writer left; remove it after the block."""
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, path: Path) -> None:
    """Flush a file or a whole folder to the disk, then rename it to `path`, where an empty folder is replaced.

    Raises:
        OSError: `aside` was not renamed.
    """
    # fsync of a folder covers the names in it but not its files' content, so every file and folder gets its own. All
    # that is before the rename: a crash may keep the rename and lose what was not flushed.
    if aside.is_dir():
        for folder, _, names in os.walk(aside):
            for name in names:
                _sync(Path(folder) / name)
            sync_folder(Path(folder))
    else:
        _sync(aside)
        if path.is_dir():
            path.rmdir()  # a folder can be renamed over an empty folder, a file cannot
    rename_to(path, aside)


def rename_to(path: Path, aside: Path) -> None:
    """Rename `aside`, whose content has been flushed, to `path`, and flush the new name to the disk."""
    aside.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk. File systems that cannot, such as some network ones, are left alone."""
    try:
        _sync(folder)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def partial_of(name: str) -> str | None:
    """The name of the file or folder that was being written aside under `name`; None if `name` is not of that form."""
    found = _PARTIAL.fullmatch(name)
    return found[1] if found else None


def remove_partials(folder: Path, names: Iterable[str]) -> None:
    """Delete what killed processes left of the files `names` in `folder`. No other process may be writing them."""
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
