"""JSON that was written by another program or another version, or that a crash may have cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msdiff_dist.errors import UserError
from msdiff_dist.files.text import read_text


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has a number of too many digits; the message is a clause.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"is not UTF-8 text (byte {e.start})") from None
    except ValueError as e:
        raise ValueError(f"is no JSON ({e})") from None


def parse_mapping(text: str | bytes) -> dict[str, Any]:
    """The mapping in a JSON text. Raises as `parse_json` does, and at anything that is no mapping."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError(f"is no JSON object but {type(content).__name__}")
    return content


def read_mapping(path: Path, error: type[UserError], remedy: str, field: str = "file") -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        remedy: what to do where the file holds something else.
        field: what the command line or the recipe calls the file.

    Raises:
        error: it is missing or unreadable, or `parse_mapping` refuses it.
    """
    try:
        return parse_mapping(read_text(path, field, error))
    except ValueError as e:
        raise error(field, str(path), str(e), remedy) from None


def whole_lines(content: bytes) -> list[dict[str, Any]]:
    """The mappings in the lines of a JSON-lines file; lines cut off by a crash, or of something else, are skipped."""
    found = []
    for line in content.split(b"\n"):
        try:
            found.append(parse_mapping(line))
        except ValueError:
            continue
    return found
