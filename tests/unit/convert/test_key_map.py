"""Layouts are inverses of each other, and checkpoints that do not fit the rules are named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdiff_dist.convert.key_map import Pointwise, Rule, SplitQKV, TheirsFromOurs, check_complete, rule
from msdiff_dist.convert.tensor_sources import MemorySource
from msdiff_dist.errors import CheckpointError


@given(heads=st.integers(1, 4), width=st.integers(1, 3), heads_first=st.booleans(), matrix=st.booleans())
def test_split_of_queries_keys_and_values(heads: int, width: int, heads_first: bool, matrix: bool) -> None:
    channels = heads * width
    joint = torch.arange(3.0 * channels)
    joint = joint[:, None] + torch.zeros(channels) if matrix else joint
    layout = SplitQKV(heads, heads_first)
    q, k, v = layout.to_theirs(joint)
    for which, part in enumerate((q, k, v)):
        for head in range(heads):
            for i in range(width):
                row = (head * 3 + which) * width + i if heads_first else which * channels + head * width + i
                assert torch.equal(part[head * width + i], joint[row])
    assert torch.equal(layout.to_ours([q, k, v]), joint)


def test_pointwise_convolutions_are_matrices() -> None:
    matrix = torch.randn(4, 3)
    (kernel,) = Pointwise(2).to_theirs(matrix)
    assert kernel.shape == (4, 3, 1, 1)
    assert torch.equal(Pointwise(2).to_ours([kernel]), matrix)


def test_wide_kernels_are_no_matrices() -> None:
    kernel = torch.randn(4, 3, 3)
    assert Pointwise(1).to_ours([kernel]).shape == kernel.shape


def test_theirs_are_read_one_by_one() -> None:
    joint = torch.randn(6, 2)
    theirs = TheirsFromOurs(MemorySource({"qkv": joint}), [Rule("qkv", ("q", "k", "v"), SplitQKV(1, False))])
    assert theirs.names() == ["q", "k", "v"]
    assert torch.equal(theirs.read("k"), joint[2:4])
    assert theirs.meta("v").shape == (2, 2)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"x": (2,)}, "y"),
        ({"x": (2,), "y": (3,), "z": (1,)}, "z"),
        ({"x": (2,), "y": (4,)}, "y"),
    ],
)
def test_what_does_not_fit_is_named(keys: dict[str, tuple[int, ...]], named: str) -> None:
    source = MemorySource({k: torch.zeros(shape) for k, shape in keys.items()})
    shapes = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=named):
        check_complete(source, [rule("a", "x"), rule("b", "y")], [], shapes, "test")
