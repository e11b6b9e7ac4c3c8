"""Where each tensor of a safetensors file lies, by a parser as strict as the library's.

A file is 8 bytes with the header's length (little-endian), the header as JSON (name -> dtype, shape, data_offsets), and
the tensors' bytes, each tensor where the one before it ends. Whatever the library refuses is refused here; so are
dtypes that are not in `ITEM_BYTES` and fields that the format does not have.

The library does not say where tensors lie. Its `safe_open` maps files, and what was read of a mapping stays resident:
512 MiB read in slices from 32 open files made the process 515 MiB larger, where `TensorReader`, which reads at these
places, made it 38 MiB larger. And its `load` copies every tensor, where blocks of latents are used in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msdiff_dist.errors import MsdiffError

LONGEST = 100_000_000  # bytes of a header: the library's limit
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST = 1 << 63  # elements and bytes: torch counts both in int64


class HeaderError(MsdiffError):
    """The bytes are not those of a safetensors file."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The bytes of one tensor: [start, stop) of the file, not of its data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The place of every tensor by name, in the header's order, and the file's own metadata."""

    tensors: dict[str, Place]
    metadata: dict[str, str]


def read_header(read: Callable[[int], bytes], size: int) -> Header:
    """The header of a file of `size` bytes.

    Args:
        read: gives the next n bytes, from the file's first on.

    Raises:
        HeaderError: the header is cut short, too long, not UTF-8 or not JSON of this form; it has a name twice; or the
            tensors' places do not fit their shapes, or do not follow one another up to the end of the file.
    """
    length = int.from_bytes(read(8), "little")
    if size < 8 or 8 + length > size:
        raise HeaderError("it ends before its header does")
    if length > LONGEST:
        raise HeaderError(f"its header has {length} bytes, more than {LONGEST}")
    try:
        raw = json.loads(
            read(length).decode(),
            object_pairs_hook=_without_duplicates,
            parse_int=_natural,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        if not isinstance(raw, dict):
            raise HeaderError("its header is no mapping")
        metadata = _metadata(raw.pop("__metadata__", None))
        tensors = {_text(name): _place(name, entry, 8 + length) for name, entry in raw.items()}
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError among them
        raise HeaderError(f"its header is not valid ({e})") from None
    # Sorted by place, each tensor must start where the one before it ends: no gaps and no overlaps, in whatever order
    # the header names them.
    at = 8 + length
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != at:
            raise HeaderError(f"{name} begins at byte {place.start}, not at {at}")
        at = place.stop
    if at != size:
        raise HeaderError(f"it has {size} bytes where its header says {at}")
    return Header(tensors, metadata)


def _place(name: str, entry: Any, begin: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise HeaderError(f"{name} does not have exactly the fields {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderError(f"{name} is of type {dtype}, which is not known")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise HeaderError(f"{name} has shape {shape} and offsets {offsets}")
    # `volume` counts 0 as 1: even of an empty tensor, torch multiplies the other lengths for its strides.
    numel = volume = 1
    for length in shape:
        numel, volume = numel * length, volume * max(length, 1)
        if volume * ITEM_BYTES[dtype] >= _MOST:
            raise HeaderError(f"{name} of shape {shape} is too large")
    if offsets[1] - offsets[0] != numel * ITEM_BYTES[dtype]:
        raise HeaderError(f"{name} has {offsets[1] - offsets[0]} bytes for {dtype} of shape {shape}")
    return Place(dtype=dtype, shape=tuple(shape), start=begin + offsets[0], stop=begin + offsets[1])


def _metadata(raw: Any) -> dict[str, str]:
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise HeaderError("its metadata are not all text")
    return {_text(name): _text(value) for name, value in raw.items()}


def _text(text: str) -> str:
    text.encode()  # raises at lone halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold
    return text


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)  # bool is not


# `json` calls the two below for every number of the header: only natural numbers are allowed in it.
def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise HeaderError(f"its header holds {digits}")
    return int(digits)


def _no_number(text: str) -> float:
    raise HeaderError(f"its header holds {text}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise HeaderError("its header has a name twice")
    return dict(pairs)
