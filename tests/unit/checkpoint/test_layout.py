"""The index, the names of folders, and what a kill leaves of them."""

from __future__ import annotations

import json
import os
import signal
import sys
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
    put_in_place,
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
    assert find_checkpoint(checkpoints) == step_folder(checkpoints, 123456789)
    with pytest.raises(CheckpointError, match="is an empty folder"):
        find_checkpoint(checkpoints / "notes")

    remove(step_folder(checkpoints, 40))
    remove_leftovers(checkpoints)
    left = {p.name for p in checkpoints.iterdir()}
    assert left == {"step_00000005", "step_123456789", "damaged_step_00000070", "notes"}


CHANGES = ("os.rename", "os.rmdir", "os.remove")


def replace_and_be_killed(checkpoints: Path, allowed: int) -> bool:
    """In a fork, replace step 5's checkpoint; SIGKILL comes before change `allowed` of the file system, if it makes so
    many. Whether it came."""
    child = os.fork()
    if child == 0:
        try:
            left = [allowed]

            def count(event: str, args: tuple[object, ...]) -> None:
                if event in CHANGES:
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1

            sys.addaudithook(count)
            put_in_place(checkpoints / ".step_00000005.partial", step_folder(checkpoints, 5))
            left[0] = -1  # what a coverage tool writes at the end is no part of it
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    found: list[str] = []
    while True:
        checkpoints = tmp_path / str(len(found))
        for folder, content in ((".step_00000005.partial", "new"), ("step_00000005", "old")):
            (checkpoints / folder).mkdir(parents=True)
            for name in (INDEX, "rank_00000.safetensors"):
                (checkpoints / folder / name).write_text(content)
        killed = replace_and_be_killed(checkpoints, allowed=len(found))
        remove_leftovers(checkpoints)
        assert [p.name for p in checkpoints.iterdir()] == ["step_00000005"]
        (content,) = {p.read_text() for p in (checkpoints / "step_00000005").iterdir()}
        assert len(list((checkpoints / "step_00000005").iterdir())) == 2
        found.append(content)
        if not killed:
            break
    assert found == ["old", "old", "new", "new", "new", "new"]  # two renames, then the old one's two files and folder


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 5)
    folder.mkdir()
    (folder / INDEX).write_text("old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / ".step_00000005.partial", folder)
    assert (folder / INDEX).read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
