"""The snapshot that a launch takes, so that a queued or requeued job runs what was submitted.

RUN/launch/
  001/                one folder for each launch
    code/             a copy of the package; the job imports it from here
    recipe.yaml       the resolved recipe the job reads (one file for each run of a sweep)
    environment.json  interpreter, installed packages, host, command line, variables that affect training
    git.json          commit, branch, untracked files; git.diff beside it: changes that were not committed
  job.json            the newest job (see watch)
  starts.jsonl        every start and end of the job (see restarts)
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msdiff_dist
from msdiff_dist.files.atomic import atomic_folder

_VARIABLES = ("CUDA", "NCCL", "GLOO", "OMP", "TORCH", "PYTORCH", "SLURM", "CONDA", "VIRTUAL_ENV", "LOADEDMODULES")


def next_snapshot(folder: Path) -> Path:
    """The path of the next snapshot of the run (or sweep) `folder`: `folder/launch/001`, then 002."""
    launches = (folder / "launch").resolve()
    numbers = [int(p.name) for p in launches.iterdir() if p.name.isdigit()] if launches.is_dir() else []
    return launches / f"{1 + max(numbers, default=0):03d}"


def take_snapshot(snapshot: Path, files: Mapping[str, str]) -> None:
    """Write the code, the environment and these files (name -> text) to the new folder `snapshot`."""
    package = Path(msdiff_dist.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    state, difference = _git(package)
    with atomic_folder(snapshot) as aside:
        shutil.copytree(package, aside / "code" / package.name, ignore=ignore)
        _write_json(aside / "environment.json", _environment())
        _write_json(aside / "git.json", state)
        for name, text in {"git.diff": difference, **files}.items():
            (aside / name).write_text(text)


def _environment() -> dict[str, Any]:
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": sys.version,
        "executable": sys.executable,
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _git(package: Path) -> tuple[dict[str, str | None], str]:
    """Commit, branch and untracked files of the repository that holds the package, and the changes since the commit."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    # An installed package may lie inside some other repository, whose commit would say nothing about it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "note": "the package is not under version control"}, ""
    state = {"commit": git("rev-parse", "HEAD"), "branch": git("rev-parse", "--abbrev-ref", "HEAD")}
    untracked = git("ls-files", "--others", "--exclude-standard") or ""
    state["untracked"] = untracked
    stripped = {key: value.strip() if value else value for key, value in state.items()}
    return stripped, git("diff", "HEAD", "--binary") or ""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
