"""The recipes, ablation files and cluster files that come with the package, and copies of them to edit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msdiff_dist.errors import ConfigError, did_you_mean
from msdiff_dist.files.atomic import atomic_write

_PACKAGE = Path(__file__).parent
_KINDS: dict[Literal["recipe", "ablation", "cluster"], str] = {
    "recipe": "recipes",
    "ablation": "recipes/ablations",
    "cluster": "slurm",
}
_MENTION = re.compile(r"(?P<folder>recipes/(?:ablations/)?|slurm/|\.\./)(?P<file>\w+\.(?:yaml|json))")


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A file that comes along. name: `quickstart`, `ablations/cifar10_full`, `slurm/gpu`. description: one line."""

    name: str
    kind: Literal["recipe", "ablation", "cluster"]
    path: Path
    description: str


@dataclass(frozen=True)
class Copied:
    """Files that `copy_shipped` wrote, and those it found there and kept."""

    written: list[Path]
    kept: list[Path]


def shipped_files() -> list[Shipped]:
    """Every recipe, then every ablation file, then every cluster file."""
    return [
        Shipped(name=_name(folder, path), kind=kind, path=path, description=_description(path))
        for kind, folder in _KINDS.items()
        for path in sorted(_folder(folder).glob("*.yaml"))
    ]


def find_shipped(name: str) -> Shipped:
    """The file of a name; `ablations/` and `slurm/` may be left away.

    Raises:
        ConfigError: there is none.
    """
    known = {file.name: file for file in shipped_files()}
    found = known.get(name) or {file.path.stem: file for file in known.values()}.get(name)
    if found is None:
        raise ConfigError("NAME", name, "is not a shipped file", f"{did_you_mean(name, known)} See `msdiff recipes`.")
    return found


def where_to_get(path: Path) -> str | None:
    """The command that writes a shipped file to `path`, where its name is that of one."""
    for file in shipped_files():
        if file.path.stem == path.stem and path.suffix in ("", ".yaml"):
            out = "" if str(path) in (path.stem, file.path.name) else f" --out {path}"
            return f"msdiff init {file.name}{out}"
    return None


def copy_shipped(name: str, out: Path | None = None) -> Copied:
    """Write a shipped file to `out` (default: its own name, here) and beside it the files it names.

    In the copies every such name is the path of the copy. What exists beside it is kept as it is.

    Raises:
        ConfigError: there is no file of that name, or `out` exists.
    """
    first = find_shipped(name).path
    out = out or Path(first.name)
    refuse_existing(out)
    targets, waiting = {first: out}, [first]
    while waiting:
        for named in _named_in(waiting.pop()):
            if named not in targets:
                targets[named] = out.parent / named.name
                waiting.append(named)
    kept = [target for target in targets.values() if target.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    for source, target in targets.items():
        if target not in kept:
            atomic_write(target, _pointing_to_copies(source, targets))
    return Copied([target for target in targets.values() if target not in kept], kept)


def refuse_existing(out: Path) -> None:
    """Raise if there is a file already: nothing that a user may have edited is overwritten."""
    if out.exists():
        raise ConfigError("--out", str(out), "exists already", "Name another file with --out.")


def _folder(name: str) -> Path:
    """Inside an installed package; in a checkout, beside the package."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def _name(folder: str, path: Path) -> str:
    return path.stem if folder == "recipes" else f"{Path(folder).name}/{path.stem}"


def _description(path: Path) -> str:
    with path.open() as file:
        return file.readline().removeprefix("#").strip()


def _mentions(source: Path) -> Iterator[tuple[re.Match[str], Path]]:
    """Where a shipped file names others, or itself. `../` is relative to the file itself, as ablation files have it."""
    for match in _MENTION.finditer(source.read_text()):
        folder = "recipes" if match["folder"] == "../" else match["folder"].rstrip("/")
        path = _folder(folder) / match["file"]
        if path.is_file():
            yield match, path


def _named_in(source: Path) -> list[Path]:
    return [path for _, path in _mentions(source)]


def _pointing_to_copies(source: Path, targets: dict[Path, Path]) -> str:
    text = source.read_text()
    for match, path in reversed(list(_mentions(source))):
        copy = targets[path].name if match["folder"] == "../" else str(targets[path])
        text = text[: match.start()] + copy + text[match.end() :]
    return text
