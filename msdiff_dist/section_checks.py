"""All that a configuration dataclass's `__post_init__` has to say, although it ends at the first thing that it refuses.

The refused value is replaced by one that may stand there, and the dataclass built again, until nothing more is refused.
Only errors of the given values may come of it: an error that speaks of a replaced field may follow from the
replacement, so the search ends there; and lists and the names of parts, on which much depends, are not replaced.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msdiff_dist.errors import ConfigError
from msdiff_dist.registry import Table

_PLAIN: dict[Any, Any] = {int: 1, float: 1.0, str: "x", bool: False}
"""Types of fields that can be replaced, and values that most checks accept, where the default is not accepted."""


@dataclass(frozen=True)
class Built:
    """A dataclass, or None and the errors, whose fields are relative to it."""

    value: Any
    errors: tuple[ConfigError, ...] = ()


def build_section(cls: Any, values: Mapping[str, Any], hints: Mapping[str, Any], unusable: Collection[str]) -> Built:
    """Build the dataclass `cls`, or collect all that it refuses.

    A class with the class method `contradictions` checks by itself what it can without the unusable fields.

    Args:
        values: of those fields that are given and have the right type.
        hints: the fields' types.
        unusable: fields whose values are known to be wrong or missing; the dataclass cannot be built.
    """
    if hasattr(cls, "contradictions"):
        return Built(None, tuple(cls.contradictions(values, unusable))) if unusable else _built(cls, values)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    stand_ins = {name: _stand_ins(fields[name], hints[name]) for name in unusable}
    tried, found = dict(values), list[ConfigError]()
    refused = set(unusable)
    while True:
        for name in refused:
            try:
                tried[name] = next(stand_ins[name])
            except StopIteration:
                return Built(None, tuple(found))
        built = _built(cls, tried)
        if not built.errors:
            return Built(None if stand_ins else built.value, tuple(found))
        refused = set()
        for error in built.errors:
            root = re.split(r"[.\[]", error.field)[0]
            if root in stand_ins:  # this stand-in will not do
                refused.add(root)
                continue
            if _speaks_of(error, stand_ins):
                return Built(None, tuple(found))
            found.append(error)
            if root not in fields:
                return Built(None, tuple(found))
            stand_ins[root] = _stand_ins(fields[root], hints[root])
            refused.add(root)


def _built(cls: Any, values: Mapping[str, Any]) -> Built:
    try:
        return Built(cls(**values))
    except ConfigError as e:
        return Built(None, e.errors)


def _speaks_of(error: ConfigError, names: Collection[str]) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", f"{error.problem} {error.remedy}") for name in names)


def _stand_ins(field: dataclasses.Field[Any], hint: Any) -> Iterator[Any]:
    """Values to put in the place of a field's own, the default first; none for lists and names of parts."""
    kinds = [_kind(arg) for arg in _members(hint)]
    if any(not (k in _PLAIN or dataclasses.is_dataclass(k) or get_origin(k) is Literal) for k in kinds):
        return
    if field.default is not dataclasses.MISSING:
        yield field.default
    yield from (_PLAIN[kind] for kind in kinds if kind in _PLAIN)


def _members(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [arg for arg in get_args(hint) if arg is not type(None)]
    return [hint]


def _kind(hint: Any) -> Any:
    """The type itself, without annotations; a name out of a table is none of the plain types."""
    if get_origin(hint) is Annotated:
        kind, *meanings = get_args(hint)
        return None if any(isinstance(meaning, Table) for meaning in meanings) else kind
    return hint
