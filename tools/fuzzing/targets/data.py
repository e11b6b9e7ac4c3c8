"""Shards and what lies in and beside them: archives, arrays, blocks of latents, indexes, manifests, labels."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdiff_dist.config import to_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.index import read_index
from msdiff_dist.data.latent_blocks import BlockError, block_keys, check_block, pack_block, read_block
from msdiff_dist.data.make.idx import read_idx
from msdiff_dist.data.make.manifest import Manifest, ManifestFile, NetworkIdentity, load_manifest
from msdiff_dist.data.npy import read_npy
from msdiff_dist.data.samples import decode
from msdiff_dist.data.tar_members import TarError, chunks
from msdiff_dist.errors import DataError

from ..mutations import mutate_json, mutate_npy, mutate_safetensors
from ..target import DisagreementError, Target
from .tars import archive

_LATENT, _CONTEXT = (2, 4, 4), (3, 5)


def _npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def _npy_claim(descr: str, shape: str) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(64)


def _npy_hostile() -> dict[str, bytes]:
    return {
        "claims more than there is": _npy_claim("'<f4'", "(99999999999,)"),
        "no bytes an element": _npy_claim("'|V0'", "(99999999999,)"),
        "wide elements, none of them": _npy_claim("'|V999999999'", "(0,)"),
        "negative shape": _npy_claim("'<f4'", "(-1, 4)"),
        "objects": _npy_claim("'|O'", "(2,)"),
        "objects inside": _npy_claim("[('a', '|O')]", "(2,)"),
        "deep": _npy_claim("(" * 200 + ")" * 200, "(2,)"),
        "no tuple": _npy_claim("'<f4'", "16"),
        "code": _npy_claim("__import__('os')", "(2,)"),
        "lengths of bool": _npy_claim("'<f4'", "(True, True)"),
    }


def _as_numpy(data: bytes, found: Any) -> None:
    try:
        theirs = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as e:
        raise DisagreementError(f"numpy refuses: {type(e).__name__} {e}") from e
    if theirs.dtype != found.dtype or theirs.shape != found.shape or theirs.tobytes() != found.tobytes():
        raise DisagreementError(f"array: {found!r:.500} where numpy has {theirs!r:.500}")


def _block() -> bytes:
    tensors = {
        "latent.npy": torch.arange(96, dtype=torch.float16).view(3, *_LATENT),
        "context.npy": torch.ones(3, *_CONTEXT, dtype=torch.bfloat16),
        "cls": torch.tensor([0, 1, 2]),
    }
    return pack_block(["a", "b", "c"], tensors, ["one", "", "drei"])


def _mutate_block(rng: random.Random, data: bytes) -> bytes:
    """Besides the header itself, the lists of keys and captions inside it, which are JSON in JSON."""
    if rng.random() < 0.5:
        return mutate_safetensors(rng, data)
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        name = rng.choice(["__key__", "txt"])
        header["__metadata__"][name] = mutate_json(rng, header["__metadata__"][name].encode()).decode(
            "utf-8", "replace"
        )
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return mutate_safetensors(rng, data)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _block_of(keys: str, tail: bytes = b"", **tensors: tuple[str, list[int], int, int]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"__key__": keys}}
    header |= {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in tensors.items()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tail


def _block_hostile() -> dict[str, bytes]:
    return {
        "keys are a number": _block_of("5"),
        "keys are a mapping": _block_of('{"a": 1}'),
        "keys are numbers": _block_of("[1, 2]"),
        "keys are lists": _block_of('[["a"], ["b"]]'),
        "keys are half a pair": _block_of('["\\ud800"]'),
        "no samples": _block_of("[]"),
        "deep keys": _block_of("[" * 5000 + "]" * 5000),
        "labels that are no integers": _block_of('["a"]', bytes(4), cls=("F32", [1], 0, 4)),
        "labels of two axes": _block_of('["a"]', bytes(16), cls=("I64", [1, 2], 0, 16)),
        "label without axes": _block_of('["a"]', bytes(8), cls=("I64", [], 0, 8)),
    }


_DECODING = DataConfig(
    shards="x.tar", kind="latent", latent_shape=_LATENT, num_classes=3, captions=True, context_shape=_CONTEXT
)


def _read_block(data: bytes, folder: Path) -> Any:
    path = folder / "x.tar"
    path.write_bytes(archive(tarfile.USTAR_FORMAT, ("0.latents.safetensors", data)))
    with contextlib.suppress(BlockError):
        check_block(data)
    chunk = read_block(data, "x.tar")
    assert block_keys(data) == list(chunk["__key__"])
    for each in chunks(str(path)):
        decode(each, _DECODING, 0, np.arange(len(each["__key__"])))
    return chunk


def _decode(data: bytes, folder: Path) -> Any:
    """A sample of files as training decodes it: the input is label, caption and latent with separators."""
    label, caption, latent = data.split(b"\n--\n", 2) if data.count(b"\n--\n") >= 2 else (data, data, data)
    path = folder / "x.tar"
    files = (
        ("a.cls", label),
        ("a.txt", caption),
        ("a.latent.npy", latent),
        ("a.context.npy", _npy(np.ones(_CONTEXT, "f4"))),
    )
    path.write_bytes(archive(tarfile.USTAR_FORMAT, *files))
    return [decode(chunk, _DECODING, 0, np.arange(1)) for chunk in chunks(str(path))]


def _decode_hostile() -> dict[str, bytes]:
    latent = _npy(np.ones(_LATENT, "f4"))
    labels = {
        "huge": b"9" * 5000,
        "above int64": b"1" + b"0" * 19,
        "underscore": b"1_0",
        "empty": b"",
        "Arabic": "٢".encode(),
    }
    return {f"label: {name}": b"\n--\n".join((label, b"text", latent)) for name, label in labels.items()}


def _label_is_digits(data: bytes, found: Any) -> None:
    label = data.split(b"\n--\n", 1)[0]
    if not label.strip().lstrip(b"+").isdigit():
        raise DisagreementError(f"label: {label!r:.100} is taken for {found[0].label_n}")


_SHARDS = ("00000.tar", "00001.tar")


def _index() -> bytes:
    entries = [{"url": name, "nsamples": 2, "filesize": 5} for name in _SHARDS]
    return json.dumps(
        {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "x", "shardlist": entries}
    ).encode()


def _read_index(data: bytes, folder: Path) -> Any:
    for name in _SHARDS:
        (folder / name).write_bytes(bytes(5))
    (folder / "index.json").write_bytes(data)
    return read_index([str(folder / name) for name in _SHARDS])


def _counts_are_those_stated(data: bytes, found: Any) -> None:
    stated = {e["url"].rsplit("/", 1)[-1]: e["nsamples"] for e in json.loads(data)["shardlist"]}
    for shard in found:
        count = stated.get(shard.path.rsplit("/", 1)[-1])
        if type(count) is not int or count != shard.num_samples:
            raise DisagreementError(f"count: {shard.num_samples} where the index says {count!r}")


def _manifest() -> bytes:
    manifest = Manifest(
        samples=4,
        shape=_LATENT,
        dtype="float16",
        moments=False,
        flip=False,
        scale_factor=0.18,
        scale_measured=False,
        autoencoder=NetworkIdentity("vae", "0" * 64),
        text_encoder=None,
        context_shape=_CONTEXT,
        null_context=ManifestFile(name="null_context.safetensors", samples=0, bytes=9, sha256="0" * 64),
        source=("a", "b"),
        left_out=(),
        shards=tuple(ManifestFile(name=n, samples=2, bytes=5, sha256="1" * 64) for n in _SHARDS),
    )
    return manifest.dump().encode()


def _read_manifest(data: bytes, folder: Path) -> Any:
    (folder / "manifest.json").write_bytes(data)
    return load_manifest(str(folder / "manifest.json"))


def _same_manifest(data: bytes, found: Any) -> None:
    theirs = json.loads(data)
    if any(to_mapping(found)[name] != value for name, value in theirs.items()):
        raise DisagreementError(f"manifest: {found!r:.500} where the file says {theirs!r:.500}")


def json_hostile(valid: bytes) -> dict[str, bytes]:
    """What breaks readers of JSON, whatever they look for."""
    text = valid.decode()
    return {
        "deep": b"[" * 100_000,
        "deep, closed": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        "long number": b'{"format": ' + b"9" * 5000 + b"}",
        "huge number": text.replace("2", "1e999").encode(),
        "not a number": text.replace("2", "NaN").encode(),
        "list": b"[]", "number": b"5", "null": b"null", "empty": b"", "text": b'"a"',
        "byte-order mark": b"\xef\xbb\xbf" + valid,
        "UTF-16": text.encode("utf-16"),
        "not UTF-8": b"\xff" + valid,
        "half a pair": b'{"format": 1, "__kind__": "\\ud800", "name": "\\udfff"}',
        "zero bytes": bytes(100),
        "truncated": valid[: len(valid) // 2],
    }  # fmt: skip


def _idx(array: Any) -> bytes:
    return bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def _read_idx(data: bytes, folder: Path) -> Any:
    path = folder / ("x.gz" if data.startswith(b"\x1f\x8b") else "x")
    path.write_bytes(data)
    return read_idx(path)


def _idx_hostile() -> dict[str, bytes]:
    return {
        "bomb": gzip.compress(_idx(np.zeros((2, 2), np.uint8)) + bytes(1 << 29)),
        "claims more than there is": struct.pack(">HBB2I", 0, 8, 2, 1 << 31, 1 << 31),
        "255 axes": struct.pack(">HBB255I", 0, 8, 255, *[1] * 255) + b"x",
        "no bytes, wide": struct.pack(">HBB3I", 0, 8, 3, 0, (1 << 32) - 1, (1 << 32) - 1),
        "cut short": gzip.compress(_idx(np.zeros((9, 9), np.uint8)))[:-9],
    }


def _idx_bytes(data: bytes, found: Any) -> None:
    whole = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    if whole[4 + 4 * found.ndim :] != found.tobytes():
        raise DisagreementError("values: not the bytes after the sizes")


_SEPARATED = b"\n--\n"
TARGETS = (
    Target(
        name="npy",
        read=lambda data, folder: read_npy(data),
        refuses=(ValueError, EOFError),
        oracle=_as_numpy,
        seeds=lambda: [
            _npy(np.ones((2, 3), t), v) for t in ("<f4", "<f2", ">i8", "S3", "<c8") for v in ((1, 0), (2, 0))
        ],
        hostile=_npy_hostile,
        mutate=mutate_npy,
        largest=1 << 12,
    ),
    Target(
        name="block",
        read=_read_block,
        seeds=lambda: [_block()],
        hostile=_block_hostile,
        mutate=_mutate_block,
        refuses=(BlockError, DataError),
        largest=1 << 12,
    ),
    Target(
        name="sample",
        read=_decode,
        hostile=_decode_hostile,
        refuses=(DataError, TarError),
        oracle=_label_is_digits,
        seeds=lambda: [_SEPARATED.join((b"2", "é".encode(), _npy(np.ones(_LATENT, t)))) for t in ("<f2", "<f4", ">f8")],
        largest=1 << 11,
        words=(_SEPARATED,),
    ),
    Target(
        name="index",
        read=_read_index,
        seeds=lambda: [_index()],
        hostile=lambda: json_hostile(_index()),
        mutate=mutate_json,
        refuses=(DataError,),
        oracle=_counts_are_those_stated,
        largest=1 << 13,
    ),
    Target(
        name="manifest",
        read=_read_manifest,
        seeds=lambda: [_manifest()],
        hostile=lambda: json_hostile(_manifest()),
        mutate=mutate_json,
        refuses=(DataError,),
        oracle=_same_manifest,
        largest=1 << 13,
    ),
    Target(
        name="idx",
        read=_read_idx,
        hostile=_idx_hostile,
        refuses=(ValueError, OSError),
        oracle=_idx_bytes,
        seeds=lambda: [_idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)), gzip.compress(_idx(np.ones(9, np.uint8)))],
        largest=1 << 11,
    ),
)
