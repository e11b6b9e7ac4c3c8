"""Text files that people write: read as UTF-8, or refused with one error that names the file and the reason."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from msdiff_dist.errors import ConfigError, UserError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
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


def read_yaml(path: Path, field: str, merge: Callable[[Any], Any] = lambda loaded: loaded) -> dict[str, Any]:
    """The mapping in a YAML file as plain data, interpolations such as `${oc.env:HOME}` resolved.

    Args:
        merge: changes what was loaded, before interpolations are resolved.

    Raises:
        ConfigError: what `read_text` refuses, text that is not YAML or not a mapping, an interpolation that fails.
    """
    text = read_text(path, field)
    try:
        # Before OmegaConf, which makes mappings of words and fails at numbers.
        if not isinstance(yaml.safe_load(text), dict):
            raise ConfigError(field, str(path), "is not a mapping of fields", "Write `field: value` lines.")
        content = OmegaConf.to_container(merge(OmegaConf.create(text)), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as e:
        message = " ".join(str(e).split())
        what = "is not YAML" if isinstance(e, yaml.YAMLError) else "cannot be used"
        raise ConfigError(field, str(path), f"{what} ({message})", "Correct the file.") from None
    return {str(key): value for key, value in content.items()}  # type: ignore[union-attr]
