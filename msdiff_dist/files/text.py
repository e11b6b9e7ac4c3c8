"""Text files that people write: read as UTF-8, or refused with one error that names the file and the reason."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from msdiff_dist.errors import ConfigError, UserError, collecting, raise_all
from msdiff_dist.files.interpolations import check_resolved_size
from msdiff_dist.files.yaml_places import COMMAND_LINE, Places, find_places
from msdiff_dist.files.yaml_tree import compose_yaml, parse_yaml

T = TypeVar("T")

OVERRIDE = "override"
"""What errors call a change that was given as `key=value`."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MAPPING = "tag:yaml.org,2002:map"
_MOST_BYTES = 2**26  # of a text file that people write; a name may lead to a device or a shard


def read_text(path: Path, field: str, error: type[UserError] = ConfigError) -> str:
    """The text of a file, without a byte-order mark.

    Args:
        path: `~` stands for the home folder.
        field: what the command line or the recipe calls the file.

    Raises:
        error: it is missing, a folder, unreadable, too large, or not UTF-8 text.
    """
    path = path.expanduser()

    def refuse(problem: str, remedy: str) -> UserError:
        return error(field, str(path), problem, remedy)

    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise refuse("no such file", "Correct the path.") from None
    except IsADirectoryError:
        raise refuse("is a folder, not a file", "Name a file in it.") from None
    except OSError as e:
        looped = e.errno == errno.ELOOP
        raise refuse("is a symbolic link that leads to itself" if looped else f"cannot be read ({e.strerror})",
                     "Correct the path.") from None  # fmt: skip
    if len(content) > _MOST_BYTES:
        raise refuse(f"has more than {_MOST_BYTES >> 20} MiB, too many for a text file", "Name the right file.")
    if content.startswith(_UTF16):
        raise refuse("is UTF-16 text", "Save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        binary = b"\0" in content[:1024]
        raise refuse(
            "is a binary file" if binary else f"is not UTF-8 text (byte 0x{content[e.start]:02x} at {e.start})",
            "Name a text file." if binary else "Save it as UTF-8.",
        ) from None
    if "\0" in text:
        raise refuse("is a binary file", "Name a text file.")
    return text


def read_yaml(path: Path, field: str) -> dict[str, Any]:
    """The mapping in a YAML file as plain data, interpolations such as `${oc.env:HOME}` resolved.

    Raises:
        ConfigError: what `read_text` refuses, text that is not YAML or not a mapping, a key that is given twice, an
            interpolation that fails.
    """
    return read_document(path, field).parsed(lambda mapping: mapping)


def read_document(path: Path, field: str, overrides: Sequence[str | Override] = ()) -> Document:
    """The mapping in a YAML file, dotted overrides applied, together with the place of each field.

    Args:
        field: what the command line calls the file.

    Raises:
        ConfigError: what `read_text` refuses, text that is not YAML or not a mapping. What is wrong with single fields
            and overrides is found by `Document.parsed`, with all else.
    """
    text = read_text(path, field)
    try:
        root = compose_yaml(text)
        if not isinstance(root, yaml.MappingNode) or root.tag != _MAPPING:  # a mapping may be tagged as a set
            parse_yaml(text)  # what is no YAML for another reason is told first
            raise ConfigError(field, str(path), "is not a mapping of fields", "Write `field: value` lines.")
        places, errors = find_places(root, str(path))
        if errors:  # the keys that are left
            text = yaml.serialize(root, Dumper=yaml.SafeDumper)
        loaded = OmegaConf.create(text)
        for override in overrides:
            with collecting(errors):
                loaded = _overridden(loaded, Override(override) if isinstance(override, str) else override, places)
        check_resolved_size(OmegaConf.to_container(loaded, resolve=False))
        unresolved: list[ConfigError] = []
        content = _resolved(loaded, unresolved)
    # Of explicit types, such as `!!timestamp x`, PyYAML lets through what the conversion raises.
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError) as e:
        message = " ".join(str(e).split())
        what = "is not YAML" if isinstance(e, yaml.YAMLError) else "cannot be used"
        raise ConfigError(field, str(path), f"{what} ({message})", "Correct the file.") from None
    return Document(content, places, [*errors, *unresolved])


@dataclass(frozen=True)
class Override:
    """A change to a file's content, `key=value` with a dotted key, and where it was given."""

    text: str
    place: str = COMMAND_LINE


@dataclass(frozen=True)
class Document:
    """A YAML file's content as plain data.

    Attributes:
        mapping: the content; a value that could not be resolved is the ConfigError that says why.
        places: where each field was given.
        errors: what is wrong so far.
    """

    mapping: dict[str, Any]
    places: Places
    errors: list[ConfigError]

    def parsed(self, build: Callable[[dict[str, Any]], T]) -> T:
        """What `build` makes of the content.

        Raises:
            ConfigError: what `build` raises and what was wrong with the content before, each error with its place.
        """
        errors, result = list(self.errors), list[T]()
        with collecting(errors):
            result.append(build(self.mapping))
        for error in errors:
            if error.place is None and error.field != OVERRIDE:
                error.place = self.places.of(error.field)
        raise_all(sorted(errors, key=self._order))
        return result[0]

    def _order(self, error: ConfigError) -> tuple[bool, int]:
        """The file's lines from top to bottom, then what was given elsewhere."""
        line = (error.place or "").removeprefix(f"{self.places.file}:")
        return (False, int(line)) if line.isdigit() else (error.place != self.places.file, 0)


def _overridden(loaded: Any, override: Override, places: Places) -> Any:
    name, equals, _ = override.text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise ConfigError(OVERRIDE, override.text, "is not of the form key=value", "Write train.steps=100, say.")
    try:
        change = OmegaConf.from_dotlist([override.text])
        merged = OmegaConf.merge(loaded, change)
        places.give("", OmegaConf.to_container(change), override.place)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as e:
        problem = f"cannot be used ({' '.join(str(e).split())})"
        raise ConfigError(OVERRIDE, override.text, problem, "Correct it.") from None
    return merged


def _resolved(loaded: Any, unresolved: list[ConfigError]) -> Any:
    """Plain data; where an interpolation fails, the error in its place, which is added to `unresolved` too."""
    try:
        content = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException:
        content = _resolved_one_by_one(loaded, "", unresolved)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _resolved_one_by_one(node: Any, path: str, unresolved: list[ConfigError]) -> Any:
    if not OmegaConf.is_config(node):
        return node
    is_list = OmegaConf.is_list(node)
    raw: Any = OmegaConf.to_container(node, resolve=False)
    found: dict[Any, Any] = {}
    for key in range(len(node)) if is_list else node:
        inner = f"{path}[{key}]" if is_list else f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(node, key):
            found[key] = raw[key]
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as e:
            found[key] = error = _not_resolved(inner, raw[key], e)
            unresolved.append(error)
        else:
            found[key] = _resolved_one_by_one(value, inner, unresolved)
    return list(found.values()) if is_list else found


def _not_resolved(field: str, text: Any, error: OmegaConfBaseException) -> ConfigError:
    if variable := re.search(r"Environment variable '(\w+)' not found", str(error)):
        problem = f"the environment variable {variable[1]} is not set"
        return ConfigError(field, text, problem, f"Set {variable[1]}, or write the value.")
    return ConfigError(field, text, f"cannot be resolved ({str(error).splitlines()[0]})", "Correct it.")
