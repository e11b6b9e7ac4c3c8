"""Pickles are read as data in every protocol; what they name is not called, and small files take little memory."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import functools
import os
import pathlib
import pickle
import struct
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from msdiff_dist.convert.pickles.machine import Budget, Machine
from msdiff_dist.convert.pickles.values import HarmError, Named, PickleError, Shell, tensor_of


class Colour(enum.Enum):
    """A trainer's enum."""

    RED = 1


class AttrDict(dict[str, Any]):
    """As of easydict and Lightning."""


class Slots:
    """An object without a dict."""

    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]


class Warmup:
    """A schedule as LDM has them, whose bound method is stored."""

    def __init__(self) -> None:
        self.cycles = np.cumsum([0, 10])

    def schedule(self, step: int) -> float:
        return float(self.cycles[-1] + step)


class Runs:
    """Calls a function when unpickled by a careless reader."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def no_ids(pid: Any) -> Any:
    raise PickleError("a persistent id")


def read(data: bytes) -> Any:
    return Machine(memoryview(data), 0, len(data), Budget(len(data)), no_ids).load()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_equal_in_every_protocol(protocol: int) -> None:
    value = {
        "none": None, "flags": [True, False], "ints": [0, 1, 255, 256, 70000, -5, 2**40, -(2**40), 10**40],
        "floats": [0.5, -1e300], "text": ["", "ä\n€", "x" * 300], "bytes": [b"", b"\x00\xff", b"y" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "deep": {"a": {1: [{"b": ()}]}},
    }  # fmt: skip
    found = read(pickle.dumps(value, protocol=protocol))
    assert found == value
    assert [type(n) for n in found["flags"]] == [bool, bool]


@pytest.mark.parametrize("protocol", range(6))
def test_values_that_are_named_more_than_once_stay_one(protocol: int) -> None:
    shared = [1]
    loop: list[Any] = [shared, shared]
    loop.append(loop)
    found = read(pickle.dumps(loop, protocol=protocol))
    assert found[0] is found[1]
    assert found[2] is found


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_arrays_and_scalars(protocol: int) -> None:
    arrays = [
        np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3)[::2],
               np.arange(4, dtype=">i4"), np.float16([1.5]), np.array(True), np.zeros((0, 3)),
        np.random.default_rng(0).normal(size=20000),
    ]  # fmt: skip
    value = {"arrays": arrays, "scalars": [np.float64(2.5), np.int32(-7), np.bool_(True)], "type": np.dtype("f4")}
    found = read(pickle.dumps(value, protocol=protocol))
    for mine, theirs in zip(found["arrays"], arrays, strict=True):
        tensor = tensor_of(mine)
        assert tensor is not None
        assert tuple(tensor.shape) == theirs.shape
        assert np.array_equal(tensor.numpy(), theirs)
    assert found["scalars"] == [2.5, -7, True]
    assert tensor_of(read(pickle.dumps(np.array([{}, None], dtype=object), protocol=protocol))) is None


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "value",
    [
        Colour.RED, AttrDict(a=1), Slots(), Warmup().schedule, np.random.get_state, np.random.default_rng(0),
        pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("c:/a"), argparse.Namespace(lr=1),
        types.SimpleNamespace(x=2),
        functools.partial(int, base=2), datetime.datetime(2026, 1, 2), datetime.timedelta(1), {1, 2}, frozenset([3]),
        range(3), collections.deque([1]), torch.float16, torch.device("cuda", 0), torch.optim.AdamW,
        os.environ.__class__, complex(1, 2), OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}"}), slice(1, 2), int,
        type(None), ..., NotImplemented,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_objects_become_shells_and_nothing_is_called(value: Any, protocol: int) -> None:
    found = read(pickle.dumps({"before": 1, "it": value, "after": 2}, protocol=protocol))
    assert (found["before"], found["after"]) == (1, 2)
    assert isinstance(found["it"], Shell | Named)


def test_shells_keep_what_was_stored() -> None:
    assert read(pickle.dumps(argparse.Namespace(lr=0.1, name="x"))).fields == {"lr": 0.1, "name": "x"}
    assert read(pickle.dumps(AttrDict(a=[1]))).entries == {"a": [1]}
    assert read(pickle.dumps(Slots())).fields == {"a": 1, "b": [2]}
    assert sorted(read(pickle.dumps({3, 4}, protocol=4)).items) == [3, 4]
    assert read(pickle.dumps(Colour.RED)).args == (1,)
    bound = read(pickle.dumps(Warmup().schedule))
    assert (bound.name, bound.args[1]) == ("builtins.getattr", "schedule")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_mappings_of_the_library_are_dicts(protocol: int) -> None:
    value = [
        collections.OrderedDict(a=1, b=2), collections.defaultdict(list, {"k": [1]}), collections.Counter("aab"),
        torch.Size([2, 3]),
    ]  # fmt: skip
    assert read(pickle.dumps(value, protocol=protocol)) == [{"a": 1, "b": 2}, {"k": [1]}, {"a": 2, "b": 1}, (2, 3)]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "subprocess.run", "shutil.rmtree"])
def test_calls_that_would_do_harm_are_named_and_not_made(tmp_path: Path, name: str, protocol: int) -> None:
    module, _, function = name.rpartition(".")
    target = tmp_path / "ran"
    called = getattr(__import__(module), function)
    code = f"open({str(target)!r}, 'w')" if module == "builtins" else f"touch {target}"
    data = pickle.dumps({"a": Runs(called, code)}, protocol=protocol)
    with pytest.raises(HarmError, match=function):
        read(data)
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x81.",  # NEWOBJ
        b"(X\x01\x00\x00\x00aios\nsystem\n.",  # INST
        b"(cos\nsystem\nX\x01\x00\x00\x00ao.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93X\x01\x00\x00\x00a\x85}\x92.",  # NEWOBJ_EX
        b"\x80\x02ccopyreg\n__newobj__\ncos\nsystem\nX\x01\x00\x00\x00a\x86R.",
        b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x06\x00\x00\x00system\x86RX\x01\x00\x00\x00a\x85R.",  # a method
        b"\x80\x02cos\nsystem\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",  # BUILD
        b"\x80\x02cbuiltins\nmap\ncos\nsystem\n]X\x01\x00\x00\x00aa\x86R.",
    ],
    ids=["NEWOBJ", "INST", "OBJ", "NEWOBJ_EX", "__newobj__", "getattr", "BUILD", "map"],
)
def test_other_ways_to_call_give_shells_or_an_error(data: bytes) -> None:
    with contextlib.suppress(PickleError):
        assert isinstance(read(data), Shell)


def test_nothing_of_the_running_program_is_changed() -> None:
    # BUILD sets attributes of what is on the stack: here of a class, and of a function that this package calls.
    for name in ("collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2"):
        data = b"\x80\x02c" + name.encode() + b"\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b."
        with pytest.raises(PickleError, match="changes"):
            read(data)


MANY = 1 << 17
SMALL = 4 << 20  # bytes of memory, in place of the 96 MiB and more that files may take


@pytest.mark.parametrize(
    "data",
    [
        b"(" + b"}" * MANY + b"l.",
        b"(" + b"\x8f" * MANY + b"l.",
        b"(" * MANY,
        b"N" + b"\x94" * MANY + b".",
        b")" + b"\x85" * MANY + b".",
        b"ca\nb\n\x94(" + b"h\x00)R" * (MANY // 4) + b"l.",
        b"X\x90\x01\x00\x00" + b"a" * 400 + b"\x940(" + b"h\x00h\x00\x93" * (MANY // 4) + b"l.",
        b"X\x00\x00\x01\x00" + b"a" * (1 << 16) + b"X\x06\x00\x00\x00latin1\x86\x94c_codecs\nencode\n\x94("
        + b"h\x01h\x00R" * 500 + b"l.",
        b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(5000)) + b"u\x85\x94"
        + b"ccollections\nCounter\n\x94("
        + b"h\x01h\x00R" * 10000 + b"l.",
    ],
    ids=["dicts", "sets", "marks", "memo", "tuples", "objects", "names", "copies of text", "copies of dicts"],
)  # fmt: skip
def test_files_that_would_fill_the_memory_are_refused(data: bytes) -> None:
    budget = Budget(0)
    assert budget.left < 128 << 20
    budget.left = SMALL
    tracemalloc.start()
    try:
        with pytest.raises(PickleError, match="more objects"):
            Machine(memoryview(data), 0, len(data), budget, no_ids).load()
        assert tracemalloc.get_traced_memory()[1] < 2.5 * SMALL
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x8e" + struct.pack("<Q", 1 << 42) + b"x", "cut short"),
        (b"\x8d" + struct.pack("<Q", 1 << 42) + b"x", "more objects|cut short"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 50), "cut short"),
        (b"\x8b\xff\xff\xff\x7fx.", "cut short"),
        (b"\x8b\xff\xff\xff\xffx.", "cut short"),
        (b"", "cut short"),
        (b".", "IndexError"),
        (b"\xff", "unknown operation at byte 0"),
        (b"NR.", "IndexError"),
        (b"h\x05.", "KeyError"),
        (b"K\x01K\x02R.", "without arguments"),
        (b"K\x01K\x02a.", "no list"),
        (b"K\x01K\x02K\x03s.", "no dict"),
        (b"I" + b"9" * 5000 + b"\n.", "ValueError"),
        (b"\x97.", "outside the file"),
    ],
)
def test_pickles_that_are_none(data: bytes, match: str) -> None:
    with pytest.raises(PickleError, match=match):
        read(data)


def test_an_array_larger_than_its_bytes() -> None:
    state = pickle.dumps(np.zeros(3), protocol=4).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
    with pytest.raises(PickleError, match="stored in 24 bytes"):
        read(state)


def test_hashes_and_depth_take_no_time() -> None:
    # A tuple of itself twice, a thousand times over: its hash would never end, and neither would a walk through it.
    doubled = b")" + b"2\x86" * 1000 + b"\x940}h\x00K\x01s."
    (key,) = read(doubled)
    assert isinstance(key, Shell)
    deep = read(b"]" * 100000 + b"a" * 99999 + b".")
    assert isinstance(deep, list)
