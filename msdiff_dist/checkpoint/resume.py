"""Which checkpoint a run resumes from: the newest that is intact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from msdiff_dist.checkpoint.layout import complete_checkpoints, remove, remove_leftovers, step_of
from msdiff_dist.checkpoint.load import CheckpointReader, check_architecture
from msdiff_dist.checkpoint.tensor_file import CorruptError
from msdiff_dist.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def open_newest_intact(checkpoints: Path, shapes: Shapes, batch_size: int) -> tuple[CheckpointReader | None, list[str]]:
    """The newest intact checkpoint, or None if there is no checkpoint, and notes for the user. Collective.

    Every file is compared with its checksum; each rank compares its share of the files. A corrupt checkpoint is put
    aside as `damaged_step_*`, and the notes say so. Leftovers of a killed run are removed.

    Args:
        shapes: shapes of the parameters of the model being trained, by name.
        batch_size: the run's global batch size.

    Raises:
        CheckpointError: the newest intact checkpoint has a newer format, another architecture or another batch size,
            or all are corrupt.
    """
    notes: list[str] = []
    found: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        remove_leftovers(checkpoints)
        found = [complete_checkpoints(checkpoints)]
    dist.broadcast_object_list(found, src=0)
    error: CheckpointError | None = None
    for folder in reversed(found[0]):
        reader, error = _opened(folder, shapes, batch_size)
        if error is None:
            return reader, notes
        if not isinstance(error, CorruptError):
            raise _with_offer(error, found[0][: found[0].index(folder)], shapes, batch_size)
        aside = _free_name(folder.with_name(f"damaged_{folder.name}"))
        notes.append(f"{error.value} {error.problem}; the checkpoint was put aside as {aside.name}")
        dist.barrier()  # a rename under another rank's `_free_name` would give it another name for its note
        if dist.get_rank() == 0:
            folder.rename(aside)
    if error:
        raise CheckpointError(
            "checkpoint", str(checkpoints), f"holds no intact checkpoint: {'; '.join(notes)}",
            "Bring one back from a copy, or name another --run-dir to start from scratch.",
        )  # fmt: skip
    return None, notes


def remove_later(snapshots: Path, step: int) -> None:
    """Delete snapshots of steps past `step`, which will be trained again, and leftovers of a kill. Rank 0 only."""
    remove_leftovers(snapshots)
    for folder in complete_checkpoints(snapshots):
        if step_of(folder) > step:
            remove(folder)


def _opened(folder: Path, shapes: Shapes, batch_size: int) -> tuple[CheckpointReader | None, CheckpointError | None]:
    """The checkpoint and the error of the first rank that raised one, None if none did. Collective."""
    reader: CheckpointReader | None = None
    error: CheckpointError | None = None
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        reader = CheckpointReader(folder)
        reader.verify(rank, world)
        _check_fits(reader, shapes, batch_size)
    except CheckpointError as e:
        error = e
    errors: list[CheckpointError | None] = [None] * world
    dist.all_gather_object(errors, error)
    return reader, next((e for e in errors if e), None)


def _check_fits(reader: CheckpointReader, shapes: Shapes, batch_size: int) -> None:
    # The batch size must be the same because the position in the data is step x batch_size.
    check_architecture(reader, shapes)
    if reader.index.batch_size != batch_size:
        raise CheckpointError(
            "checkpoint", str(reader.folder),
            f"was trained with a global batch of {reader.index.batch_size} and this run has {batch_size}",
            f"Set train.global_batch_size={reader.index.batch_size} and train.micro_batch_size=null, or name another "
            "--run-dir.",
        )  # fmt: skip


def _with_offer(error: CheckpointError, older: list[Path], shapes: Shapes, batch_size: int) -> CheckpointError:
    """The error, whose remedy also names the newest of the `older` checkpoints that fits, if one does."""
    for folder in reversed(older):
        try:
            _check_fits(CheckpointReader(folder), shapes, batch_size)
        except CheckpointError:
            continue
        remedy = f"{error.remedy} The newest that fits is {folder.name}: move the newer ones away to resume from it."
        return CheckpointError(error.field, error.value, error.problem, remedy)
    return error


def _free_name(path: Path) -> Path:
    return path if not path.exists() else _free_name(path.with_name(f"{path.name}_"))
