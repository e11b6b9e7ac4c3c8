"""Configuration dataclasses from plain YAML data and back, strictly: a wrong field is an error that names it.

Each dataclass lives beside the code that it configures; this file knows none of them. A field's type says what is
accepted, and besides Python's own types there are

- `Annotated[str, TABLE]`: one of the names in a table;
- `Annotated[float, INFINITE]`: a number that may be infinite, as others may not;
- `Annotated[Base, Variant(...)]`: one of several dataclasses, chosen by a name among its own fields;
- a field with the metadata of `section_of`: a section that is named after what another field chooses.

OmegaConf's structured configurations know neither the last two, nor messages that name a remedy.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, overload

from msdiff_dist.bounds import check_number, check_text
from msdiff_dist.errors import ConfigError, collecting, did_you_mean, nearest, raise_all
from msdiff_dist.registry import Table
from msdiff_dist.section_checks import build_section

T = TypeVar("T")

INFINITE = "infinite"
"""Marks a number that may be infinite: `Annotated[float, INFINITE]`. NaN it may not be."""

RENAMED = {"zero_stage": "zero_decoders"}
"""Today's names of fields by the names that they had in earlier versions."""


@dataclass(frozen=True)
class Variant:
    """Marks a type that is one of several dataclasses: `Annotated[Base, Variant(TABLE, "family", "ldm")]`.

    Attributes:
        table: its entries have the attribute `config`, a dataclass.
        named_by: the field of that dataclass that names the entry.
        default: the entry that is meant where that field is missing.
    """

    table: Table[Any]
    named_by: str
    default: str

    def chosen(self, mapping: Any, path: str) -> Any:
        """The dataclass to build from a mapping at the dotted `path`.

        Raises:
            ConfigError: the table has no entry of that name.
        """
        name = mapping.get(self.named_by, self.default) if isinstance(mapping, Mapping) else self.default
        field = _join(path, self.named_by)
        return self.table.choose(field, _convert(str, name, field)).config


@dataclass(frozen=True)
class _Section:
    """What `section_of` says of a field."""

    table: Table[Any]
    named_by: str


def section_of(table: Table[Any], named_by: str) -> dict[str, _Section]:
    """Metadata of a dataclass field that is written as a section under the name that the field `named_by` holds.

    With `process: vp`, for example, the section is called `vp`. The field holds the `config` of that entry of the
    table, or None if the section is missing. Sections of other entries are refused, unless they are null.
    """
    return {"section": _Section(table, named_by)}


@overload
def from_mapping(cls: type[T], mapping: Any, path: str = "") -> T: ...
@overload
def from_mapping(cls: Any, mapping: Any, path: str = "") -> Any: ...
def from_mapping(cls: Any, mapping: Any, path: str = "") -> Any:
    """Build the dataclass `cls`, which may be a `Variant`, from plain YAML data.

    Args:
        path: dotted path of the mapping in the recipe, for errors.

    A value that is a ConfigError is an error already: one that could not be read.

    Raises:
        ConfigError: a key is unknown or missing, a value has the wrong type, or the dataclass's `__post_init__` refuses
            a value. The error names the dotted path of the field; `__post_init__` names fields relative to itself.
            A ConfigErrors has all that is wrong, without what only follows from another error.
    """
    if get_origin(cls) is Annotated:
        return _convert(cls, mapping, path)
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            path or "recipe", mapping, f"must be a mapping of {cls.__name__} fields", "Indent its fields."
        )
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and not _section(f)}
    sections = dict(_sections(cls))
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [*fields, *(name for section in sections.values() for name in section.table)]
    values: dict[str, Any] = {}
    given: dict[str, Any] = {}
    errors: list[ConfigError] = []
    meant: set[str] = set()  # fields that an unknown name probably stands for
    for key, value in mapping.items():
        field = _join(path, str(key))
        if key in fields:
            with collecting(errors):
                values[key] = _convert(hints[key], value, field)
        elif any(key in section.table for section in sections.values()):
            given[key] = value
        elif key in RENAMED:
            meant.add(RENAMED[key])
            remedy = f"Write {_join(path, RENAMED[key])}."
            errors.append(ConfigError(field, value, f"is now called {RENAMED[key]}", remedy))
        else:
            meant.update(nearest(str(key), known))
            errors.append(ConfigError(field, value, "is not a known field", did_you_mean(str(key), known)))
    for name, section in sections.items():
        named_by = fields[section.named_by]
        if named_by.name not in values and named_by.name in mapping:
            continue  # what it names is unknown, and is an error already
        with collecting(errors):
            chosen = values.get(named_by.name, named_by.default)
            values[name] = _chosen_section(section, chosen, given, path)
    for name, f in fields.items():
        if name not in mapping and name not in meant and _default(f) is dataclasses.MISSING:
            problem, remedy = "is required and missing", f"Add `{name}:` to the recipe."
            errors.append(ConfigError(_join(path, name), None, problem, remedy))
    unusable = {
        name
        for name in [*fields, *sections]
        if name not in values
        and (name in mapping or name in meant or name in sections or _default(fields[name]) is dataclasses.MISSING)
    }
    built = build_section(cls, values, hints, unusable)
    errors += [e.within(f"{path}." if path else "") for e in built.errors]
    raise_all(errors)
    return built.value


def with_current_names(mapping: Any) -> Any:
    """Plain data that an earlier version may have written, with the fields of `RENAMED` under today's names."""
    if isinstance(mapping, Mapping):
        return {RENAMED.get(key, key): with_current_names(value) for key, value in mapping.items()}
    return mapping


def field_docs(cls: type) -> dict[str, str]:
    """The documentation of a configuration dataclass's fields, inherited ones included: the string under each field.

    Python does not keep these strings, so they are read from the source.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for node, following in itertools.pairwise(definition.body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(following, ast.Expr)
            ):
                docs[node.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def to_mapping(value: Any) -> Any:
    """The inverse of `from_mapping`: dataclasses to plain dicts, tuples to lists."""
    if dataclasses.is_dataclass(value):
        written = [f for f in dataclasses.fields(value) if f.init]
        return {_written_name(value, f): to_mapping(getattr(value, f.name)) for f in written}
    if isinstance(value, (list, tuple)):
        return [to_mapping(v) for v in value]
    if isinstance(value, Mapping):
        return {k: to_mapping(v) for k, v in value.items()}
    return value


def chosen(value: Any, is_variant: bool = False) -> Any:
    """As `to_mapping`, without the fields that have their default.

    Args:
        is_variant: the dataclass is one of several; fields that name which one are kept, whatever they hold.
    """
    if isinstance(value, (list, tuple)):
        return [chosen(v, is_variant) for v in value]
    if not dataclasses.is_dataclass(value):
        return to_mapping(value)
    hints = typing.get_type_hints(type(value), include_extras=True)
    return {
        _written_name(value, f): chosen(getattr(value, f.name), _is_variant(hints[f.name]))
        for f in dataclasses.fields(value)
        if f.init and (getattr(value, f.name) != _default(f) or (is_variant and _is_name(hints[f.name])))
    }


def _is_variant(hint: Any) -> bool:
    """Whether a field of this type holds one of several dataclasses, or a list of such: a `Variant` or a union."""
    args = get_args(hint)
    return (
        any(isinstance(arg, Variant) or _is_variant(arg) for arg in args)
        or sum(map(dataclasses.is_dataclass, args)) > 1
    )


def _is_name(hint: Any) -> bool:
    """Whether a field of this type holds a name out of a list."""
    return get_origin(hint) is Literal or any(isinstance(arg, Table) for arg in get_args(hint))


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


def _section(f: dataclasses.Field[Any]) -> _Section | None:
    return f.metadata.get("section")


def _sections(cls: Any) -> Iterator[tuple[str, _Section]]:
    for f in dataclasses.fields(cls):
        section = _section(f)
        if section is not None:
            yield f.name, section


def _written_name(value: Any, f: dataclasses.Field[Any]) -> str:
    """The key under which a field is written: that of a section is what its naming field holds."""
    section = _section(f)
    return f.name if section is None else getattr(value, section.named_by)


def _chosen_section(section: _Section, chosen: str, given: Mapping[str, Any], path: str) -> Any:
    for name, value in given.items():
        if name != chosen and name in section.table and value is not None:
            problem = f"configures a {section.table.kind} that is not in use ({chosen})"
            remedy = f"Remove it (or set it to null), or use {section.named_by}: {name}."
            raise ConfigError(_join(path, name), "{...}", problem, remedy)
    value = given.get(chosen)
    return None if value is None else _convert(section.table[chosen].config, value, _join(path, chosen))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _convert(hint: Any, value: Any, field: str) -> Any:
    """`value` as the type `hint`, checked in depth; `field` is its dotted path, for errors."""
    if isinstance(value, ConfigError):
        raise value
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, field)
    if origin is Annotated:
        return _convert_annotated(args, value, field)
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
            return tuple(
                _convert_all([(a, v, f"{field}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))])
            )
        return origin(_convert_all([(args[0], v, f"{field}[{i}]") for i, v in enumerate(value)]))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(field, value, "must be a mapping", "Indent its entries.")
        keys = _convert_all([(args[0], k, field) for k in value])
        return dict(
            zip(keys, _convert_all([(args[1], v, _join(field, str(k))) for k, v in value.items()]), strict=True)
        )
    return _convert_scalar(hint, value, field)


def _convert_all(entries: list[tuple[Any, Any, str]]) -> list[Any]:
    """The entries (type, value, dotted path) of a list or mapping, converted, or the errors of all of them."""
    converted, errors = [], list[ConfigError]()
    for hint, value, field in entries:
        with collecting(errors):
            converted.append(_convert(hint, value, field))
    raise_all(errors)
    return converted


def _convert_annotated(args: tuple[Any, ...], value: Any, field: str) -> Any:
    kind, meaning = args
    if isinstance(meaning, Variant):
        return value if isinstance(value, kind) else from_mapping(meaning.chosen(value, field), value, field)
    if meaning == INFINITE:
        return _convert_scalar(kind, value, field, infinite=True)
    converted = _convert(kind, value, field)
    if isinstance(meaning, Table):
        meaning.choose(field, converted)
    return converted


def _convert_union(args: tuple[Any, ...], value: Any, field: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [a for a in args if a is not type(None)]
    # The first type that fits wins. If none does, an error from inside the value (a field of a mapping, an entry of a
    # list) explains more than one that says the value as a whole has the wrong type.
    errors = []
    for arg in choices:
        try:
            return _convert(arg, value, field)
        except ConfigError as e:
            errors.append(e)
    if len(errors) == 1 or any(e.field != field for e in errors):
        raise next((e for e in errors if e.field != field), errors[0])
    raise ConfigError(field, value, "; ".join(dict.fromkeys(e.problem for e in errors)), errors[0].remedy)


def _convert_scalar(hint: Any, value: Any, field: str, infinite: bool = False) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):  # bool is a subclass of int
        check_number(field, value)
        return float(value)
    if hint is type(None) and value is None:
        return None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kind = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))
        remedy = "Correct its type."
        if hint is str and isinstance(value, (int, float)):  # YAML reads 0123, 1e5, yes and 24:00:00 as numbers
            remedy = f'Put it in quotes, as it is to be read: {field.rsplit(".", 1)[-1]}: "...".'
        raise ConfigError(field, value, f"must be {kind}, not {type(value).__name__}", remedy)
    if isinstance(value, (int, float)):
        check_number(field, value, infinite=infinite)
    elif isinstance(value, str):
        check_text(field, value)
    return value
