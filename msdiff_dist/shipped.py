"""The recipes, ablation files and cluster files that come with the package, and copies of them to edit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msdiff_dist.errors import ConfigError, did_you_mean
from msdiff_dist.files.atomic import atomic_write, check_place

_PACKAGE = Path(__file__).parent
_KINDS: dict[Literal["recipe", "ablation", "cluster"], str] = {
    "recipe": "recipes",
    "ablation": "recipes/ablations",
    "cluster": "slurm",
}
# Where a shipped file names another, as in `recipes/quickstart.yaml`, `slurm/gpu.yaml` or `../quickstart.yaml`.
_MENTION = re.compile(r"(?P<folder>recipes/(?:ablations/)?|slurm/|\.\./)(?P<file>\w+\.(?:yaml|json))")


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A file that comes with the package.

    Attributes:
        name: what `msdiff init` calls it: `quickstart`, `ablations/cifar10_full`, `slurm/gpu`.
        kind: what it is.
        path: the file.
        description: its first line, a comment.
    """

    name: str
    kind: Literal["recipe", "ablation", "cluster"]
    path: Path
    description: str


@dataclass(frozen=True)
class Copied:
    """Files that `copy_shipped` wrote, and files that it found in their place and kept."""

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
    """The shipped file of a name, with or without `ablations/` or `slurm/`.

    Raises:
        ConfigError: there is none of this name.
    """
    known = {file.name: file for file in shipped_files()}
    found = known.get(name) or {file.path.stem: file for file in known.values()}.get(name)
    if found is None:
        raise ConfigError("NAME", name, "is not a shipped file", f"{did_you_mean(name, known)} See `msdiff recipes`.")
    return found


def where_to_get(path: Path) -> str | None:
    """The command that writes a shipped file to `path`; None if no shipped file has this name."""
    for file in shipped_files():
        if file.path.stem == path.stem and path.suffix in ("", ".yaml"):
            out = "" if str(path) in (path.stem, file.path.name) else f" --out {path}"
            return f"msdiff init {file.name}{out}"
    return None


def copy_shipped(name: str, out: Path | None = None) -> Copied:
    """Write a shipped file to `out`, and beside it the files that it names, and those that these name.

    In the copies every such name is the path of the copy. Files that exist beside `out` are kept as they are.

    Args:
        out: None: the file's own name, in the working directory.

    Raises:
        ConfigError: there is no shipped file of that name, or `out` exists.
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
    """Raise ConfigError if `out` exists, since nothing that a user may have edited is overwritten, or WriteError."""
    if out.exists():
        raise ConfigError("--out", str(out), "exists already", "Name another file with --out.")
    check_place("--out", out, "new file")


def _folder(name: str) -> Path:
    """A folder of shipped files: inside an installed package; in a checkout, beside the package."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def _name(folder: str, path: Path) -> str:
    return path.stem if folder == "recipes" else f"{Path(folder).name}/{path.stem}"


def _description(path: Path) -> str:
    with path.open() as file:
        return file.readline().removeprefix("#").strip()


def _mentions(source: Path) -> Iterator[tuple[re.Match[str], Path]]:
    """Where a shipped file names others, or itself, and which. A name with `../` is relative to an ablation file."""
    for match in _MENTION.finditer(source.read_text()):
        folder = "recipes" if match["folder"] == "../" else match["folder"].rstrip("/")
        path = _folder(folder) / match["file"]
        if path.is_file():
            yield match, path


def _named_in(source: Path) -> list[Path]:
    return [path for _, path in _mentions(source)]


def _pointing_to_copies(source: Path, targets: dict[Path, Path]) -> str:
    text = source.read_text()
    # From the end, so that the places of the earlier names stay valid.
    for match, path in reversed(list(_mentions(source))):
        copy = targets[path].name if match["folder"] == "../" else str(targets[path])
        text = text[: match.start()] + copy + text[match.end() :]
    return text
