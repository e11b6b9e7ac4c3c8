from __future__ import annotations

import json
from pathlib import Path

import pytest

from msdiff_dist.checkpoint.layout import (
    FORMAT,
    INDEX,
    CheckpointIndex,
    complete_checkpoints,
    find_checkpoint,
    key_of,
    parse_key,
    remove,
    remove_leftovers,
    step_folder,
)
from msdiff_dist.checkpoint.tensor_file import CorruptError, StoredFile
from msdiff_dist.errors import CheckpointError


@pytest.fixture
def index() -> CheckpointIndex:
    files = [StoredFile(name="rank_00000.safetensors", size=12, sha256="ab", keys={"param/shared.w@0": 6})]
    return CheckpointIndex(
        step=7,
        batch_size=24,
        loss=0.5,
        recipe={"name": "x"},
        shapes={"shared.w": (2, 3)},
        moments=["exp_avg"],
        world_size=1,
        files=files,
    )


def test_index_round_trip(tmp_path: Path, index: CheckpointIndex) -> None:
    (tmp_path / INDEX).write_text(index.dump())
    assert CheckpointIndex.load(tmp_path) == index


@pytest.mark.parametrize("text", [None, "", "{}", '{"format": 1, "step": 3', "[1]", '{"format": 1, "files": [{}]}'])
def test_corrupt_index_names_the_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / INDEX).write_text(text)
    with pytest.raises(CorruptError) as caught:
        CheckpointIndex.load(tmp_path)
    assert caught.value.value == str(tmp_path / INDEX)


def test_newer_format_is_refused_not_corrupt(tmp_path: Path, index: CheckpointIndex) -> None:
    (tmp_path / INDEX).write_text(json.dumps(json.loads(index.dump()) | {"format": FORMAT + 1, "unheard": "of"}))
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}, newer than {FORMAT}") as caught:
        CheckpointIndex.load(tmp_path)
    assert not isinstance(caught.value, CorruptError)


def test_keys() -> None:
    assert key_of("ema", "stages.0.out.0.weight", 12) == "ema/stages.0.out.0.weight@12"
    assert parse_key("ema/stages.0.out.0.weight@12") == ("ema", "stages.0.out.0.weight", 12)


def test_folders(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert complete_checkpoints(checkpoints) == []
    steps = [5, 123456789, 40]
    for step in steps:
        step_folder(checkpoints, step).mkdir(parents=True)
    for name in (".step_00000050.partial", ".step_00000060.old", "damaged_step_00000070", "notes"):
        (checkpoints / name).mkdir()
    assert complete_checkpoints(checkpoints) == [step_folder(checkpoints, s) for s in sorted(steps)]
    assert find_checkpoint(tmp_path) == step_folder(checkpoints, 123456789)
    assert find_checkpoint(tmp_path, 40) == step_folder(checkpoints, 40)
    with pytest.raises(CheckpointError, match="It has: 5, 40, 123456789"):
        find_checkpoint(tmp_path, 41)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(checkpoints)

    remove(step_folder(checkpoints, 40))
    remove_leftovers(checkpoints)
    left = {p.name for p in checkpoints.iterdir()}
    assert left == {"step_00000005", "step_123456789", "damaged_step_00000070", "notes"}
