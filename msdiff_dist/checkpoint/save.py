"""Writing a checkpoint: every rank its own shards, then one rename makes it exist."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from msdiff_dist.checkpoint.layout import INDEX, CheckpointIndex, StoredFile, key_of, sha256_of
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.errors import CheckpointError


def snapshot(
    state: Mapping[str, ShardedState], ema: Mapping[str, list[Tensor]], *, ema_only: bool = False
) -> dict[str, Tensor]:
    """This rank's stretches of weights, optimizer moments and EMA, copied to host memory, by key.

    state, ema: by prefix of the parameter names (`shared.`, `stages.0.`). ema_only: for previews.
    """
    pieces: dict[str, Tensor] = {}
    for prefix, shards in state.items():
        flats, moments = shards.flats(), shards.moments()
        for f in shards.fragments:
            where = slice(f.offset, f.offset + f.numel)
            kinds = {"ema": ema[prefix][f.flat]}
            if not ema_only:
                kinds |= {"param": flats[f.flat]} | moments[f.flat]
            for kind, flat in kinds.items():
                pieces[key_of(kind, prefix + f.name, f.start)] = flat.detach()[where].to("cpu", copy=True)
    return pieces


def write_checkpoint(folder: Path, pieces: Mapping[str, Tensor], index: CheckpointIndex) -> None:
    """Write `folder`, complete or not at all. Collective; every rank gives its own pieces, rank 0's index counts.

    Raises:
        CheckpointError: on every rank, when any rank could not write; `folder` is then absent.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    aside = folder.with_name(f".{folder.name}.partial")
    error, stored = None, None
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        error = _attempt(lambda: aside.mkdir(parents=True))
    dist.barrier()
    if error is None:
        try:
            stored = _write_pieces(aside / f"rank_{rank:05d}.safetensors", dict(pieces))
        except OSError as e:
            error = e.strerror or str(e)
    gathered: list[tuple[str | None, StoredFile | None]] = [(None, None)] * world
    dist.all_gather_object(gathered, (error, stored))
    error = next((f"rank {r}: {e}" for r, (e, _) in enumerate(gathered) if e), None)
    if rank == 0 and error is None:
        full = replace(index, files=[f for _, f in gathered if f], world_size=world)
        error = _attempt(lambda: _publish(aside, folder, full.dump()))
    outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            "checkpoint", str(folder), f"could not be written ({outcome[0]})",
            "Free space or make the folder writable; the previous checkpoint is untouched.",
        )  # fmt: skip


def _write_pieces(path: Path, pieces: dict[str, Tensor]) -> StoredFile | None:
    if not pieces:
        return None
    try:
        save_file(pieces, path)
    except Exception as e:  # safetensors raises its own type for a full disk
        raise OSError(str(e)) from e
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return StoredFile(path.name, path.stat().st_size, sha256_of(path))


def _publish(aside: Path, folder: Path, index: str) -> None:
    with (aside / INDEX).open("w") as f:
        f.write(index)
        f.flush()
        os.fsync(f.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as e:
        return e.strerror or str(e)
    return None


def gather_shapes(state: Mapping[str, ShardedState]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the whole model by name. Collective."""
    own = {prefix + name: shape for prefix, shards in state.items() for name, shape in shards.shapes.items()}
    gathered: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    merged: dict[str, tuple[int, ...]] = {}
    for shapes in gathered:
        merged |= shapes
    return dict(sorted(merged.items()))


def remove_old(checkpoints: list[Path], keep_last: int) -> None:
    """Delete all but the newest `keep_last` of `checkpoints`, oldest first."""
    for path in checkpoints[:-keep_last]:
        shutil.rmtree(path)


def moment_kinds(state: Mapping[str, ShardedState]) -> list[str]:
    """Kinds of the optimizer's tensors, the same on every rank."""
    return sorted({kind for shards in state.values() for moments in shards.moments() for kind in moments})
