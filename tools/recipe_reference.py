"""Write the reference of all recipe fields, from the dataclasses that define them.

Example: python tools/recipe_reference.py > docs/recipe.md
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from msdiff_dist.config import Variant, field_docs
from msdiff_dist.recipe import Recipe
from msdiff_dist.registry import Table

INTRODUCTION = """# Recipe fields

Written by `tools/recipe_reference.py` from the dataclasses that define the fields. A recipe has a `name` and the
sections `data`, `stages`, `model`, `optimizer` and `train`; the others are optional. On the command line a field has
its dotted name: `msdiff train RECIPE train.steps=1000 'stages.boundaries=[442,631]'`.

`msdiff recipes` lists recipes to begin with, `msdiff init NAME` writes one of them, and `msdiff init --from MODEL` one
that trains a model further.

`extensions` lists Python modules that add to the choices below, such as U-Net families and processes (extending.md).
"""


def main() -> None:
    print(reference(), end="")


def reference() -> str:
    """The whole page, in Markdown."""
    hints = get_type_hints(Recipe, include_extras=True)
    pages: list[str] = [INTRODUCTION]
    known: dict[type, str] = {}
    for field in dataclasses.fields(Recipe):
        for cls in _dataclasses(hints[field.name]):
            pages += _section(field.name, cls, known)
    return "\n".join(pages)


def _section(path: str, cls: type, known: dict[type, str]) -> Iterator[str]:
    """A heading, the docstring of the class, its fields; then the sections inside it."""
    hints = get_type_hints(cls, include_extras=True)
    yield f"## `{path}`" + (f" ({_type(hints['family'])})" if "family" in hints else "") + "\n"
    if cls in known:
        yield f"As `{known[cls]}`.\n"
        return
    known[cls] = path
    prose = "\n\n".join(_prose(base) for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base))
    meanings = field_docs(cls)
    yield f"{prose}\n\n| field | type | default | |\n|---|---|---|---|"
    for field in (f for f in dataclasses.fields(cls) if f.init):
        if "section" in field.metadata:
            for name in field.metadata["section"].table:
                meaning = f"Settings of `{name}`, if it is the one in use."
                yield f"| `{name}` | section or null | `null` | {meaning} |"
            continue
        meaning = meanings[field.name].replace("|", "\\|")
        yield f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} | {meaning} |"
    yield ""
    for field in (f for f in dataclasses.fields(cls) if f.init):
        for inner in (each for each in _dataclasses(hints[field.name]) if each is not cls):
            yield from _section(f"{path}.{field.name}", inner, known)
        if "section" in field.metadata:
            for name, entry in field.metadata["section"].table.items():
                yield from _section(f"{path}.{name}", entry.config, known)


def _prose(cls: type) -> str:
    """The class's docstring, each paragraph on one line."""
    return "\n\n".join(" ".join(p.split()) for p in inspect.cleandoc(cls.__dict__["__doc__"]).split("\n\n"))


def _dataclasses(hint: Any) -> list[type]:
    """The dataclasses in a type, also inside unions and tuples; of a `Variant` all that its table has."""
    if get_origin(hint) is Annotated:
        kind, meaning = get_args(hint)
        if isinstance(meaning, Variant):
            return list(dict.fromkeys(entry.config for entry in meaning.table.values()))
        return _dataclasses(kind)
    if dataclasses.is_dataclass(hint):
        return [hint]  # type: ignore[list-item]
    return [cls for arg in get_args(hint) for cls in _dataclasses(arg)]


def _type(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _choices(args)
    if origin is Annotated:
        return next((_choices(table) for table in args[1:] if isinstance(table, Table)), _type(args[0]))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(arg) for arg in args))
    if origin is tuple:
        return f"list of {_type(args[0])}" if args[-1] is Ellipsis else f"list of {len(args)} {_type(args[0])}"
    if dataclasses.is_dataclass(hint):
        return "section"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def _choices(values: Iterable[object]) -> str:
    return " or ".join(f"`{value}`" for value in values)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        text: str = "`" + yaml.safe_dump(_plain(field.default), default_flow_style=True).split("\n")[0] + "`"
        return text
    return "required" if field.default_factory is dataclasses.MISSING else "the section's own"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    main()
