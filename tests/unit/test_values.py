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

from msdiff_dist.apps.train.plan import plan_phases
from msdiff_dist.apps.train.prediction import predict
from msdiff_dist.config import Variant
from msdiff_dist.errors import UserError
from msdiff_dist.recipe import Recipe, recipe_from

RECIPES = Path(__file__).parents[2] / "recipes"
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 10**9, 10**12, 10**18, 10**20, 10**400, 1e20, -1e20, 1e-300, 1e300)
TEXTS = ("", " ", "a/b", "..", "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 5000, "-x")
IMAGES = {"shards": "nowhere", "image_size": 16, "channels": 1}


def base(name: str, **sections: Any) -> dict[str, Any]:
    """A shipped recipe with a small model, and with `sections` that it does not have."""
    mapping: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    mapping["train"]["precision"] = "fp32"  # `auto` would ask this machine
    mapping["model"] |= {"encoder_channels": 16, "decoder_channels": [16, 16, 16]}
    mapping["model"] |= {"num_res_blocks": 1, "channel_mult": [1, 2], "attention_downsamples": [2]}
    return mapping | sections


BASES = {
    "ldm": base(
        "debug",
        text_encoder={"name": "ViT-B-32"},
        encode={"data": IMAGES},
        ema={"power": {"snapshot_every": 5}},
        validation={"shards": "nowhere"},
        preview={"every": 5, "num": 4, "sampler": {"steps": 5}},
        evaluation={"every": 5, "reference": "nowhere", "sampler": {"steps": 5}},
    ),
    "vp": base("fashion_mnist_dpm_3stage", guide={"features": "mobilenet"}),
    "edm": base("fashion_mnist_edm_3stage"),
    "adaptive": base("debug", stages={"boundaries": [442, 631], "adaptive": {"min_share": 0.1}}),
    "phases": base(
        "debug",
        grow={"at": 3, "width": 16, "attention": [2]},
        stages={"boundaries": [442, 631], "sampling": "equal", "end": {"at": [None, 10, None], "patience": 2}},
        validation={"shards": "nowhere"},
    ),
}
BASES["edm"]["diffusion"]["times"] = {"change_weight": None}  # which EDM refuses
# Of these bases only what the first one has not: the process, its family and samplers, data of images, and what
# contradicts other sections.
SECTIONS = {
    "vp": ("diffusion", "data", "guide", "model"),
    "edm": ("diffusion", "augmentation", "preview", "model"),
    "adaptive": ("stages.adaptive",),
    "phases": ("grow", "stages.end", "stages.ended", "stages.boundaries", "stages.sampling"),
}
APART = ("augmentation", "guide", "grow", "stages.adaptive", "stages.end")


def fields(hint: Any, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, type) of every field that is not a section, of the sections that a base has or may have."""
    origin, args = get_origin(hint), get_args(hint)
    value = value or {}
    if origin is Annotated and isinstance(args[1], Variant):
        hint = args[1].table[value.get("family", "ldm")].config
    elif origin in (Union, types.UnionType):
        hint = next((arg for arg in args if dataclasses.is_dataclass(arg)), hint)
    if not dataclasses.is_dataclass(hint):
        yield path, hint
        return
    hints = get_type_hints(hint, include_extras=True)
    for field in dataclasses.fields(hint):
        if "section" in field.metadata:
            name = value.get("process", "discrete")
            yield from fields(field.metadata["section"].table[name].config, value.get(name), (*path, name))
        elif field.init:
            yield from fields(hints[field.name], value.get(field.name), (*path, field.name))


def fed(hint: Any) -> Iterator[Any]:
    """Values for a field of this type: few that it can use, and some of other types."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (int, float):
        yield from (*NUMBERS, [], [1], "", "one")
    elif hint is str:
        yield from (*TEXTS, 1, ["a", "b"])
    elif origin is Annotated:
        yield from fed(args[0])
    elif origin in (Union, types.UnionType):
        for arg in args:
            yield from fed(arg)
    elif origin is Literal or hint in (bool, type(None)):
        yield from ("", "none of them", math.nan, [])
    elif origin is tuple:
        yield from ([], "", [1 if args[0] in (int, float) else "a"] * 5000)
        for inner in fed(args[0]):
            yield from ([inner], [inner] * 2)
    else:
        assert dataclasses.is_dataclass(hint), hint
        yield from ("", [], math.nan, {"none": 1})


def changed(mapping: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    copied = section = copy.deepcopy(mapping)
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return copied


def refusal(mapping: dict[str, Any], traced: bool) -> str:
    """What `msdiff plan` says against a recipe, "" if it plans it. Tracing the model takes a second, so few are."""
    try:
        recipe = recipe_from(mapping)
        plan_phases(recipe, 2)
        if traced:
            predict(recipe, 2, on_gpus=False)
    except UserError as e:
        return str(e)
    return ""


def belongs(name: str, path: tuple[str, ...]) -> bool:
    """Whether the base of this name is the one for a field."""
    sections = {path[0], ".".join(path[:2])}
    return sections.isdisjoint(APART) if name == "ldm" else not sections.isdisjoint(SECTIONS[name])


FIELDS = [
    (name, path, hint)
    for name, mapping in BASES.items()
    for path, hint in fields(Recipe, mapping, ())
    if belongs(name, path)
]


@pytest.mark.parametrize("name", BASES)
def test_a_base_itself_is_accepted(name: str) -> None:
    assert not refusal(BASES[name], traced=False)


@pytest.mark.parametrize(("name", "path", "hint"), FIELDS, ids=[f"{n}-{'.'.join(p)}" for n, p, _ in FIELDS])
def test_a_field(name: str, path: tuple[str, ...], hint: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in fed(hint):
        message = refusal(changed(BASES[name], path, value), traced=name in ("ldm", "phases"))
        assert not message or path[-1] in message, f"the field is not named in {message}"
        assert len(message) < 20_000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 1, f"{grown:.1f} GiB of memory"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**20, 10**400])
def test_numbers_that_nothing_takes(value: float) -> None:
    """No number of a recipe is one of these, but one that bounds the sampler's noise may be infinite."""
    for name, path, hint in FIELDS:
        numbers = {int, float} & {hint, *get_args(hint)}
        infinite = path[-2:] == ("churn", "sigma_max") and value == math.inf
        if infinite or not numbers or (value == 10**20 and float in numbers):
            continue
        with pytest.raises(UserError, match=path[-1]):
            recipe_from(changed(BASES[name], path, value))
