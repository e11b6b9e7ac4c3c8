"""Values changed in YAML text: what is read back is what was asked for, and comments stay."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from msdiff_dist.files.yaml_text import with_values

RECIPE = """\
# header
name: old   # a name
data:
  # where
  shards: [a,
           b]   # two
  flow: {x: 1, y: {z: 2}}

stages:
  boundaries:
  - 442   # paper
  - 631
  # below the list
empty:
nothing: {}
train: {steps: 5} # inline
"""
PATHS = [
    "name", "new", "data.shards", "data.flow", "data.flow.x", "data.flow.y.z", "data.flow.w", "data.new.deep",
    "stages.boundaries", "stages.more", "empty", "empty.a.b", "nothing.a", "train.steps", "train.more.a", "a.b.c",
]  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(-1, 1), st.text(max_size=8),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(["null", "1e5", "a: b", "# c", "yes", "- x", "{", "'", "x" * 200, "ü"]),
)  # fmt: skip


def _set(mapping: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        mapping[section] = mapping.get(section) or {}
        mapping = mapping[section]
    mapping[last] = value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=4))
def test_the_values_are_read_back(values: dict[str, Any]) -> None:
    expected, applied = yaml.safe_load(RECIPE), {}
    for path, value in values.items():
        # A value that is no mapping cannot hold a later path's field, nor a later value of its section be kept.
        if not any(path.startswith(f"{other}.") or other.startswith(f"{path}.") for other in applied):
            applied[path] = value
            _set(expected, path, value)
    assert yaml.safe_load(with_values(RECIPE, applied)) == expected


def test_comments_and_layout_stay() -> None:
    values = {"name": "x", "data.flow.y.z": 3, "train.more": True, "data.last": 1, "stages.boundaries": [1, 2]}
    assert (
        with_values(RECIPE, values)
        == """\
# header
name: x   # a name
data:
  # where
  shards: [a,
           b]   # two
  flow: {x: 1, y: {z: 3}}
  last: 1

stages:
  boundaries: [1, 2]
  # below the list
empty:
nothing: {}
train: {steps: 5, more: true} # inline
"""
    )


@pytest.mark.parametrize("text", ["a: 1", "a: 1\n", "a:\n  b: 2"])
def test_text_without_a_last_newline(text: str) -> None:
    assert yaml.safe_load(with_values(text, {"c.d": 3}))["c"] == {"d": 3}
