"""The phases of a run: between two steps at which its stages change, a run is that of a plain recipe.

A run with `grow` begins as a unified model; one with `stages.end` goes on without the stages that have ended. Which
phase a step belongs to follows from the recipe, and from the ends that the checkpoint holds. So a run changes its phase
by saving a checkpoint and resuming from it, in the same processes, and is resumed there by any other processes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from msdiff_dist.checkpoint.grown import GrownReader
from msdiff_dist.checkpoint.layout import CheckpointIndex
from msdiff_dist.checkpoint.load import CheckpointReader, StateReader
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.freezing import parameter_shapes
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.optimizer import OPTIMIZERS
from msdiff_dist.training.phases import TrainedStagesConfig
from msdiff_dist.training.stage_ends import StageEnds


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some steps of a run.

    Attributes:
        first, last: its steps, counted from 1; `last` by what is known of the stages' ends.
        recipe: what they train.
        about: what that is, in words; empty for a run of one phase.
    """

    first: int
    last: int
    recipe: Recipe
    about: str


def recipe_after(recipe: Recipe, step: int, ends: StageEnds) -> Recipe:
    """What a run of `recipe` trains from step `step` + 1 on.

    Args:
        ends: the ends that were decided up to `step`.
    """
    if recipe.grow and step < recipe.grow.at:
        return unified_phase(recipe)
    ended = tuple(sorted({*recipe.stages.ended, *(k for k, at in ends.ended.items() if at <= step)}))
    if ended == recipe.stages.ended:
        return recipe
    # The recipe's own placement names the ranks of stages that have ended.
    stages, parallel = replace(recipe.stages, ended=ended), replace(recipe.parallel, placement="auto")
    return replace(recipe, stages=stages, parallel=parallel)


def unified_phase(recipe: Recipe) -> Recipe:
    """What a run with `grow` trains before it grows: the unified model, on the process's own distribution of times."""
    assert recipe.grow is not None
    return replace(
        recipe,
        model=recipe.grow.unified(recipe.model),
        stages=TrainedStagesConfig(),
        parallel=replace(recipe.parallel, placement="auto"),
        grow=None,
    )


def first_phase(recipe: Recipe) -> Recipe:
    """What the first step of a run trains."""
    return recipe_after(recipe, 0, StageEnds())


def is_over(run: Recipe, phase: Recipe, step: int, ends: StageEnds) -> bool:
    """Whether a run, of which `phase` is trained, trains something else from step `step` + 1 on."""
    if run.grow and phase.stages.num_stages == 1:
        return step >= run.grow.at
    return any(k not in phase.stages.ended and at <= step for k, at in ends.ended.items())


def ends_after(run: Recipe, phase: Recipe, step: int, ends: StageEnds) -> StageEnds:
    """The ends, with those that the recipe fixes for `step`, at which `phase` is trained."""
    end = run.stages.end
    if end is None or phase.stages.num_stages == 1:
        return ends
    late = [k for k, at in enumerate(end.at) if at == step]
    return ends.with_ended(late, step, phase.freezing().stages) if late else ends


def phases(recipe: Recipe, ends: StageEnds | None = None) -> list[Phase]:
    """The phases of a run, as far as they are known: what the recipe fixes, and `ends`.

    Args:
        ends: what was decided so far; None: nothing.
    """
    ends = ends or StageEnds()
    end, grow, steps = recipe.stages.end, recipe.grow, recipe.train.steps
    fixed = [at for at in (end.at if end else ()) if at is not None]
    starts = sorted({0, *fixed, *ends.ended.values(), *([grow.at] if grow else [])})
    found: list[Phase] = []
    current = first_phase(recipe)
    for start in (start for start in starts if start < steps):
        ends = ends_after(recipe, current, start, ends)
        if start and not is_over(recipe, current, start, ends):
            continue  # of an end that did not come, because its stage was the last that trained
        current = recipe_after(recipe, start, ends)
        found = [*found[:-1], *(replace(phase, last=start) for phase in found[-1:])]
        found.append(Phase(first=start + 1, last=steps, recipe=current, about=""))
    return found if len(found) == 1 else [replace(phase, about=_about(phase.recipe)) for phase in found]


def warnings_of(run: Recipe) -> list[str]:
    """What its phases do that the user may not expect."""
    if run.stages.end and run.model.share_encoder and "shared" not in run.train.freeze:
        return [
            "stages.end ends stages while the encoder they share trains on, which changes what they compute; watch "
            "validation.loss_per_stage, or use model.share_encoder: false (docs/guides/grow.md)"
        ]
    return []


def _about(recipe: Recipe) -> str:
    K, ended = recipe.stages.num_stages, recipe.stages.ended
    if K == 1:
        return "unified"
    return f"{K} stages" + (f" without {', '.join(map(str, ended))}" if ended else "")


class Restart:
    """Where a run goes on: the phase after its newest checkpoint, and that checkpoint's state as the phase has it.

    Args:
        index: of the checkpoint; None: the run begins.

    Attributes:
        step: steps done.
        ends: the ends so far.
        recipe: what is trained next.
        before: a recipe of the model in the checkpoint, which is another one where the run grows now.

    Raises:
        ConfigError: the recipe changes stages at a step that the run has passed.
    """

    def __init__(self, run: Recipe, index: CheckpointIndex | None) -> None:
        self._run, self.step = run, index.step if index else 0
        # One that was saved at the step of growing has the unified model.
        self._unified = (
            run.grow is not None
            and index is not None
            and not any(name.startswith("stages.1.") for name in index.shapes)
        )
        self.ends = StageEnds.of(index.stage_ends if index else {})
        self.recipe = recipe_after(run, self.step, self.ends)
        if index:
            self._check(index)
        # An end may have been added to the recipe for this very step.
        self.ends = ends_after(run, self.recipe, self.step, self.ends)
        self.recipe = recipe_after(run, self.step, self.ends)
        self.before = unified_phase(run) if self._unified else self.recipe

    def state(self, reader: CheckpointReader) -> StateReader:
        """The state in the checkpoint, for the model of `recipe`."""
        run = self._run
        if run.grow is None or not self._unified or self.recipe.stages.num_stages == 1:
            return reader
        degrees = OPTIMIZERS[run.optimizer.name].degrees
        return GrownReader(reader, run.grow.unified(run.model), run.model, degrees, run.train.seed)

    def _check(self, index: CheckpointIndex) -> None:
        grow, end, step = self._run.grow, self._run.stages.end, index.step
        if grow is not None:
            if self._unified and step > grow.at:
                problem = f"has passed: the run is at step {step} and has not grown"
                raise ConfigError("grow.at", grow.at, problem, f"Use {step} to grow now, or a later step.")
            if not self._unified and step < grow.at:
                problem = f"is to come, but the run is at step {step} and has its stages already"
                raise ConfigError("grow.at", grow.at, problem, "Restore the step at which it grew.")
            if not self._unified and (at := (index.recipe.get("grow") or {}).get("at")) != grow.at:
                done = f"grew after step {at}" if at else "began with its stages"
                remedy = f"Restore {at}." if at else "Remove the section `grow`."
                raise ConfigError("grow.at", grow.at, f"has passed: the run {done}", remedy)
        training = self.recipe.freezing().stages
        for k, at in enumerate(end.at if end else ()):
            if at is not None and at < step and k in training and len(training) > 1:
                problem = f"has passed: the run is at step {step}, and stage {k} trains"
                raise ConfigError(f"stages.end.at[{k}]", at, problem, f"Use {step} to end it now, or a later step.")


def first_shapes(run: Recipe) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the parameters of the model with which a run begins, by name."""
    return parameter_shapes(first_phase(run).model)
