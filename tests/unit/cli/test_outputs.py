"""Places that commands are to write to: one message names option and path before work begins, and nothing changes."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from msdiff_dist.cli.main import app
from msdiff_dist.errors import UserError
from msdiff_dist.files.atomic import WriteError, atomic_write, check_place

ROOT = Path(__file__).parents[3]
DEBUG = str(ROOT / "recipes/debug.yaml")
COMMANDS: dict[str, tuple[list[str], str, str]] = {
    "train": (["train", DEBUG, "--run-dir", "{}"], "--run-dir", "folder"),
    "launch": (["launch", DEBUG, "--cluster", "local", "--run-dir", "{}"], "--run-dir", "folder"),
    "array": (["array", "--cluster", "local", "--folder", "{}", "--", "doctor"], "--folder", "folder"),
    "sample": (["sample", "no_run", "--out", "{}"], "--out", "folder"),
    "interval-report": (
        ["interval-report", "a", "--reference", "b", "--data", "d", "--out", "{}"], "--out", "new",
    ),
    "export": (["export", "no_run", "--out", "{}"], "--out", "new"),
    "convert": (["convert", "a", "{}", "--from", "msdiff", "--to", "diffusers"], "DST", "new"),
    "grow": (["grow", "a", "{}", "--boundaries", "500", "--widths", "8,8"], "DST", "new"),
    "merge": (["merge", "{}", "a", "b", "--boundaries", "500"], "DST", "new"),
    "extract": (["extract", "a", "{}", "--stage", "0"], "DST", "new"),
    "data prepare": (["data", "prepare", "digits", "--out", "{}"], "--out", "new"),
    "data pack": (["data", "pack", str(ROOT / "docs"), "--out", "{}"], "--out", "new"),
    "data encode": (["data", "encode", DEBUG, "--out", "{}"], "--out", "folder"),
    "init": (["init", "quickstart", "--out", "{}"], "--out", "new file"),
    "classifier train": (["classifier", "train", DEBUG, "--out", "{}"], "--out", "new file"),
    "check": (["check", "--small", "--json", "{}"], "--json", "file"),
    "stages cluster": (["stages", "cluster", "--method", "snr", "--plot", "{}"], "--plot", "file"),
    "evaluate": (["evaluate", "no_run", "--json", "{}"], "--json", "file"),
}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(command: list[str], place: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, [word.replace("{}", str(place)) for word in command], catch_exceptions=False)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", COMMANDS)
def test_places_that_cannot_be_written_to(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, option, kind = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file, full = tmp_path / "file.png", tmp_path / "full.png"
    file.write_text("mine")
    full.mkdir()
    (full / "a").write_text("mine")
    before = tree(tmp_path)
    # Below a file; in a file system that takes no files; a device; a folder in a file's place, and the reverse.
    places = [file / "out.png", Path("/proc/out.png"), Path("/dev/full")]
    places += [full] if "file" in kind else [file] if kind == "folder" else [file, full]
    for place in places:
        message = refused(command, place)
        assert message.startswith(f"{option} = {str(place)!r}: "), message
        assert message.endswith("."), message
    assert tree(tmp_path) == before
    assert Path("/dev/full").is_char_device()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode
    )
    if not mounted:
        pytest.skip("no file system can be mounted")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_runs_full(small_disk: Path) -> None:
    for command in (["data", "prepare", "digits", "--out", "{}"], ["init", "quickstart", "--out", "{}"]):
        (small_disk / "rest").unlink(missing_ok=True)
        if command[0] == "init":
            fill(small_disk)
        message = refused(command, small_disk / "out")
        assert f"--out = {str(small_disk / 'out')!r}: cannot be written (No space left on device" in message
        assert {p.name for p in small_disk.iterdir()} <= {"rest"}


def fill(disk: Path) -> None:
    with (disk / "rest").open("wb", buffering=0) as f, suppress(OSError):
        while f.write(b"x" * 512):
            pass


def test_a_read_only_file_system(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for name, (command, option, _) in COMMANDS.items():
        message = refused(command, small_disk / "out.png")
        assert message.startswith(f"{option} = "), name
        assert "Read-only file system" in message, name


def test_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    check_place("--out", tmp_path / "empty", "new folder")
    check_place("--out", tmp_path / "empty", "new")
    check_place("--out", tmp_path / "empty", "folder")
    check_place("--out", tmp_path / "a/b/c", "folder")
    check_place("--out", tmp_path / "a/b/c", "new file")
    check_place("--out", tmp_path / "file", "file")
    check_place("--out", tmp_path / "other", "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]
    with pytest.raises(WriteError, match="there is no folder"):
        check_place("--out", tmp_path / "a/b", "file")


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(WriteError, match="not a file"):
        atomic_write(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("arguments", [["plan", DEBUG, "--world-size", "2", "--json"], ["recipes"]])
def test_output_that_cannot_be_written(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "msdiff_dist.cli.main", *arguments]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error file = 'output': cannot be used (No space left on device)")
    assert "Traceback" not in ended.stderr
