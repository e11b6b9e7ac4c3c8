"""The state of a run on this rank: the one list of what a checkpoint saves and restores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from msdiff_dist.checkpoint.layout import CheckpointIndex, part_of
from msdiff_dist.checkpoint.load import StateReader, restore, start_from
from msdiff_dist.checkpoint.save import Averages, gather_shapes, moment_kinds
from msdiff_dist.data.fingerprint import Fingerprint
from msdiff_dist.distributed.agree import joined
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.models.projector import PREFIX
from msdiff_dist.training.batch_plans import BatchPlans
from msdiff_dist.training.metrics import LossAverage
from msdiff_dist.training.stage_ends import StageEnds
from msdiff_dist.training.stage_progress import StageProgress


class TrainState:
    """All state of a run that outlives its process. Collective: every rank makes it.

    Args:
        recipe: the resolved recipe, as plain data.
        batch_size: the global batch size.
        shards: fp32 weights and optimizer moments on this rank, by prefix of their parameter names.
        averages: averages of the weights on this rank.
        frozen: names of the parameters that do not train.
        progress: counts samples and steps of the stages; None: every decoder steps on every batch.
        batches: the plans of the batches; None: all are alike.

    Attributes:
        step: optimizer steps done. Global batches 0 to step - 1 have been trained on, so it is the position in the data
            too, but for `data_began`.
        data_began: the step at which a branch of another run began its data anew; global batch 0 is that of the step
            after it. 0 for other runs.
        loss_average: the smoothed training loss, which `checkpoint.keep_best` compares.
        fingerprint: fingerprint of the data set's shards, by source; empty for a new run until its data are read.
        shapes: shape of every parameter of the whole model, by name.
        ends: which stages have ended, and what decides over the others.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        batch_size: int,
        shards: Mapping[str, ShardedState],
        averages: Averages,
        frozen: Collection[str] = (),
        progress: StageProgress | None = None,
        batches: BatchPlans | None = None,
    ) -> None:
        self.shards, self.averages = shards, averages
        self.step = 0
        self.loss_average = LossAverage()
        self.fingerprint: Fingerprint = []
        self.shapes = gather_shapes(shards)
        self.data_began = 0
        self.ends = StageEnds()
        self._recipe, self._batch_size, self._frozen = dict(recipe), batch_size, frozen
        self._progress, self._batches = progress or StageProgress([]), batches
        self._optimizer_began: dict[str, int] = {}

    def index(self, world_size: int) -> CheckpointIndex:
        """The index of a checkpoint of the current state. Collective."""
        moments, next_batch = moment_kinds(self.shards), self.step - self.data_began
        adaptive = self._batches.fields(next_batch) if self._batches else {}
        if self._progress.stored:  # this rank may hold only decoders that have not stepped, which have no moments
            moments = sorted({*joined(moments)})
        return CheckpointIndex(
            step=self.step,
            batch_size=self._batch_size,
            loss=self.loss_average.value,
            recipe=self._recipe,
            shapes=self.shapes,
            moments=moments,
            world_size=world_size,
            data=self.fingerprint,
            data_began=self.data_began,
            optimizer_began=self._optimizer_began,
            stages=self._progress.fields() | ({"adaptive": adaptive} if adaptive else {}),
            stage_ends=self.ends.stored(),
        )

    def restore(self, checkpoint: StateReader) -> None:
        """Take over the state that the checkpoint holds. Collective.

        The optimizer of a part begins anew if the checkpoint lacks moments of a parameter that now trains: one counter
        of steps serves the whole part, and with moments of zero Adam's steps would be too large at a later count.
        """
        self._optimizer_began = dict(checkpoint.index.optimizer_began)
        for name in self.shapes.keys() - {*self._frozen}:
            if not all(checkpoint.holds(kind, name) for kind in checkpoint.index.moments):
                self._optimizer_began[part_of(name)] = checkpoint.index.step
        self._progress.restore(checkpoint.index.step, checkpoint.index.stages, self._optimizer_began)
        restore(checkpoint, self.shards, self.averages, self._optimizer_began, self._progress.own_steps())
        self.step, self.loss_average.value = checkpoint.index.step, checkpoint.index.loss
        self.fingerprint, self.data_began = checkpoint.index.data, checkpoint.index.data_began
        self.ends = StageEnds.of(checkpoint.index.stage_ends)
        if self._batches and (adaptive := checkpoint.index.stages.get("adaptive")):
            self._batches.restore(self.step - self.data_began, adaptive)

    def start_from(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Take over the model's weights alone, for a run at step 0. Collective.

        Args:
            read: (name, start, numel) -> elements of the flattened parameter, float32.
        """
        of_model = {prefix: shards for prefix, shards in self.shards.items() if prefix != PREFIX}
        start_from(read, of_model, self.averages)
