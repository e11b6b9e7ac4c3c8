"""Whatever the library refuses is refused with `HeaderError` and no other error; what it writes is read."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load, save

from msdiff_dist.files.safetensors_header import ITEM_BYTES, LONGEST, HeaderError, read_header

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b/c@7": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0, 4)}
FILE = save(TENSORS, {"format": "pt"})
BEGIN = 8 + int.from_bytes(FILE[:8], "little")
HEADER, DATA = json.loads(FILE[8:BEGIN]), FILE[BEGIN:]

NUMBERS = st.sampled_from([0, 1, 2, 3, 6, 24, 30, 31, 2**31, 2**62, 2**63, 2**64, 10**400, -1, 0.0, 3.0, 1e400, True])
NAMES = st.sampled_from(["a", "b/c@7", "none", "__metadata__", "", "\ud800", "dtype", "shape", "data_offsets", "é"])
VALUES = st.recursive(
    NUMBERS | NAMES | st.none() | st.sampled_from([*ITEM_BYTES, "F8_E4M3", "U64", "f32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def ours(content: bytes) -> Any:
    return read_header(io.BytesIO(content).read, len(content))


def framed(header: bytes, data: bytes = DATA) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def library_refuses(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return True
    return False


def ours_refuses(content: bytes) -> bool:
    try:
        ours(content)
    except HeaderError:
        return True
    return False


def is_as_strict(content: bytes) -> None:
    refused = ours_refuses(content)
    assert refused or not library_refuses(content)
    if not refused:
        read = ours(content)
        loaded = load(content)
        assert {name: place.shape for name, place in read.tensors.items()} == {n: t.shape for n, t in loaded.items()}
        for name, place in read.tensors.items():
            found = torch.frombuffer(bytearray(content[place.start : place.stop]) or bytearray(8), dtype=torch.uint8)
            whole = loaded[name].reshape(-1).view(torch.uint8)
            assert torch.equal(found[: len(whole)], whole)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """The header with some of its values replaced, removed or added, and perhaps a name written twice."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(1, 3))):
        at: Any = header
        for _ in range(draw(st.integers(0, 2))):
            keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
            inner = [at[key] for key in keys if isinstance(at[key], (dict, list)) and at[key]]
            at = draw(st.sampled_from(inner)) if inner else at
        if isinstance(at, dict):
            key = draw(NAMES | st.sampled_from(sorted(at)) if at else NAMES)
            if draw(st.booleans()):
                at[key] = draw(VALUES)
            else:
                at.pop(key, None)
        elif at:
            at[draw(st.integers(0, len(at) - 1))] = draw(NUMBERS | VALUES)
    text = json.dumps(header)
    if draw(st.booleans()):
        text = text.replace('"a"', '"none"', draw(st.integers(0, 1)))
    return framed(text.encode(errors="surrogatepass"), DATA + bytes(draw(st.integers(0, 1))))


@settings(max_examples=400, deadline=None)
@given(edited())
def test_edited_headers(content: bytes) -> None:
    is_as_strict(content)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_changed_bytes(changes: list[tuple[int, int]], data: st.DataObject) -> None:
    content = bytearray(FILE)
    for at, value in changes:
        content[at % BEGIN if data.draw(st.booleans()) else at] = value
    is_as_strict(bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes(content: bytes) -> None:
    is_as_strict(content)
    is_as_strict(framed(content))


@given(st.integers(0, len(FILE) - 1))
def test_every_cut(length: int) -> None:
    with pytest.raises(HeaderError):
        ours(FILE[:length])


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "size", "problem"),
    [
        ({"a": entry(), "b": entry(offsets=(2, 6))}, 6, "b begins at byte"),
        ({"a": entry(), "b": entry(offsets=(8, 12))}, 12, "b begins at byte"),
        ({"a": entry(offsets=(4, 8))}, 8, "a begins at byte"),
        ({"a": entry(offsets=(0, 8))}, 8, "a has 8 bytes for F32 of shape"),
        ({"a": entry(offsets=(-4, 0))}, 0, "holds -4"),
        ({"a": entry(shape=(-1,))}, 4, "holds -1"),
        ({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, 0, "too large"),
        ({"a": entry("F8_E4M3", (4,))}, 4, "type F8_E4M3"),
        ({"a": entry() | {"strides": [1]}}, 4, "does not have exactly the fields"),
        ({"a": entry(), "__metadata__": {"n": 1}}, 4, "metadata are not all text"),
        ({"a": entry()}, 5, "has .* bytes where its header says"),
        ([], 0, "no mapping"),
    ],
)
def test_messages_say_what_is_wrong(header: Any, size: int, problem: str) -> None:
    with pytest.raises(HeaderError, match=problem):
        ours(framed(json.dumps(header).encode(), bytes(size)))


def test_names_given_twice_text_and_depth() -> None:
    twice = json.dumps({"a": entry(), "b": entry()}).replace('"b"', '"a"').encode()
    with pytest.raises(HeaderError, match="twice"):
        ours(framed(twice, bytes(4)))
    for header in (b'{"\xff": 1}', b'{"__metadata__": {"\\ud800": ""}}', b"[" * 100_000, b'{"a": NaN}'):
        with pytest.raises(HeaderError):
            ours(framed(header, b""))


def test_the_longest_header() -> None:
    length = LONGEST + 1
    with pytest.raises(HeaderError, match="more than 100000000"):
        read_header(io.BytesIO(length.to_bytes(8, "little")).read, 10**9)
