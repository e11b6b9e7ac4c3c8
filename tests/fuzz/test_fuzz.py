"""Every parser of foreign bytes: valid inputs, hostile ones, and a bounded number of mutations, always the same.

`tools/fuzz.py` runs the same targets for as long as one likes, guided by coverage (docs/design/fuzzing.md).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.fuzzing.mutations import mutate_bytes
from tools.fuzzing.target import Target, examine
from tools.fuzzing.targets import TARGETS

_CORPUS = Path(__file__).parent / "corpus"
"""One input for each kind of fault that `tools/fuzz.py` found: TARGET/WHAT."""
_SLOW = {"ldm-yaml", "diffusers-index", "diffusers-unet", "diffusers-scheduler"}
"""Targets that build a network for every input."""
_MUTATIONS, _FEW = 40, 4
_SECONDS = 30.0
"""Of CPU time for an input: more than the limit of `tools/fuzz.py`, as machines differ; less than an endless loop."""


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for data in target.seeds():
        target.read(data, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_and_mutated_inputs_are_read_alike_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for label, data in [*target.hostile().items(), *_mutated(target, name)]:
        fault = examine(target, data, tmp_path, _SECONDS)
        assert fault is None, f"{label} ({data[:100]!r}): {fault.kind}\n{fault.details}"


@pytest.mark.parametrize("path", sorted(_CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_faults_that_were_found(path: Path, tmp_path: Path) -> None:
    fault = examine(TARGETS[path.parent.name], path.read_bytes(), tmp_path, _SECONDS)
    assert fault is None, f"{fault.kind}\n{fault.details}"


def _mutated(target: Target, name: str) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(zlib.crc32(name.encode()))
    seeds = target.seeds()
    for number in range(_FEW if name in _SLOW else _MUTATIONS):
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 4))):
            mutate = target.mutate if target.mutate and rng.random() < 0.7 else None
            data = mutate(rng, data) if mutate else mutate_bytes(rng, data, target.words)
        yield f"mutation {number}", data[: target.largest]
