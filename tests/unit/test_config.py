"""Strict dataclass <-> mapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from msdiff_dist.config import (
    Variant,
    differences,
    field_docs,
    from_mapping,
    section_of,
    to_mapping,
    with_current_names,
)
from msdiff_dist.errors import ConfigError
from msdiff_dist.registry import Table


@dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError("width", self.width, "must be positive", "Use 1.")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] | None = None
    layout: Literal["auto"] | tuple[tuple[int, ...], ...] = "auto"
    flag: bool = False
    names: dict[str, int] = field(default_factory=dict)


FULL = {
    "inner": {"width": 3, "rate": 0.5},
    "kind": "b",
    "sizes": [1, 2],
    "pair": [1, 2.0],
    "layout": [[0], [0, 1]],
    "flag": True,
    "names": {"x": 1},
}


def test_round_trip() -> None:
    outer = from_mapping(Outer, FULL)
    assert outer == Outer(Inner(3), "b", (1, 2), (1, 2.0), ((0,), (0, 1)), True, {"x": 1})
    assert to_mapping(outer) == FULL


@dataclass(frozen=True)
class Documented:
    """A base."""

    first: int = 0
    """What the base says."""
    second: int = 0


@dataclass(frozen=True)
class Extended(Documented):
    """A class that says more of one field, and of one of its own."""

    second: int = 1
    """Two lines
    of it."""
    third: int = 2
    "One."


def test_what_stands_under_a_field_documents_it() -> None:
    assert field_docs(Extended) == {"first": "What the base says.", "second": "Two lines of it.", "third": "One."}


def test_earlier_names_are_named_in_errors_and_taken_from_what_was_stored() -> None:
    with pytest.raises(ConfigError, match=r"inner\.zero_stage = 1: is now called zero_decoders"):
        from_mapping(Outer, FULL | {"inner": {"zero_stage": 1}})
    assert with_current_names({"parallel": {"zero_stage": 2}}) == {"parallel": {"zero_decoders": 2}}


@pytest.mark.parametrize(
    ("change", "field_name", "words"),
    [
        ({"inner": {"widht": 3}}, "inner.widht", "Did you mean 'width'?"),
        ({"inner": {}}, "inner.width", "required and missing"),
        ({"inner": {"width": "3"}}, "inner.width", "must be an integer, not str"),
        ({"inner": {"width": True}}, "inner.width", "must be an integer, not bool"),
        ({"inner": {"width": 0}}, "inner.width", "must be positive"),
        ({"inner": 3}, "inner", "must be a mapping"),
        ({"kind": "c"}, "kind", "Choose from: a, b"),
        ({"sizes": 3}, "sizes", "must be a list"),
        ({"sizes": [1, 2.5]}, "sizes[1]", "must be an integer"),
        ({"pair": [1]}, "pair", "must have 2 entries"),
        ({"layout": "manual"}, "layout", "is not one of the choices"),
        ({"layout": [[0], ["x"]]}, "layout[1][0]", "must be an integer"),
        ({"flag": 1}, "flag", "must be true or false"),
        ({"names": {"x": "y"}}, "names.x", "must be an integer"),
    ],
)
def test_refusals_name_field_and_reason(change: dict[str, Any], field_name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Outer, FULL | change)
    assert caught.value.field == field_name
    assert words in str(caught.value)


@dataclass(frozen=True)
class Circle:
    radius: int = 1
    kind: str = "circle"


@dataclass(frozen=True)
class Square:
    edge: int = 1
    kind: str = "square"


@dataclass(frozen=True)
class Entry:
    config: type


SHAPES: Table[Entry] = Table("shape", {"circle": Entry(Circle), "square": Entry(Square)})


@dataclass(frozen=True)
class Drawing:
    shape: Annotated[Circle | Square, Variant(SHAPES, "kind", default="circle")] = Circle()
    pen: Annotated[str, SHAPES] = "circle"
    settings: Any = field(default=None, metadata=section_of(SHAPES, "pen"))


def test_a_field_names_the_dataclass_of_its_section() -> None:
    assert from_mapping(Drawing, {"shape": {"radius": 2}}).shape == Circle(2)
    square = from_mapping(Drawing, {"shape": {"kind": "square", "edge": 3}})
    assert square.shape == Square(3)
    assert from_mapping(Drawing, to_mapping(square)) == square


def test_a_section_goes_by_the_name_it_belongs_to() -> None:
    drawing = from_mapping(Drawing, {"pen": "square", "square": {"edge": 5}, "circle": None})
    assert drawing.settings == Square(5)
    assert to_mapping(drawing)["square"] == {"edge": 5, "kind": "square"}
    assert from_mapping(Drawing, to_mapping(drawing)) == drawing
    assert to_mapping(Drawing())["circle"] is None


@pytest.mark.parametrize(
    ("change", "field_name", "words"),
    [
        ({"shape": {"kind": "squre"}}, "shape.kind", "Did you mean 'square'"),
        ({"shape": {"kind": 3}}, "shape.kind", "must be a string"),
        ({"shape": {"edge": 3}}, "shape.edge", "is not a known field"),
        ({"shape": "square"}, "shape", "must be a mapping"),
        ({"square": {"edge": 5}}, "square", "configures a shape that is not in use (circle)"),
        ({"circle": {"radus": 5}}, "circle.radus", "Did you mean 'radius'"),
        ({"circel": {}}, "circel", "Did you mean 'circle'"),
        ({"settings": {}}, "settings", "is not a known field"),
    ],
)
def test_refusals_of_sections_name_field_and_reason(change: dict[str, Any], field_name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Drawing, change)
    assert caught.value.field == field_name
    assert words in str(caught.value)


def test_differences() -> None:
    changed = {**FULL, "inner": {"width": 4, "rate": 0.5}, "more": 1}
    assert differences(FULL, changed) == [("inner.width", 3, 4), ("more", None, 1)]
    assert differences(FULL, FULL) == []
