"""How large a tree of settings becomes once its interpolations, `${a.b}`, are replaced by what they name."""

from __future__ import annotations

import re
from typing import Any

_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")  # not of a resolver, such as oc.env
_LARGEST = 2**20  # characters and values
_MOST_BITS = 1024

_Path = tuple[Any, ...]


def check_resolved_size(tree: Any) -> None:
    """Refuse interpolations of interpolations that would fill the memory, and numbers that could not be written again.

    Args:
        tree: plain data with the interpolations as text.

    Raises:
        ValueError: the resolved tree, or a number in it, would be too large.
    """
    if _resolved_size(tree, tree, (), {}) > _LARGEST:
        raise ValueError(f"its interpolations stand for more than {_LARGEST >> 10} KiB")


def _resolved_size(tree: Any, node: Any, path: _Path, known: dict[_Path, int]) -> int:
    if path not in known:
        known[path] = 0  # of one that leads to itself, which OmegaConf refuses
        if isinstance(node, dict):
            size = sum(_resolved_size(tree, inner, (*path, key), known) for key, inner in node.items())
        elif isinstance(node, list):
            size = sum(_resolved_size(tree, inner, (*path, i), known) for i, inner in enumerate(node))
        elif isinstance(node, str):
            size = len(node)
            for name in _REFERENCE.findall(node):
                target = _target(name, path)
                size += _resolved_size(tree, _at(tree, target), target, known)
        elif isinstance(node, int) and node.bit_length() > _MOST_BITS:  # hexadecimal, say: Python cannot write it
            raise ValueError("it holds a number of too many digits")
        elif node is None or isinstance(node, (int, float)):
            size = 0
        else:
            raise ValueError(f"it holds a value of type {type(node).__name__}")
        known[path] = 1 + size
    return known[path]


def _target(name: str, path: _Path) -> _Path:
    """The path that a reference names: from the root, or with leading dots from the sections around its field."""
    rest = name.strip().lstrip(".")
    dots = len(name.strip()) - len(rest)
    parts = [int(part) if part.isdecimal() else part for part in re.split(r"[.\[\]]+", rest) if part]
    return (*(path[:-dots] if dots else ()), *parts)


def _at(tree: Any, path: _Path) -> Any:
    for key in path:
        if isinstance(tree, dict):
            tree = tree.get(key, tree.get(str(key)))
        elif isinstance(tree, list) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return None  # OmegaConf says what is missing
    return tree
