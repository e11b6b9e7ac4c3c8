"""scores.json of a run: the scores taken so far, each under what identifies it, and the compute at which.

{"format": 2,
 "petaflops": {STEP: 1e15 operations of the run up to it},
 "sets": {DIGEST: {"about": what the digest is of, "scores": {STEP: {METRIC: {NAME: VALUE}}}}}}

A set holds what compares: scores in one feature space against one reference, or held-out losses of one set of
evaluations. Scores with other settings stay beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msdiff_dist.errors import RunFolderError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import read_mapping, whole_lines

NAME = "scores.json"
_FORMAT = 2
_REMEDY = "Remove it to have the run scored again."


@dataclass(frozen=True, kw_only=True)
class ScoreSet:
    """Scores that are taken together.

    Attributes:
        prefix: of their names in results: that of the feature space with a slash; empty for the held-out loss.
        metrics: their metrics.
        about: all that the values depend on besides the weights, as JSON values.
        label: what they are taken in, for people.
    """

    prefix: str
    metrics: tuple[str, ...]
    about: dict[str, Any]
    label: str

    @property
    def digest(self) -> str:
        """The set's name in scores.json."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class ScoreFile:
    """The content of a run's scores.json.

    Attributes:
        petaflops: by step. sets: what was taken, by digest, step, metric and name.
    """

    path: Path
    petaflops: dict[int, float] = field(default_factory=dict)
    abouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    sets: dict[str, dict[int, dict[str, dict[str, float]]]] = field(default_factory=dict)

    def values(self, wanted: Iterable[ScoreSet], step: int) -> dict[str, float]:
        """The scores taken after a step, by their names in results."""
        return {
            f"{scores.prefix}{name}": value
            for scores in wanted
            for metric, values in self.sets.get(scores.digest, {}).get(step, {}).items()
            if metric in scores.metrics
            for name, value in values.items()
        }

    def missing(self, scores: ScoreSet, step: int) -> list[str]:
        """The metrics of a set that were not taken after a step."""
        taken = self.sets.get(scores.digest, {}).get(step, {})
        return [metric for metric in scores.metrics if metric not in taken]

    def complete(self, wanted: Iterable[ScoreSet], step: int) -> bool:
        """Whether all scores were taken after a step."""
        return not any(self.missing(scores, step) for scores in wanted)

    def add(self, scores: ScoreSet, step: int, metric: str, values: dict[str, float]) -> None:
        """Keep the values of a metric, in memory."""
        self.abouts[scores.digest] = {**scores.about, "label": scores.label}
        self.sets.setdefault(scores.digest, {}).setdefault(step, {})[metric] = values

    def write(self) -> None:
        """Replace the file."""
        content = {
            "format": _FORMAT,
            "petaflops": {str(step): self.petaflops[step] for step in sorted(self.petaflops)},
            "sets": {
                digest: {
                    "about": self.abouts[digest],
                    "scores": {str(step): steps[step] for step in sorted(steps)},
                }
                for digest, steps in self.sets.items()
            },
        }
        atomic_write(self.path, json.dumps(content, indent=1) + "\n")


def read_scores(run: Path) -> ScoreFile:
    """The scores of a run folder. Files of the first format, of one classifier's distances, count as empty.

    Raises:
        RunFolderError: the file holds something else.
    """
    path = run / NAME
    found = ScoreFile(path)
    stored = read_mapping(path, RunFolderError, _REMEDY) if path.is_file() else {}
    if not stored or "settings" in stored:
        return found
    if stored.get("format") != _FORMAT:
        raise RunFolderError(str(path), stored.get("format"), f"is not of format {_FORMAT}", _REMEDY)
    try:
        found.petaflops = {int(step): float(value) for step, value in stored["petaflops"].items()}
        for digest, scores in stored["sets"].items():
            found.abouts[digest] = dict(scores["about"])
            found.sets[digest] = {
                int(step): {
                    metric: {name: float(value) for name, value in values.items()} for metric, values in metrics.items()
                }
                for step, metrics in scores["scores"].items()
            }
    except (KeyError, AttributeError, TypeError, ValueError):
        raise RunFolderError(str(path), None, "holds no scores by step", _REMEDY) from None
    return found


def json_values(content: Any) -> Any:
    """Plain data with null for numbers that JSON does not have, as the unlimited `churn.sigma_max` of a sampler."""
    if isinstance(content, dict):
        return {key: json_values(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [json_values(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def training_compute(run: Path, planned: Mapping[int, float]) -> dict[int, float]:
    """1e15 floating-point operations that a run has taken up to each step of `planned`.

    The run counts them itself (`petaflops` in metrics.jsonl), because the cost of a step may change on the way; where
    it has no line of a step, they are as planned.
    """
    found = dict(planned)
    keys = tuple(b'"step": %d,' % step for step in planned)
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return found
    with metrics.open("rb") as lines:
        # Parsing every line of a long run would take seconds.
        content = b"".join(line for line in lines if any(key in line for key in keys))
    for entry in whole_lines(content):
        if entry.get("step") in found and isinstance(entry.get("petaflops"), (int, float)):
            found[entry["step"]] = float(entry["petaflops"])
    return found
