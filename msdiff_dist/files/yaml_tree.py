"""YAML text to nodes or plain data, in bounded time and memory, with one kind of error.

PyYAML itself follows aliases of aliases for hours, and lets types such as `!!timestamp x` raise what they like.
"""

from __future__ import annotations

from typing import Any

import yaml

_LONGEST = 2**20  # characters: PyYAML takes a second for 200,000
_MOST_NODES = 50_000  # with every alias written out


def compose_yaml(text: str) -> yaml.Node | None:
    """The root of a YAML text; None if it is empty.

    Raises:
        yaml.YAMLError: it is no YAML, too long, nested too deeply, or has aliases that stand for too many values or for
            what they stand in.
    """
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"it has more than {_LONGEST >> 10} KiB")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _written_out(root, {})
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as e:  # of a character's code in a quoted text
        raise yaml.YAMLError(str(e)) from None
    return root


def parse_yaml(text: str) -> Any:
    """The content of a YAML text as plain data. Raises as `compose_yaml` does, and where a value is not of its type."""
    compose_yaml(text)
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise yaml.YAMLError(f"a value is not of its type ({type(e).__name__}: {e})") from None


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of nodes with every alias written out; `known` holds those so far by id, and 0 around this one."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError("an alias stands inside what it names")
        return known[id(node)]
    known[id(node)] = 0
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
    count = 1 + sum(_written_out(child, known) for child in children)
    if count > _MOST_NODES:
        raise yaml.YAMLError(f"it has more than {_MOST_NODES} values, its aliases written out")
    known[id(node)] = count
    return count
