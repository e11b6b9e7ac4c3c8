"""What stands for the content of a pickle: plain values, tensors mapped from the file, and shells for all else.

Pickles say "call this function with these arguments". The few functions that make tensors, arrays and plain containers
have counterparts here, which check their arguments. Every other call gives a `Shell`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMBERS = re.compile(r"[biufc]\d{1,2}")  # numpy's names of types of numbers
_MOST_EXPANDED = 1 << 20  # elements of a tensor that repeats its storage (stride 0)


class PickleError(Exception):
    """A pickle cannot be read as data; the text says why."""


class HarmError(PickleError):
    """A pickle asks for a call that no checkpoint needs; the text is the function's name."""


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names. It is not looked up."""

    name: str


class Shell:
    """Stands for an object whose class or function a pickle names. It keeps what was stored and does nothing.

    Attributes:
        name: the class or function, with its module.
        args: arguments that it was to be called with.
        fields: the object's attributes, by name.
        entries: the items of a mapping.
        items: the items of a list or set.
    """

    __slots__ = ("args", "entries", "fields", "items", "name")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args
        self.fields: dict[str, Any] = {}
        self.entries: dict[Any, Any] = {}
        self.items: list[Any] = []

    def build(self, state: Any) -> None:
        """Take the object's state, as `__setstate__` would."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):  # attributes, and those in slots
            for part in parts:
                self.fields.update({k: v for k, v in (part or {}).items() if isinstance(k, str)})
        else:
            self.fields["state"] = state


class NumberType(Shell):
    """A numpy dtype."""

    __slots__ = ("order",)

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__("numpy.dtype", args)
        self.order = "="

    def build(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def dtype(self) -> np.dtype[Any] | None:
        """The type, None if it is none of numbers."""
        name = self.args[0] if self.args else None
        if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
            return None
        try:
            return np.dtype(self.order + name)
        except TypeError:
            return None


class Array(Shell):
    """A numpy array. `data` is None until its state has come, and for arrays of other things than numbers."""

    __slots__ = ("data",)

    def __init__(self) -> None:
        super().__init__("numpy.ndarray")
        self.data: np.ndarray[Any, Any] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise PickleError("an array's state is none")
        shape, number, fortran, raw = state[-4:]
        if isinstance(number, NumberType) and isinstance(raw, bytes | memoryview | str):
            self.data = _array(raw, number, shape, bool(fortran))


@dataclass(frozen=True)
class Storage:
    """Numbers in the file that tensors are views of.

    Attributes:
        dtype: type of an element.
        memory: the mapped file; None while the places of storages are not known.
        start: of the first byte.
        nbytes: of all elements.
    """

    dtype: torch.dtype
    memory: memoryview | None
    start: int
    nbytes: int


_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
}  # fmt: skip


def storage_type(kind: Any) -> torch.dtype:
    """Type of the elements of a storage of the class `kind`.

    Raises:
        PickleError: there is no such class, or its elements are quantised.
    """
    name = kind.name if isinstance(kind, Named) else ""
    found = _STORAGES.get(name.rpartition(".")[2]) if name.startswith("torch.") else None
    if found is None:
        raise PickleError(f"{name or 'a value'} is no storage of numbers")
    return found


def size(value: Any, what: str) -> int:
    """`value`, which must be a whole number from 0.

    Raises:
        PickleError: it is not.
    """
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise PickleError(f"the {what} is no size")
    return value


def _array(raw: Any, number: NumberType, shape: Any, fortran: bool) -> np.ndarray[Any, Any] | None:
    """The array of these bytes, mapped; None if its elements are no numbers."""
    dtype = number.dtype()
    if dtype is None:
        return None
    sizes = [size(n, "shape of an array") for n in shape] if isinstance(shape, tuple | list) else [size(shape, "shape")]
    data = raw.encode() if isinstance(raw, str) else raw
    if math.prod(sizes) * dtype.itemsize != len(data) or len(sizes) > 32:
        raise PickleError(f"an array of shape {sizes[:8]} and type {dtype} is stored in {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(sizes, order="F" if fortran else "C")


def _frombuffer(*args: Any) -> Any:
    """`numpy._core.numeric._frombuffer(bytes, dtype, shape, order)`."""
    out = Array()
    if len(args) == 4 and isinstance(args[1], NumberType) and isinstance(args[0], bytes | memoryview):
        out.data = _array(args[0], args[1], args[2], args[3] == "F")
    return out


def _scalar(*args: Any) -> Any:
    """`numpy.core.multiarray.scalar(dtype, bytes)`: a Python number."""
    dtype = args[0].dtype() if len(args) == 2 and isinstance(args[0], NumberType) else None
    raw = args[1].encode("latin-1") if len(args) == 2 and isinstance(args[1], str) else args[-1] if args else None
    if dtype is None or not isinstance(raw, bytes | memoryview) or len(raw) != dtype.itemsize:
        return Shell("numpy.scalar", args)
    return np.frombuffer(raw, dtype)[0].item()


def _tensor(*args: Any) -> Any:
    """`torch._utils._rebuild_tensor(storage, offset, size, stride, ...)` and its later versions."""
    if len(args) < 4 or not isinstance(args[0], Storage):
        raise PickleError("a tensor is made of no storage")
    storage, offset = args[0], size(args[1], "offset of a tensor")
    if not all(isinstance(part, tuple | list) and len(part) <= 64 for part in args[2:4]):
        raise PickleError("a tensor has no shape")
    shape = [size(n, "shape of a tensor") for n in args[2]]
    stride = [size(n, "stride of a tensor") for n in args[3]]
    dtype = args[6] if len(args) > 6 and isinstance(args[6], torch.dtype) else storage.dtype
    if len(args) > 6 and isinstance(args[6], Named):
        named = getattr(torch, args[6].name.removeprefix("torch."), None)
        if not args[6].name.startswith("torch.") or not isinstance(named, torch.dtype):
            raise PickleError(f"{args[6].name} is no type of numbers")
        dtype = named
    if storage.memory is None:
        return Shell("torch.Tensor")
    numel, count = math.prod(shape), storage.nbytes // dtype.itemsize
    if numel > max(count, _MOST_EXPANDED) or (numel and offset >= count) or len(shape) != len(stride):
        raise PickleError(f"a tensor of shape {shape[:8]} is stored in {storage.nbytes} bytes")
    if numel == 0:
        return torch.empty(shape if all(n < 1 << 40 for n in shape) else 0, dtype=dtype)
    flat = torch.frombuffer(storage.memory, dtype=dtype, count=count, offset=storage.start)
    return flat.as_strided(shape, stride, offset)  # checks that the last element is inside


def _first(*args: Any) -> Any:
    """Of `_rebuild_parameter(data, requires_grad, hooks)` and the like: the data."""
    return args[0] if args and isinstance(args[0], Tensor) else Shell("torch.Tensor", args)


def _from_numpy(*args: Any) -> Any:
    """`torch._utils._rebuild_device_tensor_from_numpy(array, dtype, device, requires_grad)`."""
    found = tensor_of(args[0]) if args else None
    return Shell("torch.Tensor", args) if found is None else found


def _mapping(*args: Any) -> dict[Any, Any]:
    """`OrderedDict(pairs)`, `Counter(mapping)`, `defaultdict(factory)`, `dict(...)`: a dict."""
    given = args[-1] if args else None
    if isinstance(given, dict):
        return dict(given)
    pairs = given if isinstance(given, list | tuple) else []
    return {key_of(p[0]): p[1] for p in pairs if isinstance(p, list | tuple) and len(p) == 2}


def _bytes(*args: Any) -> Any:
    """`bytes(data)`, `bytearray(data)`, `bytearray(text, encoding)`, `_codecs.encode(text, encoding)`."""
    if args and isinstance(args[0], bytes | memoryview):
        return args[0]
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        return args[0].encode(args[1])
    return b"" if not args else Shell("builtins.bytes", args)


def _sequence(name: str) -> Callable[..., Any]:
    """For `set(items)` and the like: a shell with the items."""

    def make(*args: Any) -> Shell:
        out = Shell(name)
        if len(args) == 1 and isinstance(args[0], list | tuple):
            out.items.extend(args[0])
        return out

    return make


def _shape(*args: Any) -> Any:
    """`torch.Size(sizes)`."""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else Shell("torch.Size", args)


def _reconstructor(*args: Any) -> Any:
    """`copyreg._reconstructor(class, base, state)`, of old protocols: an object, perhaps of a subclass of `base`."""
    if not args or not isinstance(args[0], Named):
        raise PickleError("an object has no class")
    out = new(args[0], ())
    if isinstance(out, Shell) and len(args) == 3:
        if isinstance(args[2], dict):
            out.entries.update(args[2])
        elif isinstance(args[2], list | tuple):
            out.items.extend(args[2])
    return out


_MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
CALLS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(_MAPPINGS, _mapping),
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray", "_codecs.encode"), _bytes),
    **{name: _sequence(name) for name in ("builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple")},
    **{f"torch._utils._rebuild_{name}": _tensor for name in ("tensor", "tensor_v2", "tensor_v3")},
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _from_numpy,
    "torch._tensor._rebuild_from_type_v2": lambda *args: call(args[0], args[2]) if len(args) == 4 else Shell("", args),
    "torch.nn.parameter.Parameter": _first,
    "torch.Size": _shape,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": lambda *args: new(args[0], args[1:]) if args else Shell(""),
    "copyreg.__newobj_ex__": lambda *args: new(args[0], args[1]) if len(args) == 3 else Shell("", args),
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray._reconstruct", lambda *args: Array()),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
    "numpy.dtype": lambda *args: NumberType(args),
}
"""The calls that pickles ask for and that give more than a shell. None of them runs code of the file."""


# Functions by which files take over programs that open them. A trainer's objects name others.
_HARM = re.compile(
    r"builtins\.(eval|exec|compile|__import__|open|breakpoint)|(os|posix|nt)\.(system|popen|exec\w*|spawn\w*|fork\w*|remove|"
    r"unlink|rmdir|removedirs|putenv|kill)|(subprocess|commands|shutil|socket|pty|runpy|ctypes|importlib|webbrowser|urllib)\..*"
)


def call(function: Any, args: Any, known: Mapping[str, Callable[..., Any]] = CALLS) -> Any:
    """What stands for the result of a call.

    Raises:
        PickleError: the arguments are none that the function takes.
        HarmError: the function would do harm.
    """
    if not isinstance(args, tuple):
        raise PickleError("a function is called without arguments")
    if not isinstance(function, Named):
        return Shell("the result of another call", args)
    if _HARM.fullmatch(function.name):
        raise HarmError(function.name)
    maker = known.get(function.name)
    return Shell(function.name, args) if maker is None else maker(*args)


def new(kind: Any, args: Any) -> Any:
    """What stands for a new object of a class.

    Raises:
        PickleError: there is no class.
    """
    if not isinstance(kind, Named) or not isinstance(args, tuple):
        raise PickleError("an object has no class")
    if kind.name in _MAPPINGS:
        return {}
    return call(kind, args) if kind.name in ("torch.nn.parameter.Parameter", "torch.Size") else Shell(kind.name, args)


def key_of(value: Any) -> Any:
    """`value` as a key of a dict, or a shell in its place where its hash could take long to compute."""
    kind = type(value)
    if kind in (str, float, bool, Named, bytes) or value is None or isinstance(value, Shell):
        return value
    if kind is int and -(1 << 60) < value < 1 << 60:
        return value
    if kind is tuple and len(value) < 64 and all(type(v) in (str, int, float, bool) for v in value):
        return value
    return Shell("a key", (value,))


def tensor_of(value: Any) -> Tensor | None:
    """The tensor that a value is or that a numpy array is equal to; None if it is neither."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, Array) or value.data is None:
        return None
    data = value.data.astype(value.data.dtype.newbyteorder("="), copy=not value.data.flags.writeable)
    try:
        return torch.from_numpy(data)
    except TypeError:  # a type of numbers that torch does not have
        return None


def items_of(value: Any) -> Mapping[Any, Any] | None:
    """The items of a dict, of an object of a subclass of dict, or the attributes of another object; else None."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Shell):
        return value.entries or value.fields
    return None
