"""Writing a checkpoint: every rank writes its own shards, then rank 0 makes them visible by one rename."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist.checkpoint.layout import INDEX, CheckpointIndex, key_of, put_in_place
from msdiff_dist.checkpoint.tensor_file import StoredFile, TensorWriter
from msdiff_dist.distributed.agree import combined
from msdiff_dist.distributed.object_exchange import ObjectExchange
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.atomic import WriteError, aside_of, atomic_write

Averages = Mapping[str, Mapping[str, list[Tensor]]]
"""This rank's shards of the averages of the weights: by kind (`ema`), by prefix of the parameter names, then one tensor
for each of `ShardedState.flats`."""


GATHERED = "gathered"
"""Kind of the gradients that wait for those of later batches."""


class HostCopy:
    """Copies this rank's weights, optimizer moments and averages to host memory, which is kept for the next copy.

    Memory is pinned for copies from a GPU. That is fast to copy to, and slow to allocate: hence it is kept.

    Args:
        state: fp32 shards by prefix of the parameter names (`shared.`, `stages.0.`).
        averages: averages of the same shards.
    """

    def __init__(self, state: Mapping[str, ShardedState], averages: Averages) -> None:
        self._state, self._averages = state, averages
        self._buffers: dict[tuple[str, int, str], Tensor] = {}

    @torch.no_grad()
    def take(self, kinds: Collection[str] | None = None) -> dict[str, Tensor]:
        """Copy everything, or these kinds, as it is now.

        Returns:
            The ranges on this rank by key (see `layout`), 1-D float32. The next `take` overwrites them.
        """
        on_gpu = False
        for prefix, flat, kind, source in self._sources():
            if kinds is not None and kind not in kinds:
                continue
            buffer = self._buffers.get((prefix, flat, kind))
            if buffer is None:
                buffer = torch.empty(source.shape, pin_memory=source.is_cuda)
                self._buffers[prefix, flat, kind] = buffer
            buffer.copy_(source, non_blocking=True)
            on_gpu |= source.is_cuda
        if on_gpu:  # the copies were only queued, and the next step may change their sources
            torch.cuda.synchronize()
        pieces: dict[str, Tensor] = {}
        for (prefix, flat, kind), buffer in self._buffers.items():
            if kinds is not None and kind not in kinds:
                continue
            for f in self._state[prefix].fragments:
                if f.flat == flat:  # a view: only what belongs to a parameter is written, ZeRO's padding is not
                    pieces[key_of(kind, prefix + f.name, f.start)] = buffer[f.offset : f.offset + f.numel]
        return pieces | self._frozen_pieces(("param", *self._averages) if kinds is None else kinds)

    def _frozen_pieces(self, kinds: Collection[str]) -> dict[str, Tensor]:
        """The ranges of frozen parameters on this rank: weights, mostly their own averages, and no moments."""
        pieces: dict[str, Tensor] = {}
        wanted = [kind for kind in ("param", *self._averages) if kind in kinds]
        for prefix, shards in self._state.items() if wanted else ():
            on_host = [flat.detach().cpu() for flat in shards.frozen.flats]  # on the host they are views: none changes
            for f in shards.frozen.fragments:
                for kind in wanted:
                    flats = shards.frozen.averages.get(kind, on_host)
                    piece = flats[f.flat][f.offset : f.offset + f.numel]
                    pieces[key_of(kind, prefix + f.name, f.start)] = piece
        return pieces

    def _sources(self) -> Iterator[tuple[str, int, str, Tensor]]:
        """Every flat tensor as (prefix, number of the flat tensor, kind, tensor)."""
        for prefix, shards in self._state.items():
            for kind, average in self._averages.items():
                for i, source in enumerate(average[prefix]):
                    yield prefix, i, kind, source
            for i, (weights, moments) in enumerate(zip(shards.flats(), shards.moments(), strict=True)):
                for kind, source in ({"param": weights} | moments).items():
                    yield prefix, i, kind, source
            for i, source in enumerate(shards.gathered):
                yield prefix, i, GATHERED, source


def write_checkpoint(
    folder: Path, pieces: Mapping[str, Tensor], index: CheckpointIndex, exchange: ObjectExchange
) -> None:
    """Write the checkpoint `folder`, complete or not at all. Collective.

    Args:
        pieces: this rank's ranges by key, as `HostCopy.take` returns them.
        index: what checkpoint.json is to say; files and world size are filled in. Rank 0's is written.
        exchange: how the ranks tell each other what they have written.

    Raises:
        CheckpointError: on every rank, if any rank could not write.
    """
    aside = aside_of(folder)
    # Every rank takes part in both exchanges, whatever failed on it: a rank that raised in between would leave the
    # others waiting.
    error: str | None = None
    stored: StoredFile | None = None
    if exchange.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        error = _attempt(lambda: aside.mkdir(parents=True))
    error = exchange.from_rank_0(error)
    if error is None and pieces:
        try:
            stored = _write_pieces(aside / f"rank_{exchange.rank:05d}.safetensors", pieces)
        except OSError as e:
            error = e.strerror or str(e)

    def publish(of_rank: list[tuple[str | None, StoredFile | None]]) -> str | None:
        failed = next((f"rank {rank}: {e}" for rank, (e, _) in enumerate(of_rank) if e), None)
        if failed is None:
            full = replace(index, files=[f for _, f in of_rank if f], world_size=exchange.world_size)
            failed = _attempt(lambda: _publish(aside, folder, full.dump()))
        if failed:
            shutil.rmtree(aside, ignore_errors=True)
        return failed

    if failed := exchange.combined((error, stored), publish):
        raise CheckpointError(
            "checkpoint", str(folder), f"could not be written ({failed})",
            "Free space or make the folder writable; the checkpoints before it are untouched.",
        )  # fmt: skip


def _write_pieces(path: Path, pieces: Mapping[str, Tensor]) -> StoredFile:
    with TensorWriter(path, pieces) as writer:
        for key, tensor in pieces.items():
            writer.write(key, tensor)
    return writer.stored


def _publish(aside: Path, folder: Path, index: str) -> None:
    """Add the index to a folder to which every rank has written its file and synced it, and give it its name."""
    atomic_write(aside / INDEX, index)
    put_in_place(aside, folder)


def _attempt(action: Callable[[], None]) -> str | None:
    """Run `action`; why it could not write, None if it could."""
    try:
        action()
    except WriteError as e:
        return e.problem
    except OSError as e:
        return e.strerror or str(e)
    return None


def gather_shapes(state: Mapping[str, ShardedState]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the whole model by name. Collective."""
    own = {prefix + name: shape for prefix, shards in state.items() for name, shape in shards.shapes.items()}
    return combined(own, lambda every: dict(sorted({n: s for shapes in every for n, s in shapes.items()}.items())))


def moment_kinds(state: Mapping[str, ShardedState]) -> list[str]:
    """Kinds of the optimizer's tensors (`exp_avg`, ...); none before the first step."""
    return sorted({kind for shards in state.values() for moments in shards.moments() for kind in moments})
