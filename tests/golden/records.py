"""The records on disk, and how a record made now is compared with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
RTOL = 1e-5  # of floats; differences of rounding between CPUs stay well below
_NEGLIGIBLE = 1e-12


def load(name: str) -> Any:
    """The record called `name`.

    Raises:
        FileNotFoundError: it was never made; `python -m tests.golden.record` makes it.
    """
    return json.loads((RECORDS / f"{name}.json").read_text())


def save(name: str, record: Any) -> None:
    """Write a record as JSON."""
    (RECORDS / f"{name}.json").write_text(_dump(record, 0) + "\n")


def differences(recorded: Any, now: Any, rtol: float = RTOL, path: str = "") -> list[str]:
    """Every place where two records differ, floats by more than `rtol` relatively and all else at all."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        found = []
        for key in [*recorded, *(k for k in now if k not in recorded)]:
            at = f"{path}.{key}" if path else str(key)
            if key not in recorded or key not in now:
                found.append(f"{at}: only in {'the record' if key in recorded else 'what was made now'}")
            else:
                found += differences(recorded[key], now[key], rtol, at)
        return found
    if isinstance(recorded, list) and isinstance(now, list):
        if len(recorded) != len(now):
            return [f"{path}: {len(recorded)} recorded, now {len(now)}"]
        pairs = enumerate(zip(recorded, now, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, rtol, f"{path}[{i}]")]
    if isinstance(recorded, float) and isinstance(now, float):
        if math.isclose(recorded, now, rel_tol=rtol, abs_tol=_NEGLIGIBLE):
            return []
        return [f"{path}: recorded {recorded!r}, now {now!r} ({abs(now / recorded - 1) if recorded else math.inf:.1e})"]
    return [] if recorded == now else [f"{path}: recorded {recorded!r}, now {now!r}"]


def _dump(value: Any, depth: int) -> str:
    """JSON with a line for each entry; a list of plain values is one line."""
    indent = " " * (depth + 1)
    if isinstance(value, dict):
        entries = [f"{indent}{json.dumps(key)}: {_dump(inner, depth + 1)}" for key, inner in value.items()]
        return "{\n" + ",\n".join(entries) + "\n" + " " * depth + "}"
    if isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        return "[\n" + ",\n".join(indent + _dump(inner, depth + 1) for inner in value) + "\n" + " " * depth + "]"
    return json.dumps(value)
