"""Latents packed in blocks: some hundred samples per tar member, so that reading costs next to nothing per sample.

A member `NNNNNN.latents.safetensors` holds one tensor per field of a sample, named as the file extension would be in an
unpacked shard and stacked along the first axis: `latent.npy`, `latent_flip.npy` (of the mirrored picture),
`context.npy`, `context_mask.npy`, `cls`; `crc32` is each sample's checksum; the metadata has lists of keys (`__key__`)
and captions (`txt`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

BLOCK_FIELD = "latents.safetensors"
CHECKSUMS = "crc32"
_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "I64": "<i8", "BOOL": "?"}


class BlockError(Exception):
    """The member is not a block, or not what was written. row: of the first damaged sample, if only samples are."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row


def pack_block(keys: Sequence[str], tensors: Mapping[str, Tensor], captions: Sequence[str] | None = None) -> bytes:
    """The content of a member.

    Args:
        tensors: per field, [len(keys), ...] on the CPU.
    """
    lists = {"__key__": list(keys)} | ({} if captions is None else {"txt": list(captions)})
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    contiguous[CHECKSUMS] = torch.tensor(_checksums(lists, contiguous))
    return save(contiguous, {name: json.dumps(values, ensure_ascii=False) for name, values in lists.items()})


def block_keys(content: bytes) -> list[str]:
    """The keys of a block's samples.

    Raises:
        BlockError: it is not a block.
    """
    return _lists(content)["__key__"]


def block_samples(content: bytes, url: str) -> Iterator[dict[str, Any]]:
    """A block's samples as if each had been read by itself, with arrays instead of file contents.

    bfloat16, which numpy lacks, comes as the uint16 of the same bits.

    Raises:
        BlockError: it is not a block.
    """
    lists = _lists(content)
    columns: dict[str, Any] = {"__key__": lists["__key__"]}
    columns |= {name: [value.encode() for value in values] for name, values in lists.items() if name != "__key__"}
    columns |= {name: array for name, array in _views(content).items() if name != CHECKSUMS}
    names = ("__url__", *columns)
    return (dict(zip(names, (url, *row), strict=True)) for row in zip(*columns.values(), strict=True))


def check_block(content: bytes) -> tuple[list[str], dict[str, Tensor]]:
    """The keys and tensors of a block, every sample compared with its checksum.

    Raises:
        BlockError: naming the first damaged sample's row, if that is all that is damaged.
    """
    lists, tensors = _lists(content), _tensors(content)
    stated = tensors.pop(CHECKSUMS).tolist()
    for row, (found, expected) in enumerate(zip(_checksums(lists, tensors), stated, strict=True)):
        if found != expected:
            raise BlockError("its content is not what was written", row)
    return lists["__key__"], tensors


def _lists(content: bytes) -> dict[str, list[str]]:
    try:
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        return {name: json.loads(text) for name, text in metadata.items()} | {
            "__key__": json.loads(metadata["__key__"])
        }
    except (ValueError, KeyError, TypeError) as e:
        raise BlockError(f"is not a block of latents ({e!r})") from e


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise BlockError(f"is not a block of latents ({e})") from e


def _views(content: bytes) -> dict[str, NDArray[Any]]:
    """The tensors without copying them, as safetensors lays them out: a header's length, the header, the values."""
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        return {
            name: np.frombuffer(
                content, _DTYPES[entry["dtype"]], math.prod(entry["shape"]), start + entry["data_offsets"][0]
            ).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError) as e:
        raise BlockError(f"is not a block of latents ({e!r})") from e


def _array(tensor: Tensor) -> NDArray[Any]:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _checksums(lists: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> list[int]:
    """CRC-32 of every sample: its strings and its part of every tensor, by name of the field."""
    keys = lists["__key__"]
    arrays = [
        _array(tensors[name]).reshape(len(keys), -1).view(np.uint8) for name in sorted(tensors) if name != CHECKSUMS
    ]
    found = []
    for row in range(len(keys)):
        crc = 0
        for name in sorted(lists):
            crc = zlib.crc32(lists[name][row].encode(), crc)
        for array in arrays:
            crc = zlib.crc32(array[row], crc)
        found.append(crc)
    return found
