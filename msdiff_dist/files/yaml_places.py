"""Where a YAML file gives each field, so that an error in a field can name its line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from msdiff_dist.errors import ConfigError

COMMAND_LINE = "on the command line"
_MERGE = "tag:yaml.org,2002:merge"  # `<<: *anchor`


@dataclass
class Places:
    """Places of fields by dotted path, such as `stages.boundaries[0]`.

    Attributes:
        file: the file's path as the user gave it.
        lines: the line that gives each field.
        elsewhere: the place of each field that was given otherwise, and of all in it.
    """

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)

    def of(self, path: str) -> str:
        """The place of a field; of one that is missing, the nearest section around it; at least the file."""
        while path:
            if path in self.elsewhere:
                return self.elsewhere[path]
            if path in self.lines:
                return f"{self.file}:{self.lines[path]}"
            path = _parent(path)
        return self.file

    def give(self, path: str, value: Any, place: str) -> None:
        """Note that the field `path` and all that `value` holds were given at `place`."""
        if isinstance(value, dict):
            for key, inner in value.items():
                self.give(f"{path}.{key}" if path else str(key), inner, place)
            return
        self.elsewhere[path] = place
        self.lines = {
            known: line for known, line in self.lines.items() if not known.startswith((f"{path}.", f"{path}["))
        }


def _parent(path: str) -> str:
    return re.sub(r"(^|\.)[^.\[]*$|\[[^\[]*\]$", "", path)


def find_places(root: yaml.Node, file: str) -> tuple[Places, list[ConfigError]]:
    """The places in a composed document, and an error for every key that a mapping has twice.

    Of such a key only the last stays in the document.
    """
    places, repeated = Places(file), list[ConfigError]()
    _walk(root, "", places, repeated, [])
    return places, repeated


def _walk(node: yaml.Node, path: str, places: Places, repeated: list[ConfigError], around: list[yaml.Node]) -> None:
    if any(node is one for one in around):  # an alias of what it stands in
        return
    around = [*around, node]
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places.lines.setdefault(f"{path}[{i}]", item.start_mark.line + 1)
            _walk(item, f"{path}[{i}]", places, repeated, around)
    if not isinstance(node, yaml.MappingNode):
        return
    last: dict[tuple[str, str], tuple[yaml.Node, yaml.Node]] = {}
    merged = []
    for key, value in node.value:
        if key.tag == _MERGE:
            merged.append((key, value))
            continue
        name = str(key.value)
        inner = f"{path}.{name}" if path else name
        before = last.get((key.tag, name))
        if before:
            lines = f"{before[0].start_mark.line + 1} and {key.start_mark.line + 1}"
            error = ConfigError(inner, _shown(value), f"is given twice, on lines {lines}", "Keep one of them.")
            error.place = f"{places.file}:{key.start_mark.line + 1}"
            repeated.append(error)
        last[key.tag, name] = key, value
    node.value = [*merged, *last.values()]
    for key, value in last.values():
        inner = f"{path}.{key.value}" if path else str(key.value)
        places.lines.setdefault(inner, key.start_mark.line + 1)
        _walk(value, inner, places, repeated, around)
    for _, value in merged:  # after the mapping's own keys, which have precedence
        for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            _walk(one, path, places, repeated, around)


def _shown(node: yaml.Node) -> Any:
    return node.value if isinstance(node, yaml.ScalarNode) else "..."
