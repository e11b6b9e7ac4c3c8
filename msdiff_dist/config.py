"""Strict dataclass <-> mapping machinery. Each dataclass lives beside the code it configures; this file knows none."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, overload

from msdiff_dist.errors import ConfigError, did_you_mean
from msdiff_dist.registry import Table

T = TypeVar("T")


@overload
def from_mapping(cls: type[T], mapping: Mapping[str, Any], path: str = "") -> T: ...
@overload
def from_mapping(cls: types.UnionType, mapping: Mapping[str, Any], path: str = "") -> Any: ...
def from_mapping(cls: Any, mapping: Mapping[str, Any], path: str = "") -> Any:
    """Build dataclass `cls` from plain YAML data.

    Unknown keys, missing keys and wrong types raise `ConfigError` with the dotted path of the field; a dataclass's own
    `__post_init__` may raise `ConfigError` with a field relative to itself, and the path is put before it. Where `cls`
    or a field is a union of dataclasses, a field that is a Literal in each tells them apart.
    """
    if get_origin(cls) in (Union, types.UnionType):
        cls = _variant(get_args(cls), mapping, path)
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            path or "recipe", mapping, f"must be a mapping of {cls.__name__} fields", "Indent its fields."
        )
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in mapping.items():
        field = _join(path, str(key))
        if key not in fields:
            raise ConfigError(field, value, "is not a known field", did_you_mean(str(key), fields))
        values[key] = _convert(hints[key], value, field)
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(_join(path, name), None, "is required and missing", f"Add `{name}:` to the recipe.")
    try:
        return cls(**values)
    except ConfigError as e:
        raise ConfigError(_join(path, e.field), e.value, e.problem, e.remedy) from None


def to_mapping(value: Any) -> Any:
    """The inverse of `from_mapping`: dataclasses to plain dicts, tuples to lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, (list, tuple)):
        return [to_mapping(v) for v in value]
    if isinstance(value, Mapping):
        return {k: to_mapping(v) for k, v in value.items()}
    return value


def chosen(value: Any, is_variant: bool = False) -> Any:
    """As `to_mapping`, without the fields that have their default.

    Args:
        is_variant: the dataclass is one of a union's: the Literals that tell them apart stay.
    """
    if not dataclasses.is_dataclass(value):
        return to_mapping(value)
    hints = typing.get_type_hints(type(value))
    return {
        f.name: chosen(getattr(value, f.name), sum(map(dataclasses.is_dataclass, get_args(hints[f.name]))) > 1)
        for f in dataclasses.fields(value)
        if f.init and (getattr(value, f.name) != _default(f) or (is_variant and get_origin(hints[f.name]) is Literal))
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted fields where two mappings differ, as (field, value in a, value in b)."""
    found: list[tuple[str, Any, Any]] = []
    for key in [*a, *(k for k in b if k not in a)]:
        x, y, field = a.get(key), b.get(key), _join(path, key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, field)
        elif x != y:
            found.append((field, x, y))
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _convert(hint: Any, value: Any, field: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, field)
    if origin is Annotated:
        converted = _convert(args[0], value, field)
        for table in args[1:]:
            if isinstance(table, Table):
                table.choose(field, converted)
        return converted
    if origin is Literal:
        if value not in args:
            raise ConfigError(field, value, "is not one of the choices", did_you_mean(str(value), map(str, args)))
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, field)  # type: ignore[arg-type]
    if origin in (list, tuple):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(field, value, "must be a list", "Write it as [a, b, c].")
        if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
            if len(value) != len(args):
                raise ConfigError(field, value, f"must have {len(args)} entries", f"Give {len(args)}.")
            return tuple(_convert(a, v, f"{field}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        return origin(_convert(args[0], v, f"{field}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(field, value, "must be a mapping", "Indent its entries.")
        return {_convert(args[0], k, field): _convert(args[1], v, _join(field, str(k))) for k, v in value.items()}
    return _convert_scalar(hint, value, field)


def _convert_union(args: tuple[Any, ...], value: Any, field: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [a for a in args if a is not type(None)]
    if len(choices) > 1 and all(dataclasses.is_dataclass(a) for a in choices):
        return (
            value if isinstance(value, tuple(choices)) else from_mapping(_variant(choices, value, field), value, field)
        )
    errors = []
    for arg in choices:
        try:
            return _convert(arg, value, field)
        except ConfigError as e:
            errors.append(e)
    if len(errors) == 1 or any(e.field != field for e in errors):
        raise next((e for e in errors if e.field != field), errors[0])
    raise ConfigError(field, value, "; ".join(dict.fromkeys(e.problem for e in errors)), errors[0].remedy)


def _variant(choices: Sequence[Any], mapping: Any, path: str) -> Any:
    """The dataclass that a mapping means: the first common Literal field in which no two share a value tells.

    Without that field it is the first choice.
    """
    literals = []
    for hints in map(typing.get_type_hints, choices):
        literals.append({name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal})
    tags = {name: [v for known in literals for v in known.get(name, ())] for name in literals[0]}
    tag = next(name for name, values in tags.items() if len(set(values)) == len(values))
    if not isinstance(mapping, Mapping) or tag not in mapping:
        return choices[0]
    for choice, known in zip(choices, literals, strict=True):
        if mapping[tag] in known[tag]:
            return choice
    remedy = did_you_mean(str(mapping[tag]), tags[tag])
    raise ConfigError(_join(path, tag), mapping[tag], "is not one of the choices", remedy)


def _convert_scalar(hint: Any, value: Any, field: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kind = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))
        raise ConfigError(field, value, f"must be {kind}, not {type(value).__name__}", "Correct its type.")
    return value
