"""Nothing that is trained differs from its record."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import records
from tests.golden.batches import batches_record
from tests.golden.cases import CASES, WORLDS
from tests.golden.draws import draws_record
from tests.golden.record import MAKERS
from tests.golden.training import training_record


@pytest.mark.parametrize("case", CASES)
def test_first_batches(case: str, tmp_path: Path) -> None:
    made = batches_record(case, tmp_path)
    assert not records.differences(records.load(f"batches_{case}"), made)


def test_draws_beside_training(tmp_path: Path) -> None:
    assert not records.differences(records.load("draws"), draws_record(tmp_path))


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "world_size"), [(case, world) for case, worlds in WORLDS.items() for world in worlds])
def test_training(case: str, world_size: int, tmp_path: Path) -> None:
    made = training_record(case, tmp_path, world_size)
    assert not records.differences(records.load(f"training_{case}"), made)


def test_every_record_is_compared() -> None:
    assert {path.stem for path in records.RECORDS.glob("*.json")} == set(MAKERS)
