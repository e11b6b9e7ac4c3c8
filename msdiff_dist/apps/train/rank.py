"""One rank of a run: the recipe's parts put together, from the shards to the last checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from msdiff_dist.apps.train.costs import step_petaflops
from msdiff_dist.apps.train.latent_checks import check_latents
from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.apps.train.preview import write_preview
from msdiff_dist.apps.train.warm_start import start_weights
from msdiff_dist.checkpoint.background import BackgroundSaver
from msdiff_dist.checkpoint.layout import CheckpointIndex
from msdiff_dist.checkpoint.load import restore, start_from
from msdiff_dist.checkpoint.policy import LossAverage
from msdiff_dist.checkpoint.resume import open_newest_intact, remove_later
from msdiff_dist.checkpoint.save import HostCopy, gather_shapes, moment_kinds, write_checkpoint
from msdiff_dist.data.fingerprint import Marks, check_unchanged, mark_shards
from msdiff_dist.data.index import Shard
from msdiff_dist.data.loader import StepLoader, load_index
from msdiff_dist.distributed.engines import EngineConfig, StageParallelEngines
from msdiff_dist.distributed.environment import Environment, make_groups, process_group
from msdiff_dist.distributed.lost_ranks import naming_lost_ranks
from msdiff_dist.distributed.router import Router
from msdiff_dist.errors import UserError
from msdiff_dist.models.activation_checkpointing import checkpoint_activations
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.recipe import Recipe, recipe_mapping
from msdiff_dist.training.ema import ShardedEma
from msdiff_dist.training.feed import Feed
from msdiff_dist.training.loop import Occasions, Outcome, train
from msdiff_dist.training.metrics import MetricsWriter
from msdiff_dist.training.optimizer import optimizer_factory
from msdiff_dist.training.preemption import StopRequest
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.step import TrainStep

T = TypeVar("T")


def run_rank(
    recipe: Recipe, run_dir: Path, terminal: IO[str] | None = None, stop: StopRequest | None = None
) -> Outcome:
    """Train `recipe` in `run_dir` as the rank that the environment names, from its newest checkpoint if it has one.

    Rank 0 shows its progress on `terminal`, or on standard error. Returns "preempted" when a signal ended it early:
    everything is saved, and the same call goes on from there. `stop`, if given, then knows when the signal came.
    """
    folder = RunFolder(run_dir)
    torch.set_num_threads(recipe.train.threads or _threads_per_rank())
    with ExitStack() as stack:
        env = stack.enter_context(process_group(recipe.train.timeout_s))
        stack.enter_context(naming_lost_ranks(env))
        stop = stack.enter_context(stop or StopRequest())
        everywhere(env, lambda: folder.open(recipe_mapping(recipe)) if env.rank == 0 else None)
        stack.callback(folder.close)
        run = Run(recipe, folder, env)
        stack.push(lambda kind, e, tb: run.feed.close(finish=kind is None))
        stack.enter_context(run.saver)
        writer = (
            stack.enter_context(MetricsWriter(folder, run.first_step, recipe.train.steps, terminal or sys.stderr))
            if env.rank == 0
            else None
        )
        if writer:
            writer.say(run.describe())
            for note in run.notes:
                writer.say(note)
        return train(
            recipe.train,
            run.train_step,
            run.feed,
            run.ema,
            run.loss_average,
            recipe.optimizer.lr,
            recipe.lr_schedule,
            Occasions(run.save, recipe.checkpoint.due, run.snapshot_due, run.preview, recipe.preview.every),
            writer,
            lambda: stop.requested_at is not None or run.saver.failed,
            run.batch_size,
            run.step_petaflops,
            run.first_step,
        )


class Run:
    """Everything that trains on this rank. Collective: every rank builds it alike."""

    def __init__(self, recipe: Recipe, folder: RunFolder, env: Environment) -> None:
        self.recipe, self.folder, self.env = recipe, folder, env
        plan = everywhere(env, lambda: plan_run(recipe, env.world_size, _ranks_per_node()))
        self.batch_size, self.placement, quotas = plan.batch_size, plan.placement, plan.quotas
        self.step_petaflops = step_petaflops(quotas, plan.cost_K)
        groups = make_groups(self.placement.stages_of_rank, env.rank)
        shared, stages = build_parts(recipe.model, self.placement.stages_of_rank[env.rank], recipe.train.seed)
        for part in (shared, *stages.values()):
            checkpoint_activations(part, recipe.activation_checkpointing)
            part.to(env.device)
        self.engines = StageParallelEngines(
            shared,
            stages,
            optimizer_factory(recipe.optimizer, fused=env.device.type == "cuda"),
            EngineConfig(
                recipe.train.precision,
                recipe.parallel.zero_shared,
                recipe.parallel.zero_stage,
                recipe.train.gradient_accumulation_steps,
                recipe.optimizer.grad_clip,
            ),
            groups,
        )
        self.state = self.engines.state()
        self.shapes = gather_shapes(self.state)
        self.ema = ShardedEma(recipe.ema, self.state, self.batch_size)
        self.loss_average = LossAverage()
        self.notes: list[str] = []
        self.marks: Marks = []
        self.first_step = self._resume()
        self.saver = BackgroundSaver(
            folder.checkpoints, folder.snapshots, self.state, self.ema.averages, recipe.checkpoint
        )
        index, self.marks, null_context = self._count_data()
        loader = everywhere(env, lambda: self._loader(index))
        self.feed = Feed(
            loader,
            quotas,
            Router(groups.routing, self.placement, env.rank, env.device),
            recipe.train.seed,
            recipe.train.gradient_accumulation_steps,
            self.first_step,
        )
        self.train_step = TrainStep(
            self.feed,
            self.engines,
            recipe.process(),
            quotas,
            LatentCodec(recipe.autoencoder, recipe.data.kind != "image", env.device),
            env,
            seed=recipe.train.seed,
            dtype=torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
            loss_kind=recipe.train.loss,
            channels_last=recipe.train.channels_last,
            augmentation=recipe.augmentation,
            condition_dropout=recipe.train.condition_dropout,
            null_label=recipe.model.num_classes,
            null_context=null_context,
            max_bad=recipe.data.max_bad,
        )

    def describe(self) -> str:
        """One line on what is about to run."""
        params = sum(int(torch.Size(s).numel()) for s in self.shapes.values())
        scratch = f"from {self.recipe.train.init_from}" if self.recipe.train.init_from else "from scratch"
        start = f"from step {self.first_step}" if self.first_step else scratch
        return (
            f"{self.recipe.name}: {params / 1e6:.1f} M parameters, {self.placement.num_stages} stages on "
            f"{self.env.world_size} ranks {list(map(list, self.placement.stages_of_rank))[:8]}, {start}, "
            f"run folder {self.folder.path}"
        )

    def snapshot_due(self, step: int) -> bool:
        """Whether the averages of `ema.power` are to be kept as they are after `step` steps."""
        power = self.recipe.ema.power
        return power is not None and step % power.snapshot_every == 0

    def save(self, step: int, checkpoint: bool = True) -> None:
        """Begin the checkpoint of `step` steps done, if wanted, and the snapshot of averages, if due.

        `saver.finish` waits for them. Collective.
        """
        self.saver.save(self._index(step), checkpoint=checkpoint, snapshot=self.snapshot_due(step))

    def preview(self, step: int) -> None:
        """Sample a grid with the EMA weights of this moment, every rank its share. Collective."""
        weights = self.folder.samples / f".weights_{step:08d}"
        write_checkpoint(weights, HostCopy(self.state, self.ema.averages).take(["ema"]), self._index(step))
        write_preview(self.recipe, weights, self.folder.samples / f"step_{step:08d}.png", self.env)

    def _index(self, step: int) -> CheckpointIndex:
        mapping, moments = recipe_mapping(self.recipe), moment_kinds(self.state)
        return CheckpointIndex(
            step,
            self.batch_size,
            self.loss_average.value,
            mapping,
            self.shapes,
            moments,
            self.env.world_size,
            data=self.marks,
        )

    def _resume(self) -> int:
        weights = everywhere(self.env, lambda: start_weights(self.recipe, self.folder.checkpoints))
        reader, self.notes = open_newest_intact(self.folder.checkpoints, self.shapes, self.batch_size)
        step = 0
        if weights:
            start_from(weights.stretch, self.state, self.ema.averages)
        if reader:
            restore(reader, self.state, self.ema.averages)
            step, self.loss_average.value = reader.index.step, reader.index.loss
            self.marks = reader.index.data
        if self.env.rank == 0:
            self.folder.cut_metrics(step)
            remove_later(self.folder.snapshots, step)
        return step

    def _count_data(self) -> tuple[list[list[Shard]], Marks, Tensor | None]:
        """The shards, counted by rank 0 for all and held against the checkpoint's; the context of "no caption".

        Collective.
        """

        def count() -> tuple[list[list[Shard]], Marks, Tensor | None] | None:
            if self.env.rank:
                return None
            index = load_index(self.recipe.data)
            marks = mark_shards(index)
            if self.marks:
                note = check_unchanged(self.marks, marks, self.first_step, self.recipe.data.accept_changes)
                self.notes += [note] if note else []
            return index, marks, check_latents(self.recipe, index)

        counted = [everywhere(self.env, count)]
        dist.broadcast_object_list(counted)
        assert counted[0]
        return counted[0]

    def _loader(self, index: list[list[Shard]]) -> StepLoader:
        return StepLoader(
            self.recipe.data,
            self.recipe.train.seed,
            self.batch_size,
            self.env.rank,
            self.env.world_size,
            self.first_step,
            index,
        )


def everywhere(env: Environment, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it is refused on one, every rank raises that error. Collective."""
    result, error = None, None
    try:
        result = action()
    except UserError as e:
        error = e
    errors: list[UserError | None] = [None] * env.world_size
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e), None)
    if first:
        raise first
    return result  # type: ignore[return-value]


def _ranks_per_node() -> int | None:
    """Ranks on rank 0's node, if the launcher said; the same on every rank. Collective."""
    said: list[str | None] = [os.environ.get("LOCAL_WORLD_SIZE")]
    dist.broadcast_object_list(said)
    return int(said[0]) if said[0] else None


def _threads_per_rank() -> int:
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(1, len(os.sched_getaffinity(0)) // local_world)
