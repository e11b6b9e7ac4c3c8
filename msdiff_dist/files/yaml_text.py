"""Changing values in the text of a YAML file, so that its comments and layout stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """The text with other values of fields, each given by its dotted path. Fields and sections that lack are added.

    Args:
        text: a YAML mapping.
        values: plain data; lists are written on one line.
    """
    for path, value in values.items():
        text = _with_value(text, path.split("."), value)
    return text


def _with_value(text: str, path: list[str], value: Any) -> str:
    key, node = None, yaml.compose(text, yaml.SafeLoader)
    missing = list(path)
    while missing and isinstance(node, yaml.MappingNode):
        held = {key.value: (key, child) for key, child in node.value}.get(missing[0])
        if held is None:
            break
        (key, node), missing = held, missing[1:]
    if key is not None and not (missing and isinstance(node, yaml.MappingNode)):  # in place of a value, or of null
        # From behind the colon on, since a list of items below each other starts a line later.
        return f"{text[: key.end_mark.index]}: {_on_one_line(_nested(missing, value))}{text[_end(node) :]}"
    entry = f"{missing[0]}: {_on_one_line(_nested(missing[1:], value))}"
    if node.flow_style:
        end = node.end_mark.index - 1
        return f"{text[:end].rstrip()}{', ' if node.value else ''}{entry}{text[end:]}"
    line_end = text.find("\n", _end(node))
    line_end = len(text) if line_end < 0 else line_end
    return f"{text[:line_end]}\n{' ' * node.start_mark.column}{entry}{text[line_end:]}"


def _nested(keys: list[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def _end(node: yaml.Node) -> int:
    """Where a node's own text ends. PyYAML puts the end of a block behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    end: int = node.end_mark.index
    return end


def _on_one_line(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
