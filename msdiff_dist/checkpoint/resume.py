"""Which checkpoint a run resumes from: the newest that is intact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from msdiff_dist.checkpoint.layout import complete_checkpoints, remove, remove_leftovers, step_of
from msdiff_dist.checkpoint.load import CheckpointReader, check_architecture
from msdiff_dist.checkpoint.tensor_file import CorruptError
from msdiff_dist.distributed.agree import combined, first_of, main_exchange, on_rank_0
from msdiff_dist.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def open_newest_intact(
    checkpoints: Path, shapes: Shapes, batch_size: int, before: Shapes | None = None
) -> tuple[CheckpointReader | None, list[str]]:
    """The newest intact checkpoint, or None if there is no checkpoint, and notes for the user. Collective.

    Every file is compared with its checksum; each rank compares its share of the files. A corrupt checkpoint is put
    aside as `damaged_step_*`, and the notes say so. Leftovers of a killed run are removed.

    Args:
        shapes: shapes of the parameters of the model being trained, by name.
        batch_size: the run's global batch size.
        before: shapes of the model that the run may have trained before this one; None: there was none.

    Raises:
        CheckpointError: the newest intact checkpoint has a newer format, another architecture or another batch size,
            or all are corrupt.
    """
    notes: list[str] = []
    found = on_rank_0(lambda: _complete_ones(checkpoints))
    error: CheckpointError | None = None
    for folder in reversed(found):
        reader, error = _opened(folder, shapes, batch_size, before)
        if error is None:
            return reader, notes
        if not isinstance(error, CorruptError):
            raise _with_offer(error, found[: found.index(folder)], shapes, batch_size, before)
        aside = on_rank_0(partial(_put_aside, folder))
        notes.append(f"{error.value} {error.problem}; the checkpoint was put aside as {aside.name}")
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


def _opened(
    folder: Path, shapes: Shapes, batch_size: int, before: Shapes | None
) -> tuple[CheckpointReader | None, CheckpointError | None]:
    """The checkpoint and the error of the first rank that raised one, None if none did. Collective."""
    reader: CheckpointReader | None = None
    error: CheckpointError | None = None
    ranks = main_exchange()
    try:
        reader = CheckpointReader(folder)
        reader.verify(ranks.rank, ranks.world_size)
        _check_fits(reader, shapes, batch_size, before)
    except CheckpointError as e:
        error = e
    return reader, combined(error, first_of)


def _check_fits(reader: CheckpointReader, shapes: Shapes, batch_size: int, before: Shapes | None) -> None:
    if reader.index.shapes != before:
        check_architecture(reader, shapes)
    # The batch size must be the same because the position in the data is step x batch_size.
    if reader.index.batch_size != batch_size:
        raise CheckpointError(
            "checkpoint", str(reader.folder),
            f"was trained with a global batch of {reader.index.batch_size} and this run has {batch_size}",
            f"Set train.global_batch_size={reader.index.batch_size} and train.micro_batch_size=null, or name another "
            "--run-dir.",
        )  # fmt: skip


def _with_offer(
    error: CheckpointError, older: list[Path], shapes: Shapes, batch_size: int, before: Shapes | None
) -> CheckpointError:
    """The error, whose remedy also names the newest of the `older` checkpoints that fits, if one does."""
    for folder in reversed(older):
        try:
            _check_fits(CheckpointReader(folder), shapes, batch_size, before)
        except CheckpointError:
            continue
        remedy = f"{error.remedy} The newest that fits is {folder.name}: move the newer ones away to resume from it."
        return CheckpointError(error.field, error.value, error.problem, remedy)
    return error


def _complete_ones(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, after what a killed run left beside them is removed. For rank 0 alone."""
    remove_leftovers(checkpoints)
    return complete_checkpoints(checkpoints)


def _put_aside(folder: Path) -> Path:
    """Rename a corrupt checkpoint. For rank 0 alone."""
    return folder.rename(_free_name(folder.with_name(f"damaged_{folder.name}")))


def _free_name(path: Path) -> Path:
    return path if not path.exists() else _free_name(path.with_name(f"{path.name}_"))
