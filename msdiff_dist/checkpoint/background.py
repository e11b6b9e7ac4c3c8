"""Saves beside training: the loop waits only for the copy to host memory, and a thread writes the files.

An error of the thread is kept and raised by the next `save` or `finish`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from msdiff_dist.checkpoint.layout import (
    CheckpointIndex,
    complete_checkpoints,
    parse_key,
    remove,
    step_folder,
    step_of,
)
from msdiff_dist.checkpoint.policy import CheckpointConfig, kept
from msdiff_dist.checkpoint.save import Averages, HostCopy, write_checkpoint
from msdiff_dist.distributed.object_exchange import own_exchange
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.errors import MsdiffError


class BackgroundSaver:
    """Makes a run's checkpoints, and snapshots of its averages other than `ema`, at most one save at a time.

    Collective: every rank makes it, and calls `save` and `finish`, in the same order.

    Args:
        checkpoints, snapshots: folders that hold one `step_XXXXXXXX` per checkpoint or snapshot.
        state: fp32 weights and moments of this rank, by prefix of the parameter names.
        averages: averages of the weights on this rank, by kind and prefix.
    """

    def __init__(
        self,
        checkpoints: Path,
        snapshots: Path,
        state: Mapping[str, ShardedState],
        averages: Averages,
        config: CheckpointConfig,
    ) -> None:
        self._checkpoints, self._snapshots, self._config = checkpoints, snapshots, config
        self._copy = HostCopy(state, averages)
        self._snapshot_kinds = averages.keys() - {"ema"}
        # The threads have an exchange of their own: in the main threads' theirs would mix with what these exchange at
        # the same time, in another order on every rank.
        self._exchange = own_exchange("saves")
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, index: CheckpointIndex, *, checkpoint: bool = True, snapshot: bool = False) -> None:
        """Copy the current state and begin to write it: a snapshot, then a checkpoint.

        The previous save is finished first: the copy reuses its buffers.

        Raises:
            CheckpointError: on every rank, if the previous save failed.
        """
        self.finish()
        pieces = self._copy.take(None if checkpoint else self._snapshot_kinds)
        self._thread = threading.Thread(target=self._write, args=(pieces, index, checkpoint, snapshot), daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank already knows that the last save failed; `finish` then raises on every rank."""
        return self._error is not None

    def finish(self) -> None:
        """Wait until the save under way is complete.

        Raises:
            CheckpointError: on every rank, if any rank could not write it.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None or issubclass(kind, MsdiffError):  # after anything else the other ranks may be gone
            self.finish()

    def _write(self, pieces: Mapping[str, Tensor], index: CheckpointIndex, checkpoint: bool, snapshot: bool) -> None:
        try:
            if snapshot:  # first, so that a run resumed from the checkpoint finds every snapshot up to its step
                chosen = {k: piece for k, piece in pieces.items() if parse_key(k)[0] in self._snapshot_kinds}
                write_checkpoint(step_folder(self._snapshots, index.step), chosen, index, self._exchange)
            if checkpoint:
                write_checkpoint(step_folder(self._checkpoints, index.step), pieces, index, self._exchange)
            if checkpoint and self._exchange.rank == 0:
                remove_old(self._checkpoints, self._config)
        except Exception as e:
            self._error = e


def remove_old(checkpoints: Path, config: CheckpointConfig) -> None:
    """Delete the checkpoints that the policy does not keep. For rank 0 alone."""
    folders = {step_of(p): p for p in complete_checkpoints(checkpoints)}
    losses = {step: CheckpointIndex.load(p).loss if config.keep_best else None for step, p in folders.items()}
    for step in folders.keys() - kept(losses, config):
        remove(folders[step])
