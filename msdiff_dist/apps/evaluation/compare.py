"""`msdiff compare`: the newest evaluations of several runs in one table, where they can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.apps.evaluation.evaluate import RECORDS
from msdiff_dist.errors import DataError
from msdiff_dist.evaluation.scores import METRICS


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A value of one run beside the best of its table.

    Attributes:
        mark: `best`, `noise` (it differs from the best by less than both intervals together), or empty.
    """

    value: float
    low: float
    high: float
    mark: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A table of evaluations that may be compared.

    Attributes:
        title: what they have in common: features, number of images, reference.
        rows: a name for each run, and its values by metric.
    """

    title: str
    metrics: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, Compared]], ...]


def compare(runs: Sequence[Path]) -> list[Comparison]:
    """The newest evaluation of each run for each feature space, number of images, reference and sampler.

    Raises:
        DataError: a run has no evaluations, or a record is corrupt.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for run in runs:
        for record in _records(run):
            # What decides whether numbers compare. The sampler does not: samplers are compared too.
            key: tuple[Any, ...] = (record.get("held_out", {}).get("digest"),)
            if "features" in record:
                about = record["reference"]
                key = (record["features"]["digest"], record["num"], about["key"] or about["name"])
            name = f"{run}{'' if record.get('weights') != 'raw' else ' (raw)'}, step {record.get('step')}"
            groups.setdefault(key, {})[name] = record
    return [_table(group) for group in groups.values()]


def _table(group: dict[str, dict[str, Any]]) -> Comparison:
    first = next(iter(group.values()))
    metrics = tuple(dict.fromkeys(metric for record in group.values() for metric in record["metrics"]))
    rows: dict[str, dict[str, Compared]] = {name: {} for name in group}
    for metric in metrics:
        held = {name: record for name, record in group.items() if metric in record["metrics"]}
        sign = -1 if any(metric in known.higher_is_better for known in METRICS.values()) else 1
        best = min(held, key=lambda name: sign * held[name]["metrics"][metric])
        spread = {name: record["intervals"][metric][1] - record["metrics"][metric] for name, record in held.items()}
        for name, record in held.items():
            value, (low, high) = record["metrics"][metric], record["intervals"][metric]
            apart = abs(value - held[best]["metrics"][metric])
            within = apart <= (spread[name] ** 2 + spread[best] ** 2) ** 0.5
            mark = "best" if name == best else "noise" if within else ""
            rows[name][metric] = Compared(value=value, low=low, high=high, mark=mark)
    if "features" in first:
        features, reference = first["features"], first["reference"]
        title = f"{features['name']} ({features['digest']}), {first['num']} images, against {reference['name']}"
    else:
        title = f"held-out loss of {first['held_out']['num']} evaluations ({first['held_out']['digest']})"
    return Comparison(title=title, metrics=metrics, rows=tuple(rows.items()))


def _records(run: Path) -> list[dict[str, Any]]:
    file = run / RECORDS
    if not file.is_file():
        raise DataError("RUN", str(run), f"has no {RECORDS}", f"Evaluate it first: msdiff evaluate {run}")
    records = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if not {"metrics", "intervals"} <= record.keys():
                raise ValueError("it has no metrics")
            if "held_out" not in record and not {"features", "num", "reference"} <= record.keys():
                raise ValueError("it does not say what was compared")
        except (ValueError, AttributeError) as e:
            raise DataError("RUN", f"{file}:{number}", f"is no evaluation ({e})", "Remove the line.") from e
        records.append(record)
    return records
