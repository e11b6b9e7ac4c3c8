"""Every field of a recipe, fed with what no training can use: accepted with a meaning, or refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import math
import resource
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from msdiff_dist.apps.train.prediction import predict
from msdiff_dist.config import INFINITE, Variant
from msdiff_dist.errors import UserError
from msdiff_dist.recipe import Recipe, recipe_from

RECIPES = Path(__file__).parents[2] / "recipes"
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 10**9, 10**12, 10**18, 10**20, 10**400, 1e20, -1e20, 1e-300, 1e300)
TEXTS = ("", " ", "a/b", "..", "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 5000, "-x")
_STAGES = {"stages": {"boundaries": [], "sampling": "uniform"}}


def base(name: str, **changes: Any) -> dict[str, Any]:
    mapping = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    mapping["train"]["precision"] = "fp32"  # `auto` would ask this machine
    return mapping | changes


BASES = {
    "ldm": base("debug", text_encoder={"name": "ViT-B-32"}, encode={}, ema={"power": {"snapshot_every": 5}},
                preview={"every": 5, "num": 4, "sampler": {"steps": 5}}),
    "vp": base("fashion_mnist_dpm_3stage"),
    "edm": base("fashion_mnist_edm_3stage"),
}  # fmt: skip


def leaves(hint: Any, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, type) of every field that is not a section, of the sections that a base has or may have."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated and isinstance(args[1], Variant):
        hint = args[1].chosen(value or {}, "").config if False else args[1].table[(value or {}).get("family", "ldm")].config
    elif origin in (Union, types.UnionType):
        sections = [a for a in args if dataclasses.is_dataclass(a)]
        hint = sections[0] if sections else hint
    if not dataclasses.is_dataclass(hint):
        yield path, hint
        return
    hints = get_type_hints(hint, include_extras=True)
    for field in dataclasses.fields(hint):
        if "section" in field.metadata:
            name = (value or {}).get("process", "discrete")
            yield from leaves(field.metadata["section"].table[name].config, (value or {}).get(name), (*path, name))
        elif field.init:
            yield from leaves(hints[field.name], (value or {}).get(field.name), (*path, field.name))


def of_type(hint: Any) -> Iterator[Any]:
    """What a field of this type is fed with."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (int, float):
        yield from NUMBERS
        yield from ([], [1], "", "one")
    elif hint is str:
        yield from (*TEXTS, 1, ["a", "b"])
    elif origin is Annotated:
        yield from of_type(args[0])
    elif origin in (Union, types.UnionType):
        for arg in args:
            yield from of_type(arg)
    elif origin is Literal or hint in (bool, type(None)):
        yield from ("", "none of them", math.nan, [])
    elif origin is tuple:
        yield from ([], "")
        for inner in of_type(args[0]):
            yield from ([inner], [inner] * 2, [inner] * 5000)
    else:
        assert dataclasses.is_dataclass(hint), hint
        yield from ("", [], math.nan, {"none": 1})


def with_value(mapping: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(mapping)
    section = changed
    for name in path[:-1]:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
    section[path[-1]] = value
    return changed


FIELDS = [(name, path, hint) for name, mapping in BASES.items() for path, hint in leaves(Recipe, mapping, ())]


def shown(value: Any) -> str:
    return repr(value)[:40] if not isinstance(value, int) or abs(value) < 10**30 else "10**400"


@pytest.mark.parametrize(("name", "path", "hint"), FIELDS, ids=[f"{n}-{'.'.join(p)}" for n, p, _ in FIELDS])
def test_each_field(name: str, path: tuple[str, ...], hint: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in of_type(hint):
        try:
            recipe = recipe_from(with_value(BASES[name], path, value))
            predict(recipe, 2, on_gpus=False)
        except UserError as e:
            assert "\n" not in str(e)
            assert len(str(e)) < 1500, (shown(value), str(e))
            if path[-1] not in str(e):
                print("UNNAMED", ".".join(path), shown(value), "->", e)
        except Exception as e:
            print("OTHER", ".".join(path), shown(value), "->", type(e), str(e)[:200])
        else:
            print("ACCEPTED", ".".join(path), shown(value))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1e6, f"{grown / 1e6:.1f} GB"
