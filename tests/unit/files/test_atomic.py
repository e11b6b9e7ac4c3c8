"""Files and folders that are complete or absent: full disks, kills, existing targets, folders not to be written to."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from msdiff_dist.errors import RunFolderError, UserError
from msdiff_dist.files.atomic import (
    WriteError,
    atomic_folder,
    atomic_path,
    atomic_write,
    partial_of,
    remove_partials,
    sync_folder,
    writing,
)
from msdiff_dist.files.digest import sha256_of


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def small_files() -> Callable[[], None]:
    """No file of this process may grow past 4 KiB, as on a full disk."""
    handler, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("content", ["Ångström\n", b"\x00\xff", lambda f: f.write(b"streamed")])
def test_text_bytes_and_streams_replace_what_is_there(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "a"
    path.write_text("before, and longer than what comes")
    atomic_write(path, content)
    expected = content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else b"streamed"
    assert tree(tmp_path) == {"a": expected}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_error_while_writing_leaves_all_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")

    def fails(f: IO[bytes]) -> None:
        f.write(b"half")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        atomic_write(tmp_path / "a", fails)
    assert tree(tmp_path) == {"a": b"before"}


@pytest.mark.usefixtures("small_files")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(WriteError, match=r"cannot be written \(File too large"):
        atomic_write(tmp_path / "a", b"x" * 5000)

    def fill() -> None:
        with atomic_folder(tmp_path / "folder") as aside:
            (aside / "small").write_text("fits")
            (aside / "large").write_bytes(b"x" * 5000)

    with pytest.raises(WriteError, match="File too large") as caught:
        fill()
    assert caught.value.value == str(tmp_path / "folder")
    assert tree(tmp_path) == {"a": b"before"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("write", [lambda p: atomic_write(p, ""), lambda p: atomic_folder(p).__enter__()])
def test_a_place_that_cannot_be_written_to(tmp_path: Path, write: Callable[[Path], object]) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunFolderError, match=r"--out = .*cannot be written \(Not a directory"),
        writing("--out", tmp_path, RunFolderError),
    ):
        write(tmp_path / "file" / "inside")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        atomic_write(tmp_path / "a", "")


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with atomic_folder(out) as aside:
        (aside / "deep").mkdir()
        (aside / "deep/a").write_text("x")
        assert not out.exists()
    assert tree(tmp_path) == {"new/out/deep/a": b"x"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_file_or_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new.bin", "empty"):
        with atomic_path(tmp_path / name) as aside:
            assert aside.name == name
            aside.write_text("x")
    with atomic_path(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "a").write_text("x")
    assert tree(tmp_path) == {"new.bin": b"x", "empty": b"x", "folder/a": b"x"}


@pytest.mark.parametrize("new", [atomic_folder, atomic_path])
def test_what_is_there_is_never_lost(tmp_path: Path, new: Callable) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("x")
    before = tree(tmp_path)
    for name in ("file", "full"):
        with pytest.raises(WriteError, match="exists already"), new(tmp_path / name):
            raise AssertionError

    def be_late() -> None:
        with new(tmp_path / "late") as aside:
            aside.mkdir(exist_ok=True)
            (aside / "ours").write_text("y")
            (tmp_path / "late").mkdir()
            (tmp_path / "late/theirs").write_text("x")

    with pytest.raises(WriteError, match="exists already"):
        be_late()
    assert tree(tmp_path) == before | {"late/theirs": b"x"}


KILLED = """
import os, signal, sys
from pathlib import Path
from msdiff_dist.files import atomic
atomic.rename_to = lambda path, aside: os.kill(os.getpid(), signal.SIGKILL)
path = Path(sys.argv[2])
if sys.argv[1] == "file":
    atomic.atomic_write(path, "after")
with atomic.atomic_folder(path) as aside:
    (aside / "a").write_text("after")
"""


def test_a_kill_between_write_and_rename(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    for kind, name in (("file", "a"), ("folder", "b")):
        killed = subprocess.run([sys.executable, "-c", KILLED, kind, str(tmp_path / name)])
        assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "before"
    assert not (tmp_path / "b").exists()
    left = {partial_of(p.name): p for p in tmp_path.iterdir()}
    assert left.keys() == {None, "a", "b"}
    assert left["a"].read_text() == "after"

    remove_partials(tmp_path, ["x"])
    assert left["a"].exists()
    remove_partials(tmp_path, ["a"])
    with atomic_folder(tmp_path / "b"):  # takes the place of the other
        pass
    assert tree(tmp_path) == {"a": b"before"}
    assert not list(tmp_path.glob(".*"))


def test_names_of_what_lies_aside() -> None:
    assert partial_of(".00003.tar.0123abcd.partial") == "00003.tar"
    assert partial_of(".step_00000004.partial") == "step_00000004"
    assert [partial_of(name) for name in ("00003.tar", ".lock", "a.partial", ".partial")] == [None] * 4


def test_file_systems_that_cannot_sync_folders() -> None:
    handle = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(handle)
    os.close(handle)
    sync_folder(Path("/proc"))
    with pytest.raises(FileNotFoundError):
        sync_folder(Path("/proc/none"))


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
