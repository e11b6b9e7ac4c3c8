"""Run folders that this user started, remembered in a file of the home folder, so that commands can name runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from msdiff_dist.errors import RunFolderError
from msdiff_dist.launch.plain_run import is_run


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The run folders, of jobs and of `msdiff train`, among `folders`, in them, and in folders that these hold.

    Raises:
        RunFolderError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RunFolderError("FOLDER", str(folder), "no such folder", "Name a run folder or a folder of runs.")
    return [run for folder in folders for run in _runs_below(folder, 2)]


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    """A run folder may hold others: that of a sweep holds its runs beside the record of its job."""
    if (folder / "launch/job.json").is_file() or is_run(folder):
        yield folder
    if levels and not is_run(folder):
        for path in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _runs_below(path, levels - 1)


def known_runs() -> list[Path]:
    """Every run folder that this user started a run in and that still exists, newest last."""
    path = _registry()
    lines = path.read_text().splitlines() if path.is_file() else []
    return [folder for line in dict.fromkeys(lines) if (folder := Path(line)).is_dir()]


def find_run(name: str) -> Path:
    """A run folder by its path, or by its name among the known runs: the newest of that name.

    Raises:
        RunFolderError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    matches = [folder for folder in known_runs() if folder.name == name]
    if not matches:
        raise RunFolderError("RUN", name, "no such run", "Name its run folder; see `msdiff jobs`.")
    return matches[-1]


def register_run(folder: Path) -> None:
    """Remember a run folder for `msdiff jobs`. The run does not need it, so a note says where that is impossible."""
    path = _registry()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if str(folder.resolve()) not in map(str, known_runs()):
            with path.open("a") as f:
                f.write(f"{folder.resolve()}\n")
    except OSError as e:
        about = (
            f"note: {path} cannot be written ({e.strerror}), so `msdiff jobs` shows the run only if its folder is named"
        )
        print(about, file=sys.stderr)


def _registry() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "msdiff" / "runs"
