"""Named SVG icons from the sets that Iconify collects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.data.make.datasets.labelled_image import Collection, Dataset, Split
from msdiff_dist.data.make.datasets.pictures import Picture, drawn
from msdiff_dist.data.make.packages import Package, data_of
from msdiff_dist.data.make.shard_writer import Attribution, DatasetInfo
from msdiff_dist.errors import ConfigError, DataError, did_you_mean
from msdiff_dist.terminal import track

PACKAGE = Package(kind="npm", name="@iconify/json", version="2.2.535", folder="package")
COLOUR, PLAIN, ALL = "colour", "plain", "all"
"""What `--sets` may say in place of names: sets with colours of their own, those of one colour, both."""
LICENCES = (
    "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "OFL-1.1", "Unlicense",
)  # fmt: skip
"""Taken unless `--licences` says otherwise: those that ask for no more than the author's name and the licence."""
_EDGE = 16  # of an icon that says nothing of its size, in the format of Iconify
_INFO = DatasetInfo(name="icons", licence="of each set", origin="Iconify: icon-sets.iconify.design")


@dataclass(frozen=True, kw_only=True)
class _Set:
    """An icon set: its name, the file that holds it and what that says about it."""

    name: str
    path: Path
    title: str
    author: str
    url: str
    licence: str
    colour: bool


def icons(
    source: Path | None, split: Split, size: int, sets: str = COLOUR, licences: str | None = None, nproc: int = 1
) -> Collection:
    """Icons on white, captioned with their name, categories and set; the class is the set.

    Args:
        source: folder of the package `@iconify/json`, or a folder of such JSON files.
        sets: names of sets, divided by commas; or `colour`, `plain` or `all`.
        licences: SPDX names, divided by commas, of the sets that are taken; None: `LICENCES`.

    Raises:
        ConfigError: a set or licence is not in the source, or no set has one of these licences.
        DataError: the source is missing or a set corrupt, or resvg is not installed.
    """
    folder = data_of(PACKAGE, source, ".")
    chosen = _chosen(_known_sets(folder), sets, licences)
    left_out: list[tuple[str, str]] = []
    pictures = [
        picture
        for label, one in enumerate(track(chosen, "reading", "sets"))
        for picture in _pictures(one, label, left_out)
    ]
    info = DatasetInfo(
        name=_INFO.name,
        licence=", ".join(sorted({one.licence for one in chosen})),
        origin=_INFO.origin,
        classes=tuple(one.name for one in chosen),
        attributions=tuple(
            Attribution(part=one.name, author=one.author, licence=one.licence, url=one.url) for one in chosen
        ),
    )
    mode = "RGB" if any(one.colour for one in chosen) else "L"
    return drawn(pictures, info, split, size, nproc, mode, left_out)


def _known_sets(folder: Path) -> list[_Set]:
    """The sets of a folder, by name. The package lists them in one file; without it, every set is opened."""
    files = {
        path.stem: path for path in sorted((folder / "json" if (folder / "json").is_dir() else folder).glob("*.json"))
    }
    listed = folder / "collections.json"
    about = _json(listed) if listed.is_file() else {}
    sets = []
    for name, path in files.items():
        if path.parent == folder and name in ("collections", "package"):
            continue
        found = about.get(name) or _json(path).get("info")
        if not isinstance(found, dict):
            raise DataError("--source", str(path), "is no icon set: it has no `info`", "Remove it, or fetch it again.")
        sets.append(_set(name, path, found))
    if not sets:
        raise DataError("--source", str(folder), "holds no icon sets (json/*.json)", PACKAGE.remedy())
    return sets


def _set(name: str, path: Path, info: Mapping[str, Any]) -> _Set:
    try:
        author, licence = info["author"], info["license"]
        return _Set(
            name=name,
            path=path,
            title=str(info["name"]),
            author=str(author["name"]),
            url=str(author.get("url") or licence.get("url") or ""),
            licence=str(licence.get("spdx") or licence["title"]),
            colour=bool(info.get("palette", False)),
        )
    except (KeyError, TypeError, AttributeError) as e:
        problem = f"its `info` has no usable name, author and license ({type(e).__name__}: {e})"
        raise DataError("--source", str(path), problem, "Fetch it again.") from e


def _chosen(known: Sequence[_Set], sets: str, licences: str | None) -> list[_Set]:
    """The sets that are asked for, of the licences that are asked for, by name."""
    allowed = set(LICENCES) if licences is None else _allowed(licences, {one.licence for one in known})
    if sets in (COLOUR, PLAIN, ALL):
        asked = [one for one in known if sets == ALL or one.colour == (sets == COLOUR)]
        found = [one for one in asked if one.licence in allowed]
        if not found:
            has = ", ".join(sorted({one.licence for one in asked})) or "none"
            problem = f"none of the {len(asked)} sets has one of the licences {', '.join(sorted(allowed))}"
            raise ConfigError("--sets", sets, problem, f"Name others with --licences: the sets have {has}.")
        return found
    by_name = {one.name: one for one in known}
    words = _words("--sets", sets)
    for word in words:
        if word not in by_name:
            near = did_you_mean(word, [*by_name, COLOUR, PLAIN, ALL])
            raise ConfigError("--sets", sets, f"there is no set {word!r}", near)
        licence = by_name[word].licence
        if licence not in allowed:
            problem = f"the licence of {word} is {licence}, not one of {', '.join(sorted(allowed))}"
            raise ConfigError("--sets", sets, problem, f"Leave it out, or add {licence} to --licences.")
    return [by_name[word] for word in sorted(words)]


def _allowed(licences: str, of_sets: set[str]) -> set[str]:
    """The licences that are asked for; a name without its version, as CC0, stands for every version."""
    known = of_sets | set(LICENCES)
    allowed: set[str] = set()
    for word in _words("--licences", licences):
        any_version = re.compile(rf"{re.escape(word)}(-\d.*)?", re.IGNORECASE)
        found = {name for name in known if any_version.fullmatch(name)}
        if not found:
            problem = f"no set has the licence {word!r}"
            raise ConfigError("--licences", licences, problem, did_you_mean(word, known))
        allowed |= found
    return allowed


def _words(field: str, value: str) -> list[str]:
    words = [word.strip() for word in value.split(",")]
    if "" in words or len(set(words)) < len(words):
        raise ConfigError(field, value, "names nothing between two commas, or something twice", "Write it as a,b,c.")
    return words


def _pictures(one: _Set, label: int, left_out: list[tuple[str, str]]) -> Iterator[Picture]:
    """The icons of a set. Hidden ones, which the set has given up, and further names of an icon are no samples."""
    content = _json(one.path)
    found, categories = content.get("icons"), content.get("categories") or {}
    if not isinstance(found, dict) or not isinstance(categories, dict):
        raise DataError("--source", str(one.path), "is no icon set: it has no `icons`", "Fetch it again.")
    of_icon: dict[str, list[str]] = {}
    for category, names in categories.items():
        for name in names:
            of_icon.setdefault(name, []).append(category)
    for name, icon in found.items():
        full = f"{one.name}:{name}"
        try:
            if icon.get("hidden"):
                continue
            svg = _svg({**content, **icon})
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            left_out.append((full, f"is no icon ({type(e).__name__}: {e})"))
            continue
        words = [name.replace("-", " "), *of_icon.get(name, []), one.title]
        yield Picture(name=full, content=svg, caption=", ".join(words).lower(), label=label)


def _svg(icon: Mapping[str, Any]) -> str:
    """A whole SVG file of an icon's body. What an icon does not say, its set says."""
    left, top = float(icon.get("left", 0)), float(icon.get("top", 0))
    width, height = float(icon.get("width", _EDGE)), float(icon.get("height", _EDGE))
    if not (0 < width < float("inf") and 0 < height < float("inf")):
        raise ValueError(f"of size {width} x {height}")
    # resvg stretches to what it is asked for, so the file is square and the icon is centred in it by its view box.
    # Icons of one colour are drawn in `currentColor`, which is `color`.
    edge = max(width, height)
    box = f"{left - (edge - width) / 2:g} {top - (edge - height) / 2:g} {edge:g} {edge:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{edge:g}" height="{edge:g}" color="black">{icon["body"]}</svg>'
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError("--source", str(path), f"is no JSON ({e})", "Fetch it again.") from e
    if not isinstance(content, dict):
        raise DataError("--source", str(path), "is no icon set", "Fetch it again.")
    return content


ICONS = Dataset(_INFO, 64, icons, ("sets", "licences", "nproc"))
