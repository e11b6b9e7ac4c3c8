"""The parts of a run on one rank, put together from the recipe: data feed, engines, averages, checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from msdiff_dist.apps.train.costs import guide_petaflops, samples_petaflops
from msdiff_dist.apps.train.evaluations import RunEvaluations
from msdiff_dist.apps.train.found_data import FoundData, find_data
from msdiff_dist.apps.train.guide import build_projection, open_guide
from msdiff_dist.apps.train.latent_checks import check_latents
from msdiff_dist.apps.train.parts import build_engines, build_feed, build_preparation
from msdiff_dist.apps.train.phase_start import phase_start
from msdiff_dist.apps.train.phases import ends_after, is_over
from msdiff_dist.apps.train.preview import write_preview
from msdiff_dist.apps.train.validation import Validation, store_samples, trained_shards
from msdiff_dist.apps.train.warm_start import start_weights
from msdiff_dist.checkpoint.background import BackgroundSaver
from msdiff_dist.checkpoint.resume import remove_later
from msdiff_dist.checkpoint.save import HostCopy, write_checkpoint
from msdiff_dist.data.corruption import Corruption
from msdiff_dist.data.fingerprint import check_unchanged, fingerprint_shards
from msdiff_dist.data.index import Shard
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.distributed.agree import main_exchange, on_every_rank, on_rank_0
from msdiff_dist.distributed.engines import StageParallelEngines
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.frozen_weights import keep_aside
from msdiff_dist.distributed.gpus import peak_petaflops
from msdiff_dist.distributed.groups import Groups, all_ranks, make_groups
from msdiff_dist.distributed.precision import Precision, PrecisionChoice
from msdiff_dist.distributed.progress import BUILD, OPEN, RESTORE, SAVE
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.errors import MsdiffError
from msdiff_dist.models.activation_checkpointing import checkpoint_activations
from msdiff_dist.models.attention import check_attention
from msdiff_dist.models.compilation import check_compiler, compile_part, keep_compiled_code
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.recipe import Recipe, recipe_mapping
from msdiff_dist.training.ema import ShardedEma
from msdiff_dist.training.feed import Feed
from msdiff_dist.training.metrics import Compute, StepOutcome
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.sinks import Sinks
from msdiff_dist.training.stage_progress import StageProgress
from msdiff_dist.training.state import TrainState
from msdiff_dist.training.step import TrainStep

Corrupted = dict[tuple[str, str | None], Corruption]
"""Corrupt shards and samples by place."""


class Trainer:
    """One rank's share of a run, ready to take its next step.

    Collective: every rank makes it and calls its methods in the same order.

    Of a run with phases (`apps.train.phases`) it is one phase: that after the newest checkpoint.

    Args:
        run: the recipe of the whole run; its precision must not be `auto`.
        folder: opened for this run; the run is resumed from its newest intact checkpoint.
        found: the recipe's data, if the command has read them; None: rank 0 reads them.
        corruption: what was met in the run's earlier phases since this start.

    Attributes:
        recipe: that of the phase.
        state: what checkpoints save, the number of steps done included.
        notes: lines for the user about how the run was resumed.
        step_petaflops: 1e15 floating-point operations of a step of the whole job without the guide; if steps differ,
            in the mean.
        corruption: corrupt shards and samples met since this start.

    Raises:
        UserError: on every rank, if any rank refuses the recipe, its data or the checkpoints.
    """

    def __init__(
        self,
        run: Recipe,
        folder: RunFolder,
        env: Environment,
        found: FoundData | None = None,
        corruption: Corrupted | None = None,
    ) -> None:
        assert run.train.precision != "auto", "the precision is chosen before the run is put together"
        self.run, self.folder, self.env = run, folder, env
        self.corruption: Corrupted = {} if corruption is None else corruption
        start = self._start = phase_start(run, folder, env)
        recipe = self.recipe = start.restart.recipe
        plan, self.notes = start.plan, start.notes
        self._plan, self.batch_size, self.placement = plan, plan.batch_size, plan.placement
        self.step_petaflops = start.step_petaflops
        env.progress.enter(BUILD)
        groups = self._groups = make_groups(self.placement.stages_of_rank, env.rank)
        self.engines = self._build_engines(groups)
        shards = self.engines.state() | self._parts_without_ranks()
        self.ema = ShardedEma(recipe.ema, shards, self.batch_size)
        self.progress = StageProgress(
            plan.quotas.quotas_K.tolist(),
            recipe.stages.min_samples_per_step,
            stored=start.counts_stages,
        )
        self.state = TrainState(
            recipe_mapping(recipe),
            self.batch_size,
            shards,
            self.ema.averages,
            recipe.freezing().names,
            self.progress,
            plan.batches,
        )
        # The state is restored before the data are opened: their fingerprint is compared with the checkpoint's, and the
        # feed starts at the checkpoint's step.
        env.progress.enter(RESTORE)
        self._resume()
        self.saver = BackgroundSaver(folder.checkpoints, folder.snapshots, shards, self.ema.averages, recipe.checkpoint)
        env.progress.enter(OPEN)
        index, null_context_TC = self._open_data(found)
        self._validation = self._open_validation(index)
        self.evaluations = RunEvaluations(recipe, folder.path, self.state.step, env)
        self.feed = self._build_feed(trained_shards(recipe, index), groups)
        objective = Objective(recipe.process(), recipe.train.loss, recipe.times())
        self.prepare = build_preparation(recipe, objective, null_context_TC, env)
        self.train_step = TrainStep(
            self.feed,
            self.prepare,
            objective,
            self.engines,
            plan.batches,
            env,
            max_bad=recipe.data.max_bad,
            progress=self.progress,
            guide=on_every_rank(lambda: open_guide(recipe, self.state.step, env.device)),
            corruption=self.corruption,
        )

    @property
    def rate(self) -> float:
        """Learning rate, before the schedule."""
        return self.recipe.optimizer.rate(self.batch_size)

    @property
    def peak_petaflops(self) -> float | None:
        """1e15 operations a second at the peak of all ranks' GPUs, if they are like this one; None: not known."""
        if self.env.device.type != "cuda":
            return None
        precision: Precision = "bf16" if self.recipe.train.precision == "bf16" else "fp32"
        name = torch.cuda.get_device_name(self.env.device)
        of_one = peak_petaflops(name, precision, self.recipe.train.tf32)
        return None if of_one is None else self.env.world_size * of_one

    @property
    def petaflops(self) -> float:
        """1e15 floating-point operations of all steps so far."""
        return self._start.petaflops(self.state.step, self.progress.samples)

    def compute_of(self, outcome: StepOutcome) -> Compute:
        """Floating-point operations of the step that has just ended, and of all so far."""
        guide = guide_petaflops(self._plan.guide, self.batch_size, 1) if outcome.guide_loss is not None else 0.0
        return Compute(
            step=samples_petaflops(outcome.samples_per_stage, self._plan.cost_K) + guide,
            total=self.petaflops,
        )

    def step(self, lr: float, stop_requested: bool = False) -> StepOutcome:
        """Take one optimizer step, and update the averages and the smoothed loss.

        Raises:
            TrainingError, DataError: as `TrainStep` raises them.
        """
        guided = self._plan.guide is not None and self.state.step < self._plan.guide.last_step
        outcome = self.train_step(lr, stop_requested, guided)
        self.state.step += 1
        elapsed = {f"stages.{k}.": steps for k, steps in enumerate(self.progress.elapsed)}
        self.ema.update(self.state.step, elapsed)
        self.state.ends = ends_after(self.run, self.recipe, self.state.step, self.state.ends)
        if self._validation is None:  # else checkpoints are compared by their held-out loss
            self.state.loss_average.update(self.state.step, outcome.loss)
        return outcome

    def save_if_due(self, now: bool = False) -> bool:
        """Begin the checkpoint and the snapshot that are due after the current step; if `now`, a checkpoint anyway.

        Returns whether there was one to begin.
        """
        checkpoint, snapshot = now or self.recipe.checkpoint.due(self.state.step), self.snapshot_is_due()
        if checkpoint or snapshot:
            self.save(checkpoint=checkpoint, snapshot=snapshot)
        return checkpoint or snapshot

    def save(self, *, checkpoint: bool = True, snapshot: bool = False) -> None:
        """Begin to save the current state; `saver.finish` waits for it."""
        self.env.progress.enter(SAVE)
        self.saver.save(self.state.index(self.env.world_size), checkpoint=checkpoint, snapshot=snapshot)

    def snapshot_is_due(self) -> bool:
        """Whether a snapshot of the averages of `ema.power` is due after the current step."""
        power = self.recipe.ema.power
        return power is not None and self.state.step % power.snapshot_every == 0

    def validation_is_due(self) -> bool:
        """Whether the held-out loss is to be computed after the current step."""
        config, step = self.recipe.validation, self.state.step
        return config is not None and (step == self.recipe.train.steps or step % config.every == 0)

    def validate(self) -> dict[str, Any]:
        """The held-out loss of the current weights and averages. The ranks exchange them through a folder."""
        assert self._validation is not None
        weights = self.folder.samples / f".validated_{self.state.step:08d}"
        kinds = HostCopy(self.state.shards, self.ema.averages).take(["ema", "param"])
        write_checkpoint(weights, kinds, self.state.index(self.env.world_size), main_exchange())
        found = self._validation(weights)
        self.state.loss_average.value = found["loss"]
        end, training = self.run.stages.end, self.recipe.freezing().stages
        if end and self.recipe.stages.num_stages > 1:
            self.state.ends = self.state.ends.judged(end, self.state.step, found["loss_per_stage"], training)
        return found

    def phase_is_over(self) -> bool:
        """Whether the run trains other stages from the next step on, if there is one."""
        step = self.state.step
        return step < self.run.train.steps and is_over(self.run, self.recipe, step, self.state.ends)

    def phase_event(self) -> dict[str, Any]:
        """What changes after the last step of a phase, as `StepMetrics.phase` has it."""
        ended = [k for k in sorted(self.state.ends.ended) if k not in self.recipe.stages.ended]
        return {"grown": self.recipe.stages.num_stages < self.run.stages.num_stages, "ended": ended}

    def leave(self) -> None:
        """Give back the process groups, after the end of a phase. Collective."""
        self._groups.close()

    def preview_is_due(self) -> bool:
        """Whether a grid is to be sampled after the current step."""
        every, step = self.recipe.preview.every, self.state.step
        return every > 0 and (step == self.recipe.train.steps or step % every == 0)

    def preview(self) -> Path:
        """Sample a grid with the current averages, every rank its share. The ranks exchange them through a folder.

        Returns the image file.
        """
        step = self.state.step
        weights = self.folder.samples / f".weights_{step:08d}"
        averages = HostCopy(self.state.shards, self.ema.averages).take(["ema"])
        write_checkpoint(weights, averages, self.state.index(self.env.world_size), main_exchange())
        target = self.folder.samples / f"step_{step:08d}.png"
        write_preview(self.recipe, weights, target, self.env)
        return target

    def begin_evaluation(self, sinks: Sinks) -> None:
        """Begin the evaluation that is due after the current step, if one is."""
        if self.evaluations.due(self.state.step):
            copy = HostCopy(self.state.shards, self.ema.averages)
            self.evaluations.begin(self.state.step, copy, self.state.index(self.env.world_size), sinks)

    def describe(self, precision: PrecisionChoice) -> str:
        """One line for the user: what is about to run, in which precision and why."""
        frozen = self.recipe.freezing().names
        sizes = {name: torch.Size(shape).numel() for name, shape in self.state.shapes.items()}
        trained = sum(size for name, size in sizes.items() if name not in frozen)
        count = f"{sum(sizes.values()) / 1e6:.1f} M parameters"
        count += f", {trained / 1e6:.1f} M of them trained," if frozen else ""
        scratch = f"from {self.recipe.train.init_from}" if self.recipe.train.init_from else "from scratch"
        start = f"from step {self.state.step}" if self.state.step else scratch
        return (
            f"{self.recipe.name}: {count} in {precision.precision} ({precision.why}), "
            f"{self.placement.num_stages} stages on "
            f"{self.env.world_size} ranks {list(map(list, self.placement.stages_of_rank))[:8]}, "
            f"global batch {self.batch_size}, learning rate {self.rate:g}, {start}, "
            f"run folder {self.folder.path}"
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Every rank raises this package's errors together. After any other exception the other ranks may be gone, and
        # nothing that waits for them may be finished.
        together = kind is None or issubclass(kind, MsdiffError)
        self.evaluations.close(wait=together)
        try:
            if together:
                self.saver.finish()
                self.engines.finish()
        finally:
            self.feed.close(finish=kind is None)

    def _build_engines(self, groups: Groups) -> StageParallelEngines:
        recipe, device = self.recipe, self.env.device
        held = self.placement.stages_of_rank[self.env.rank]
        shared, stages = build_parts(recipe.model, held, recipe.train.seed)
        recipe.freezing().apply(shared, stages)
        dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        on_every_rank(lambda: check_attention((shared, *stages.values()), dtype, device))
        if recipe.train.compile:
            on_every_rank(check_compiler)
            keep_compiled_code(self.folder.path / "compiled")
        for part in (shared, *stages.values()):
            checkpoint_activations(part, recipe.activation_checkpointing)
            part.to(device)
            if recipe.train.compile and any(True for _ in part.parameters()):
                compile_part(part)
        projection = build_projection(recipe, self._plan.guide)
        if projection:
            projection.module.to(device)
        return build_engines(recipe, self._plan, shared, stages, groups, device, projection)

    def _parts_without_ranks(self) -> dict[str, ShardedState]:
        """The stages that no rank computes, for checkpoints: every rank keeps a range of each in host memory."""
        computed, world = self.recipe.freezing().stages, all_ranks()
        state: dict[str, ShardedState] = {}
        for k in range(self.placement.num_stages):
            if k not in computed:
                _, built = build_parts(self.recipe.model, [k], self.recipe.train.seed)
                self.recipe.freezing().apply(nn.Identity(), built)
                # The averages of a stage that once trained are other than its weights.
                averages = self.recipe.ema.kinds if k in self.recipe.stages.ended else ()
                state[f"stages.{k}."] = ShardedState(
                    built[k], None, lambda: None, keep_aside(built[k], world, averages)
                )
        return state

    def _resume(self) -> None:
        """Restore the checkpoint, or else the weights of `train.init_from`."""
        restart, reader = self._start.restart, self._start.reader
        if reader:
            self.state.restore(on_every_rank(lambda: restart.state(reader)))
            self.state.ends = restart.ends
        elif weights := on_every_rank(lambda: start_weights(self.recipe, self.folder.checkpoints)):
            self.state.start_from(weights.read_range)
        elif self.recipe.train.freeze:
            self.notes.append("train.freeze without train.init_from: what is frozen keeps its random first weights")
        if self.env.rank == 0:
            self.folder.cut_metrics(self.state.step)
            remove_later(self.folder.snapshots, self.state.step)

    def _open_data(self, found: FoundData | None) -> tuple[list[list[Shard]], Tensor | None]:
        """The shards, read by rank 0 and compared with the checkpoint's, and the context of "no caption"."""

        def read() -> tuple[list[list[Shard]], list[list[str]], str | None, Tensor | None]:
            data, note = found or find_data(self.recipe.data), None
            fingerprint = fingerprint_shards(data.shards)
            if self.state.fingerprint:
                accept = self.recipe.data.accept_changes
                note = check_unchanged(self.state.fingerprint, fingerprint, self.state.step, accept)
            return data.shards, fingerprint, note, check_latents(self.recipe, data.manifests)

        index, self.state.fingerprint, note, null_context_TC = on_rank_0(read)
        self.notes += [note] if note else []
        return index, null_context_TC

    def _open_validation(self, index: list[list[Shard]]) -> Validation | None:
        """The held-out loss, if the recipe asks for it. Rank 0 reads the samples, once in a run."""
        recipe, config = self.recipe, self.recipe.validation
        if config is None:
            return None
        on_rank_0(lambda: store_samples(recipe, config, self.folder.path, index))
        return on_every_rank(
            lambda: Validation(self.run, config, self.folder.path, self.placement.stages_of_rank, self.env)
        )

    def _build_feed(self, index: list[list[Shard]], groups: Groups) -> Feed:
        recipe, env, start = self.recipe, self.env, self.state.step - self.state.data_began
        loader = on_every_rank(
            lambda: StepLoader(
                recipe.data,
                recipe.train.seed,
                self.batch_size,
                env.rank,
                env.world_size,
                start_batch=start,
                index=index,
            )
        )
        return build_feed(recipe, self._plan, loader, groups, env, start_batch=start)
