"""Containers of tensors: numpy's archives, and torch's archives and pickles."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdiff_dist.convert.tensor_sources import TensorSource, open_source
from msdiff_dist.errors import CheckpointError

from ..mutations import mutate_bytes, mutate_npy, mutate_zip
from ..target import DisagreementError, Target

_MOST_READ = 1 << 24  # bytes of a tensor that is read: what is larger is only described


def touch(source: TensorSource) -> Any:
    """What a conversion does with a source: names, types and shapes, then the tensors one by one."""
    metas = {name: source.meta(name) for name in source.names()}
    return {name: source.read(name).clone() for name, meta in metas.items() if meta.nbytes <= _MOST_READ}


def _read_source(suffix: str) -> Any:
    def read(data: bytes, folder: Path) -> Any:
        path = folder / f"x{suffix}"
        path.write_bytes(data)
        return touch(open_source(path))

    return read


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones((2, 3), np.float32), b=np.arange(3))
    return stream.getvalue()


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _array(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _npz_hostile() -> dict[str, bytes]:
    return {
        "bomb": _zip({f"a{i}.npy": _array(np.zeros(1 << 26, np.uint8)) for i in range(2)}),
        "not an array": _zip({"a.npy": b"x", "b.txt": b"y"}),
        "text": _zip({"a.npy": _array(np.array(["a"]))}),
        "complex, and a type that torch lacks": _zip(
            {"a.npy": _array(np.ones(1, np.uint16)), "b.npy": _array(np.ones(1, "M8[s]"))}
        ),
        "big-endian": _zip({"a.npy": _array(np.ones(1, ">f4"))}),
        "LZMA": _zip({"a.npy": _array(np.ones(3))}, zipfile.ZIP_LZMA),
        "name twice": _zip({"a.npy": _array(np.ones(3)), "a": b"x"}),
        "a .npy file": _array(np.ones(3)),
        "pickle": pickle.dumps({"a": 1}),
    }


def _as_numpy(data: bytes, found: Any) -> None:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            theirs = {name: archive[name] for name in found}
    except Exception as e:
        raise DisagreementError(f"numpy refuses: {type(e).__name__} {e}") from e
    if any(not np.array_equal(theirs[n], found[n].numpy(), equal_nan=theirs[n].dtype.kind in "fc") for n in found):
        raise DisagreementError("arrays: not those that numpy reads")


def _torch(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _torch_seeds() -> list[bytes]:
    state = {"a": torch.ones(2, 3), "b": torch.arange(3), "half": torch.ones(2, dtype=torch.bfloat16)}
    nested = {"state_dict": {**state, "view": torch.ones(4, 4).t()[1:]}, "epoch": 3, "hyper": {"lr": [1.5, None, "x"]}}
    return [
        _torch(state),
        _torch(nested),
        _torch(state, _use_new_zipfile_serialization=False),
        _torch({"model": state}),
    ]


def _torch_hostile() -> dict[str, bytes]:
    rewritten = {}
    huge = _torch({"a": torch.ones(3)})
    for name, change in (
        ("storage of many elements", (b"K\x03t", b"\x8a\x08" + (1 << 40).to_bytes(8, "little") + b"t")),
        ("negative sizes", (b"K\x03\x85", b"J\xff\xff\xff\xff\x85")),
        ("deep", (b"}q", b"(" * 50_000 + b"}q")),
        ("memo far away", (b"}q\x00", b"}r\xff\xff\xff\x7f")),
    ):
        with zipfile.ZipFile(io.BytesIO(huge)) as archive:
            members = {n: archive.read(n) for n in archive.namelist()}
        rewritten[name] = _zip(
            {n: c.replace(*change, 1) if n.endswith(".pkl") else c for n, c in members.items()}, zipfile.ZIP_STORED
        )
    return {
        **rewritten,
        "a number": _torch(5), "a list": _torch([1]), "a tensor": _torch(torch.ones(2)), "nothing": _torch({}),
        "names that are no text": _torch({5: torch.ones(1), (1, 2): torch.ones(1)}),
        "sparse": _torch({"a": torch.eye(2).to_sparse()}),
        "zero strides": _torch({"a": torch.ones(1).expand(1 << 20, 1 << 20)}),
        "empty archive": _zip({}), "no pickle": _zip({"a/data/0": b"x"}),
        "a plain pickle": pickle.dumps({"a": [1, 2]}), "empty": b"", "two bytes": b"\x80\x02",
    }  # fmt: skip


def _as_torch(data: bytes, found: Any) -> None:
    """Every tensor that is read here is among those that `torch.load` reads, where it reads the file.

    It refuses pickles with objects of other classes, which are read here without them.
    """
    try:
        theirs = list(_tensors(torch.load(io.BytesIO(data), weights_only=True)))
    except Exception:
        return
    for name, tensor in found.items():
        if not any(_same(their, tensor) for their in theirs):
            raise DisagreementError(f"tensor is not what torch reads: {name} {tensor!r:.300}")


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from _tensors(inner)


def _same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return bool(torch.equal(theirs, ours)) or bool(torch.equal(theirs.isnan(), ours.isnan()))


_PICKLE = (
    *tuple(bytes([c]) for c in b"().]}tq\x85\x86\x87lsuRbcQPNKJMIFGXUTVhjr0123d"),
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nsystem\n",
    b"X\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"cbuiltins\ngetattr\n",
    b"cbuiltins\nbytearray\n",
    b"ctorch\nSize\n",
    b"ctorch\ntensor\n",
    b"ctorch.nn.parameter\nParameter\n",
    b"cnumpy\ndtype\n",
)


def _mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    return mutate_bytes(rng, data, _PICKLE)


TARGETS = (
    Target(
        name="npz",
        read=_read_source(".npz"),
        seeds=lambda: [_npz()],
        hostile=_npz_hostile,
        mutate=mutate_zip(mutate_npy),
        refuses=(CheckpointError,),
        oracle=_as_numpy,
        largest=1 << 12,
    ),
    Target(
        name="torch",
        read=_read_source(".pt"),
        seeds=_torch_seeds,
        hostile=_torch_hostile,
        mutate=mutate_zip(_mutate_pickle),
        refuses=(CheckpointError,),
        oracle=_as_torch,
        words=_PICKLE,
        largest=1 << 13,
    ),
)
