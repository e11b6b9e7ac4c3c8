"""Changes of inputs: of any bytes, and of formats whose lengths and checksums must hold to get past the first check."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

_HUGE, _DEEP = "@a number of 5000 digits@", "@3000 lists@"
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    2**31,
    2**63,
    2**64,
    10**30,
    _HUGE,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "1",
    "a",
    "x" * 300,
    "../../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "\ufeff",
    "é",
    "${oc.env:HOME}",
    "${a.b}",
    [],
    {},
    [[]],
    [None],
    [1, 2],
    {"a": {"b": 1}},
    [1, [2, [3, [4]]]],
    _DEEP,
)
"""What may stand in the place of any value of JSON or YAML."""
_NUMBERS = (b"0", b"-1", b"1", b"255", b"65536", b"2147483648", b"9223372036854775808", b"1e999", b"nan", b"9" * 5000)
_BYTES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\xef\xbb\xbf",
    b"\n",
)


def mutate_bytes(rng: random.Random, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """One to four changes: bits, bytes, numbers in text, words of the format; pieces removed, repeated or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 512))
        match rng.randrange(9):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                out[at : at + length] = b""
            case 3:
                out[at:at] = out[at : at + length]
            case 4:
                start = rng.randrange(len(out) + 1)
                out[at : at + length] = out[start : start + length]
            case 5:
                piece = rng.choice(_BYTES)
                out[at : at + len(piece)] = piece
            case 6 if words:
                word = rng.choice(words)
                out[at : at + rng.choice((0, 0, len(word)))] = word
            case 7:
                numbers = list(re.finditer(rb"\d+", out))
                if numbers:
                    found = rng.choice(numbers)
                    out[found.start() : found.end()] = rng.choice(_NUMBERS)
            case _:
                del out[at:]
    return bytes(out)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """A value is replaced, removed, repeated or renamed; what is no JSON is changed byte by byte."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = _changed(rng, tree)
    try:
        return _dumped(tree, rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)


def _dumped(tree: Any, ascii_only: bool) -> str:
    text = json.dumps(tree, ensure_ascii=ascii_only)
    return text.replace(json.dumps(_HUGE), "9" * 5000).replace(json.dumps(_DEEP), "[" * 3000 + "]" * 3000)


def _changed(rng: random.Random, tree: Any) -> Any:
    """The tree with one of its nodes changed; most often one far from the root."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.85:
        tree = copy.copy(tree)
        key: Any = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        choice = rng.random()
        if choice < 0.7:
            tree[key] = _changed(rng, tree[key])
        elif choice < 0.8:
            del tree[key]
        elif isinstance(tree, list):
            tree += tree[key : key + 1] * rng.choice((1, 2, 100))
        elif choice < 0.9:
            tree[rng.choice(("", "a", "x" * 100, f"{key}x", "__metadata__"))] = tree.pop(key)
        else:
            tree[key] = tree[rng.choice(list(tree))]
        return tree
    if isinstance(tree, bool) or not isinstance(tree, (int, float)) or rng.random() < 0.5:
        return rng.choice(VALUES)
    if abs(tree) > 1e300:  # str and float refuse some
        return -tree
    return rng.choice((tree + 1, tree - 1, -tree, tree * 2, float(tree), str(tree), tree * 1000))


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """For YAML and tables of text: a scalar is replaced, lines are repeated, removed, moved or indented."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(8):
            case 0 | 1 | 2:
                found = list(re.finditer(rb"[^\s:,|\[\]{}]+", lines[i]))
                if found:
                    word = rng.choice(found[-2:])
                    value = _dumped(rng.choice(VALUES), False).encode("utf-8", "surrogatepass")
                    lines[i] = lines[i][: word.start()] + rng.choice((value, *_YAML)) + lines[i][word.end() :]
            case 3:
                lines[i:i] = [lines[i]] * rng.choice((1, 2, 50))
            case 4:
                lines[i], lines[j] = lines[j], lines[i]
            case 5 if len(lines) > 1:
                del lines[i]
            case 6:
                lines[i] = b"  " * rng.randrange(4) + lines[i].strip()
            case _:
                lines[i] = mutate_bytes(rng, lines[i], _YAML)
    return b"\n".join(lines)


_YAML = (
    b"&a",
    b"*a",
    b"<<: *a",
    b"!!int 1_0",
    b"!!float x",
    b"!!timestamp x",
    b"!!binary =",
    b"!!set {a}",
    b"!!omap [a: b]",
    b"2001-99-99",
    b"2001-01-01",
    b"1:60:60",
    b"0x",
    b"0b",
    b".inf",
    b".nan",
    b"~",
    b"yes",
    b"? [a]",
    b"---",
    b"...",
    b"%YAML",
    b"!!python/object:os.system",
    b"| ",
    b"> ",
    b"${",
    b"${a}",
    b"${oc.decode:1}",
    b"'",
    b'"',
    b"[" * 400,
    b"{" * 400,
    b"- ",
)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header is changed as JSON and its length made right; or bytes anywhere are changed."""
    length = int.from_bytes(data[:8], "little")
    if length + 8 > len(data) or rng.random() < 0.2:
        return mutate_bytes(rng, data)
    header = data[8 : 8 + length]
    header = mutate_json(rng, header) if rng.random() < 0.7 else mutate_bytes(rng, header)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_npy(rng: random.Random, data: bytes) -> bytes:
    """The header, a Python literal, is changed and its length made right; or bytes anywhere are changed."""
    if len(data) < 12 or rng.random() < 0.2:
        return mutate_bytes(rng, data)
    wide = data[6] > 1
    size = 4 if wide else 2
    length = int.from_bytes(data[8 : 8 + size], "little")
    header = mutate_bytes(rng, data[8 + size : 8 + size + length], _NPY_WORDS)
    if not wide and len(header) > 65535:
        header = header[:65535]
    return data[:8] + len(header).to_bytes(size, "little") + header + data[8 + size + length :]


_NPY_WORDS = (
    b"'descr': ",
    b"'fortran_order': True",
    b"'shape': (",
    b"'|O'",
    b"'<f4'",
    b"'|S0'",
    b"'<U9'",
    b"'<M8[s]'",
    b"[('a', '<f4')]",
    b"[('a', '|V1000000000')]",
    b"(0,)",
    b"(-1,)",
    b"()",
    b"(99999999999,)",
    b"(True,)",
    b"lambda: 0",
    b"'<f2'",
    b"'>f4'",
    b"'|b1'",
)


def mutate_zip(inside: Mutation) -> Mutation:
    """A mutation of the content of one member of a zip archive, whose checksums are made right."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(rng, data)
        out = io.BytesIO()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
                names = old.namelist()
                changed = rng.choice(names)
                for name in names:
                    content = old.read(name)
                    if name == changed or (name.endswith(".pkl") and rng.random() < 0.7):
                        content = inside(rng, content)
                    packed = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
                    if rng.random() > 0.02:
                        new.writestr(zipfile.ZipInfo(name), content, packed)
        except Exception:  # an archive that earlier mutations broke
            return mutate_bytes(rng, data)
        return out.getvalue()

    return mutate
