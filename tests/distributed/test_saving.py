"""A checkpoint is complete or absent, and a run resumes from the newest intact one."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from msdiff_dist.checkpoint.layout import INDEX, CheckpointIndex, complete_checkpoints, key_of, step_folder
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.resume import open_newest_intact
from msdiff_dist.checkpoint.save import write_checkpoint
from msdiff_dist.distributed.agree import main_exchange
from msdiff_dist.errors import CheckpointError
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

SHAPES = {"shared.w": (4, 5), "stages.0.b": (3,)}


def write(rank: int, checkpoints: Path, step: int) -> None:
    """A checkpoint of two ranks, each with half of every parameter, all elements equal to the step."""
    pieces = {}
    for name, numel in (("shared.w", 20), ("stages.0.b", 3)):
        start, stop = (0, numel // 2) if rank == 0 else (numel // 2, numel)
        pieces[key_of("param", name, start)] = torch.full((stop - start,), float(step))
    write_checkpoint(
        step_folder(checkpoints, step),
        pieces,
        CheckpointIndex(step=step, batch_size=8, loss=None, recipe={}, shapes=SHAPES, moments=[], world_size=2),
        main_exchange(),
    )


def write_many(rank: int, checkpoints: Path) -> None:
    for step in (1, 2, 3):
        write(rank, checkpoints, step)


def cut(folder: Path) -> None:
    os.truncate(folder / "rank_00001.safetensors", 40)


def flip(folder: Path) -> None:
    path = folder / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_file(folder: Path) -> None:
    (folder / "rank_00000.safetensors").unlink()


def lose_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def cut_index(folder: Path) -> None:
    os.truncate(folder / INDEX, 100)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut, r"rank_00001.safetensors is corrupt: it has 40 bytes"),
    (flip, r"rank_00001.safetensors is corrupt: its content changed"),
    (lose_file, r"rank_00000.safetensors is corrupt: it is missing"),
    (lose_index, r"checkpoint.json is corrupt: No such file"),
    (cut_index, r"checkpoint.json is corrupt"),
]


def opened(rank: int, checkpoints: Path) -> tuple[float, list[str]]:
    reader, notes = open_newest_intact(checkpoints, SHAPES, 8)
    assert reader is not None
    return float(reader.tensor("param", "shared.w").unique()), notes


def refusals(rank: int, checkpoints: Path) -> list[str]:
    """The errors for checkpoints of another architecture, batch size and format, and for corrupt ones alone."""
    messages = []

    def expect(shapes: dict[str, tuple[int, ...]], batch_size: int) -> None:
        with pytest.raises(CheckpointError) as caught:
            open_newest_intact(checkpoints, shapes, batch_size)
        messages.append(str(caught.value))

    write_many(rank, checkpoints)
    expect(SHAPES | {"stages.0.b": (4,)}, 8)
    expect(SHAPES, 16)
    if rank == 0:
        index = checkpoints / "step_00000003" / INDEX
        index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 99}))
    torch.distributed.barrier()
    expect(SHAPES, 8)
    torch.distributed.barrier()  # the other rank may still be reading the offer
    if rank == 0:
        for folder in complete_checkpoints(checkpoints):
            cut_index(folder)
    torch.distributed.barrier()
    expect(SHAPES, 8)
    return messages


def nothing_yet(rank: int, checkpoints: Path) -> None:
    assert open_newest_intact(checkpoints, SHAPES, 8) == (None, [])


def test_falls_back_to_the_newest_intact(tmp_path: Path) -> None:
    run_distributed(nothing_yet, 2, tmp_path / "none")
    run_distributed(write_many, 2, tmp_path / "intact")
    (tmp_path / "intact/.step_00000004.partial").mkdir()
    for corruption, message in DAMAGES:
        checkpoints = tmp_path / corruption.__name__
        shutil.copytree(tmp_path / "intact", checkpoints)
        corruption(checkpoints / "step_00000003")
        for value, notes in run_distributed(opened, 2, checkpoints):
            assert value == 2
            assert len(notes) == 1
            assert re.search(message, notes[0])
        names = sorted(p.name for p in checkpoints.iterdir())
        assert names == ["damaged_step_00000003", "step_00000001", "step_00000002"]


def test_what_does_not_fit_is_refused_with_an_offer(tmp_path: Path) -> None:
    for messages in run_distributed(refusals, 2, tmp_path):
        architecture, batch, newer, none = messages
        assert "step_00000003" in architecture
        assert "1 parameters differ, the first is stages.0.b, [3] there and [4]" in architecture
        assert "global batch of 8 and this run has 16" in batch
        assert "format 99, newer than" in newer
        assert "The newest that fits is step_00000002" in newer
        assert "holds no intact checkpoint" in none


def fails_to_write(rank: int, path: Path) -> list[str]:
    """Rank 1 may not write files of more than 20 kB from step 2 on."""
    run = open_run(rank, 2, recipe_of(ADAM), path)
    run.step(1e-4)
    run.save()
    run.step(1e-4)
    run.saver.finish()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    run.save()
    run.step(1e-4)  # training continues meanwhile
    with pytest.raises(CheckpointError) as caught:
        run.save()
    assert run.saver.failed
    run.feed.close()
    return [str(caught.value), *sorted(p.name for p in run.folder.checkpoints.iterdir())]


def test_a_rank_that_cannot_write_stops_all(tmp_path: Path) -> None:
    for message, *folders in run_distributed(fails_to_write, 2, tmp_path):
        assert "step_00000002" in message
        assert "rank 1: File too large" in message
        assert folders == ["step_00000001"]
    CheckpointReader(tmp_path / "checkpoints/step_00000001").verify()


def fills_disk(rank: int, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        any(write(rank, path / "checkpoints", step) for step in range(1, 100))
    return str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize(("options", "problem"), [("size=64k", "No space left"), ("ro", "Read-only file system")])
def test_full_and_read_only_disks(tmp_path: Path, options: str, problem: str) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(tmp_path)]).returncode:
        pytest.skip("may not mount")
    try:
        messages = run_distributed(fills_disk, 2, tmp_path)
        assert all(problem in message for message in messages)
        assert not list(tmp_path.glob("checkpoints/.*"))
        for folder in complete_checkpoints(tmp_path / "checkpoints"):
            CheckpointReader(folder).verify()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
