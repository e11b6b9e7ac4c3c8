"""Pickle's stack machine, of protocols 0 to 5, that computes with data alone.

Python's own machine imports and calls what the file names. torch's (`weights_only=True`) calls fewer names, refuses the
others, and knows protocol 2 alone, while trainers' files name whatever their program held. This one puts a `Named` in
the place of each name and a `Shell` in the place of each object (`values.py`).

A file of a few bytes can describe objects without end. So every object is charged to a `Budget`, which grows with the
length of the file, and nothing is hashed or walked whose size is not known.
"""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from msdiff_dist.convert.pickles.values import CALLS, Named, PickleError, Shell, call, key_of, new

_LONG = 1 << 16  # bytes from which on a string of bytes stays in the file
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as Python 2 called them


class Budget:
    """Bytes of memory that objects of one file may still take, roughly counted.

    Args:
        length: of the file.
    """

    def __init__(self, length: int) -> None:
        self.left = (96 << 20) + 2 * length

    def charge(self, nbytes: int) -> None:
        """Count the bytes of an object.

        Raises:
            PickleError: they are too many.
        """
        self.left -= nbytes
        if self.left < 0:
            raise PickleError("it holds more objects than a file of its length may")


class Machine:
    """Reads one pickle.

    Args:
        data: memory that holds it.
        start: of the pickle.
        end: of the memory that it may take.
        budget: of memory.
        persistent: gives what stands for a persistent id: torch's files name storages so.
        known: calls that give more than a shell.

    Attributes:
        at: after `load`, the place behind the pickle.
    """

    def __init__(
        self,
        data: memoryview,
        start: int,
        end: int,
        budget: Budget,
        persistent: Callable[[Any], Any],
        known: Mapping[str, Callable[..., Any]] = CALLS,
    ) -> None:
        self._view, self.at, self._end = data, start, end
        self._budget, self._persistent, self._known = budget, persistent, known
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The content.

        Raises:
            PickleError: it is no pickle, is cut short, or holds too much.
        """
        operations = _OPERATIONS
        charge = self._budget.charge
        try:
            while self.at < self._end:
                operation = operations[self._view[self.at]]
                self.at += 1
                if operation is None:
                    return self._stack.pop()
                charge(40)
                operation(self)
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, struct.error) as e:
            # Text of the file in an exception's message may be of any length.
            raise PickleError(f"{type(e).__name__}: {str(e)[:100]}") from None
        raise PickleError("it is cut short")

    # Reading

    def _take(self, count: int) -> memoryview:
        if count < 0 or self.at + count > self._end:
            raise PickleError("it is cut short")
        self.at += count
        return self._view[self.at - count : self.at]

    def _number(self, form: str) -> int:
        out: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return out

    def _line(self) -> bytes:
        length = 64
        while (stop := bytes(self._view[self.at : min(self.at + length, self._end)]).find(b"\n")) < 0:
            if self.at + length >= self._end:
                raise PickleError("it is cut short")
            length *= 4
        self._budget.charge(stop)
        return bytes(self._take(stop + 1)[:-1])

    def _text(self, count: int) -> str:
        self._budget.charge(count)
        return str(self._take(count), "utf-8", "surrogatepass")

    def _bytes(self, count: int) -> bytes | memoryview:
        """Bytes of the file, without a copy where they are many: an array's numbers, for example."""
        taken = self._take(count)
        if count >= _LONG:
            return taken
        self._budget.charge(count)
        return bytes(taken)

    def _old_text(self, count: int) -> str | bytes:
        """A string of Python 2, which may have meant either."""
        raw = bytes(self._take(count))
        self._budget.charge(2 * count)
        return _decoded(raw)

    # The stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self) -> None:
        self._budget.charge(100)
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise PickleError("its stack is empty")
        self._budget.charge(40 + 8 * count)
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _put(self, place: int) -> None:
        self._budget.charge(60)
        self._memo[place] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    # Containers

    def _made(self, value: Any) -> None:
        """Push a container or an object."""
        self._budget.charge(400 if isinstance(value, Shell) else 1000 if isinstance(value, Tensor) else 200)
        self._stack.append(value)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Shell):
            target = target.items
        if type(target) is not list:
            raise PickleError("it appends to what is no list")
        self._budget.charge(8 * len(items))
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Shell):
            target = target.entries
        if type(target) is not dict or len(items) % 2:
            raise PickleError("it sets items of what is no dict")
        self._budget.charge(100 * len(items))
        target.update({key_of(items[i]): items[i + 1] for i in range(0, len(items), 2)})

    def _dict(self, items: list[Any]) -> None:
        self._made({})
        self._set(items)

    def _frozenset(self) -> None:
        items = self._pop_mark()
        self._made(Shell("builtins.frozenset"))
        self._extend(items)

    # Objects

    def _named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > 1000:
            raise PickleError("a name is none")
        self._budget.charge(len(module) + len(name))
        self._push(Named(f"{_OLD_MODULES.get(module, module)}.{name}"))

    def _global(self) -> None:
        self._named(self._line().decode(), self._line().decode())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._named(module, name)

    def _charge_copies(self, args: Any) -> None:
        """Count what a call copies of its arguments; the same ones may be named again and again."""
        for value in args if isinstance(args, tuple) else ():
            if isinstance(value, dict | list | tuple):
                self._budget.charge(100 * len(value))
            elif isinstance(value, str | bytes):
                self._budget.charge(len(value))

    def _reduce(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._charge_copies(args)
        self._made(call(function, args, self._known))

    def _new(self) -> None:
        args, kind = self._stack.pop(), self._stack.pop()
        self._made(new(kind, args))

    def _new_with_keywords(self) -> None:
        self._stack.pop()
        self._new()

    def _object(self) -> None:
        kind, *args = self._pop_mark()
        self._made(new(kind, tuple(args)))

    def _instance(self) -> None:
        self._global()
        kind = self._stack.pop()
        self._made(new(kind, tuple(self._pop_mark())))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Shell):
            self._charge_copies(state if isinstance(state, tuple) else (state,))
            target.build(state)
        elif isinstance(target, Named):
            raise PickleError(f"it changes {target.name[:100]}")
        # Attributes of a dict or tensor are no weights: a state dict's `_metadata`, for example.

    def _persistent_id(self) -> None:
        self._push(self._persistent(self._stack.pop()))


def _decoded(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _int_line(line: bytes) -> int:
    return line == b"01" if line in (b"00", b"01") else int(line)


def _refused(machine: Machine) -> None:
    raise PickleError("it uses buffers or codes outside the file")


def _unknown(machine: Machine) -> None:
    raise PickleError(f"it has an unknown operation at byte {machine.at - 1}")


_OPERATIONS: list[Callable[[Machine], None] | None] = [_unknown] * 256
_STEPS: dict[bytes, Callable[[Machine], Any] | None] = {
    pickle.STOP: None,
    pickle.PROTO: lambda m: m._take(1),
    pickle.FRAME: lambda m: m._take(8),
    pickle.NONE: lambda m: m._push(None),
    pickle.NEWTRUE: lambda m: m._push(True),
    pickle.NEWFALSE: lambda m: m._push(False),
    pickle.INT: lambda m: m._push(_int_line(m._line())),
    pickle.LONG: lambda m: m._push(int(m._line().rstrip(b"L"))),
    pickle.FLOAT: lambda m: m._push(float(m._line())),
    pickle.BININT: lambda m: m._push(m._number("<i")),
    pickle.BININT1: lambda m: m._push(m._number("<B")),
    pickle.BININT2: lambda m: m._push(m._number("<H")),
    pickle.BINFLOAT: lambda m: m._push(m._number(">d")),
    pickle.LONG1: lambda m: m._push(int.from_bytes(m._bytes(m._number("<B")), "little", signed=True)),
    pickle.LONG4: lambda m: m._push(int.from_bytes(m._bytes(m._number("<i")), "little", signed=True)),
    pickle.STRING: lambda m: m._push(_decoded(codecs.escape_decode(m._line().strip()[1:-1])[0])),
    pickle.BINSTRING: lambda m: m._push(m._old_text(m._number("<i"))),
    pickle.SHORT_BINSTRING: lambda m: m._push(m._old_text(m._number("<B"))),
    pickle.UNICODE: lambda m: m._push(str(m._line(), "raw-unicode-escape")),
    pickle.BINUNICODE: lambda m: m._push(m._text(m._number("<I"))),
    pickle.SHORT_BINUNICODE: lambda m: m._push(m._text(m._number("<B"))),
    pickle.BINUNICODE8: lambda m: m._push(m._text(m._number("<Q"))),
    pickle.BINBYTES: lambda m: m._push(m._bytes(m._number("<I"))),
    pickle.SHORT_BINBYTES: lambda m: m._push(m._bytes(m._number("<B"))),
    pickle.BINBYTES8: lambda m: m._push(m._bytes(m._number("<Q"))),
    pickle.BYTEARRAY8: lambda m: m._push(m._bytes(m._number("<Q"))),
    pickle.EMPTY_TUPLE: lambda m: m._push(()),
    pickle.TUPLE1: lambda m: m._tuple(1),
    pickle.TUPLE2: lambda m: m._tuple(2),
    pickle.TUPLE3: lambda m: m._tuple(3),
    pickle.TUPLE: lambda m: m._made(tuple(m._pop_mark())),
    pickle.EMPTY_LIST: lambda m: m._made([]),
    pickle.LIST: lambda m: m._made(m._pop_mark()),
    pickle.EMPTY_DICT: lambda m: m._made({}),
    pickle.DICT: lambda m: m._dict(m._pop_mark()),
    pickle.EMPTY_SET: lambda m: m._made(Shell("builtins.set")),
    pickle.FROZENSET: Machine._frozenset,
    pickle.APPEND: lambda m: m._extend([m._stack.pop()]),
    pickle.APPENDS: lambda m: m._extend(m._pop_mark()),
    pickle.ADDITEMS: lambda m: m._extend(m._pop_mark()),
    pickle.SETITEM: lambda m: m._set([m._stack.pop(), m._stack.pop()][::-1]),
    pickle.SETITEMS: lambda m: m._set(m._pop_mark()),
    pickle.MARK: Machine._mark,
    pickle.POP: Machine._pop,
    pickle.POP_MARK: Machine._pop_mark,
    pickle.DUP: lambda m: m._push(m._stack[-1]),
    pickle.GET: lambda m: m._get(int(m._line())),
    pickle.BINGET: lambda m: m._get(m._number("<B")),
    pickle.LONG_BINGET: lambda m: m._get(m._number("<I")),
    pickle.PUT: lambda m: m._put(int(m._line())),
    pickle.BINPUT: lambda m: m._put(m._number("<B")),
    pickle.LONG_BINPUT: lambda m: m._put(m._number("<I")),
    pickle.MEMOIZE: lambda m: m._put(len(m._memo)),
    pickle.GLOBAL: Machine._global,
    pickle.STACK_GLOBAL: Machine._stack_global,
    pickle.REDUCE: Machine._reduce,
    pickle.NEWOBJ: Machine._new,
    pickle.NEWOBJ_EX: Machine._new_with_keywords,
    pickle.OBJ: Machine._object,
    pickle.INST: Machine._instance,
    pickle.BUILD: Machine._build,
    pickle.PERSID: lambda m: m._push(m._persistent(m._line().decode())),
    pickle.BINPERSID: Machine._persistent_id,
    pickle.EXT1: _refused,
    pickle.EXT2: _refused,
    pickle.EXT4: _refused,
    pickle.NEXT_BUFFER: _refused,
    pickle.READONLY_BUFFER: _refused,
}
for _code, _step in _STEPS.items():
    _OPERATIONS[_code[0]] = _step
