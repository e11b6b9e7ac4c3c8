"""Latents packed in blocks of some hundred samples per tar member, which share the cost of parsing it.

A member `NNNNNNNN.latents.safetensors` holds one tensor per field of a sample, with the samples stacked along the first
axis. A tensor has the name that the field's file extension would be in an unpacked shard:
- `latent.npy`, and `latent_flip.npy` of the mirrored image;
- `context.npy`, and `context_mask.npy`, false at padding (for other programs: training attends to padding too);
- `cls`, the label.
`crc32` holds each sample's checksum. The metadata has JSON lists of keys (`__key__`) and captions (`txt`).
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from msdiff_dist.files.json_text import parse_json
from msdiff_dist.files.safetensors_header import Header, HeaderError, read_header

Chunk = dict[str, NDArray[Any]]
"""n samples that were read together: `__key__`, `__url__` and a column [n, ...] for each file extension. Columns of
strings and of file contents have dtype object; those of a block have the dtype of its tensor."""

BLOCK_FIELD = "latents.safetensors"
CHECKSUMS = "crc32"
# How numpy reads the types of safetensors, which are little-endian. It lacks bfloat16: uint16 holds the same bits.
_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "I64": "<i8", "BOOL": "?"}


class BlockError(Exception):
    """The member is not a block, or not what was written.

    Attributes:
        row: of the first corrupt sample; None if the block itself is corrupt.
    """

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row


def pack_block(keys: Sequence[str], tensors: Mapping[str, Tensor], captions: Sequence[str] | None = None) -> bytes:
    """The content of a member.

    Args:
        tensors: by field, [len(keys), ...] on the CPU.
        captions: one per key; None to store none.
    """
    lists = {"__key__": list(keys)} | ({} if captions is None else {"txt": list(captions)})
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    contiguous[CHECKSUMS] = torch.tensor(_checksums(lists, contiguous))
    return save(contiguous, {name: json.dumps(values, ensure_ascii=False) for name, values in lists.items()})


def block_keys(content: bytes) -> list[str]:
    """The keys of a block's samples.

    Raises:
        BlockError: the content is not a block.
    """
    return _lists(_header(content))["__key__"]


def read_block(content: bytes, url: str) -> Chunk:
    """A block's samples, without comparing checksums: `msdiff data check` does that.

    Their numeric columns are views of `content`; bfloat16, which numpy lacks, is uint16 of the same bits.

    Raises:
        BlockError: the content is not a block.
    """
    header = _header(content)
    lists = _lists(header)
    keys = lists.pop("__key__")
    if not keys:
        raise BlockError("holds no samples")
    chunk = {"__key__": objects(keys), "__url__": objects([url] * len(keys))}
    chunk |= {name: objects([value.encode() for value in values]) for name, values in lists.items()}
    chunk |= _views(content, header)
    _check_lengths(chunk, len(keys))
    return chunk


def objects(values: Sequence[object]) -> NDArray[Any]:
    """A column of strings or of file contents."""
    return np.array(values, dtype=object)


def check_block(content: bytes) -> tuple[list[str], dict[str, Tensor]]:
    """The keys and tensors of a block, after comparing every sample with its checksum.

    Raises:
        BlockError: the content is not a block, or a sample is corrupt; then it has the first such row.
    """
    lists, tensors = _lists(_header(content)), _tensors(content)
    columns = {name: objects(values) for name, values in lists.items()} | tensors
    _check_lengths(columns, len(lists["__key__"]))
    if not lists["__key__"]:
        raise BlockError("holds no samples")
    if CHECKSUMS not in tensors:
        raise BlockError("has no checksums")
    stated = tensors.pop(CHECKSUMS).tolist()
    for row, (found, expected) in enumerate(zip(_checksums(lists, tensors), stated, strict=True)):
        if found != expected:
            raise BlockError("its content is not what was written", row)
    return lists["__key__"], tensors


def _header(content: bytes) -> Header:
    try:
        header = read_header(io.BytesIO(content).read, len(content))
    except HeaderError as e:
        raise BlockError(f"is not a block of latents ({e})") from e
    if "__key__" not in header.metadata:
        raise BlockError("is not a block of latents (it has no keys)")
    return header


def _lists(header: Header) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for name, text in header.metadata.items():
        try:
            values = parse_json(text)
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise ValueError("is no list of texts")
            for value in values:
                value.encode()  # raises at half of a surrogate pair
        except ValueError as e:
            raise BlockError(f"is not a block of latents ({name} {e})") from e
        lists[name] = values
    return lists


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise BlockError(f"is not a block of latents ({e})") from e


def _check_lengths(columns: Mapping[str, NDArray[Any] | Tensor], samples: int) -> None:
    for name, column in columns.items():
        if tuple(column.shape[:1]) != (samples,):
            raise BlockError(f"has {len(column) if column.ndim else 1} of {name} for {samples} samples")


def _views(content: bytes, header: Header) -> dict[str, NDArray[Any]]:
    """The tensors but for the checksums, as views of `content` at the places that the header names."""
    # The library's `load` would copy every tensor. Here a sample is copied once, to its place in the window or batch.
    views = {}
    for name, place in header.tensors.items():
        if place.dtype not in _DTYPES:
            raise BlockError(f"is not a block of latents ({name} is of type {place.dtype})")
        if name != CHECKSUMS:
            flat = np.frombuffer(content, _DTYPES[place.dtype], math.prod(place.shape), place.start)
            try:
                views[name] = flat.reshape(place.shape)
            except ValueError as e:  # numpy has fewer axes
                raise BlockError(f"is not a block of latents ({name}: {e})") from e
    return views


def _array(tensor: Tensor) -> NDArray[Any]:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _checksums(lists: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> list[int]:
    """CRC-32 of every sample: of its strings, then of its row of every tensor, each sorted by field."""
    keys = lists["__key__"]
    arrays = [
        _array(tensors[name]).reshape(len(keys), -1).view(np.uint8) for name in sorted(tensors) if name != CHECKSUMS
    ]
    found = []
    for row in range(len(keys)):
        crc = 0
        # Each CRC starts from the one before, so the result is that of all the bytes in a row.
        for name in sorted(lists):
            crc = zlib.crc32(lists[name][row].encode(), crc)
        for array in arrays:
            crc = zlib.crc32(array[row], crc)
        found.append(crc)
    return found
