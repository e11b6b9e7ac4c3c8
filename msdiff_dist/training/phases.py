"""The recipe fields that change what a run trains at a step: `grow`, and `stages.end`."""

from __future__ import annotations

from dataclasses import dataclass

from msdiff_dist.bounds import check_between, check_different
from msdiff_dist.config import to_mapping
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.errors import ConfigError, raise_all
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.growing import grown_from
from msdiff_dist.training.config import MOST_STEPS, TrainConfig
from msdiff_dist.training.optimizer import OPTIMIZERS, OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """A run that begins as a unified model, and grows into the recipe's stages at a step."""

    at: int
    """Steps that the unified model trains; all steps after them train the stages, which begin as copies of it."""
    width: int | None = None
    """Base width of the unified model's decoder; null: that of the encoder."""
    attention: tuple[int, ...] | None = None
    """Downsampling factors at which the unified model's decoder has attention; null: `model.attention_downsamples`."""

    def __post_init__(self) -> None:
        check_between("at", self.at, 1, MOST_STEPS)
        check_between("width", self.width, 1, 2**31)

    def unified(self, model: ModelConfig) -> ModelConfig:
        """The unified model that grows into `model`.

        Raises:
            ConfigError: there is no such model.
        """
        if FAMILIES[model.family].decoder is None or not isinstance(model.encoder_channels, int):
            problem = "needs stages of one family, with encoders of one width"
            raise ConfigError("at", self.at, problem, "Remove the section `grow`, or make the encoders equal.")
        places = None if self.attention is None else [self.attention]
        try:
            as_wide = model.unified()
            return (
                as_wide
                if (self.width, places) == (None, None)
                else as_wide.of_widths([self.width or as_wide.decoder_channels[0]], places)
            )
        except ConfigError as e:
            name = "attention" if e.field in ("--attention", "decoder_attention") else "width"
            problem = f"makes no unified model: {e.field} = {e.value!r} {e.problem}"
            raise ConfigError(name, getattr(self, name), problem, e.remedy) from None

    def check(
        self, stages: TrainedStagesConfig, model: ModelConfig, train: TrainConfig, optimizer: OptimizerConfig
    ) -> None:
        """Refuse stages into which no unified model grows, or an optimizer whose state cannot follow.

        Raises:
            ConfigError: naming a field of the recipe.
        """
        if stages.num_stages == 1:
            raise ConfigError("grow.at", self.at, "there is one stage, and nothing to grow", "Give stages.boundaries.")
        if self.at >= train.steps:
            problem = f"is not before the run's last step, train.steps = {train.steps}"
            raise ConfigError("grow.at", self.at, problem, f"Use at most {train.steps - 1}, or remove `grow`.")
        if train.freeze:
            problem = "names parts of a model that is another before grow.at"
            raise ConfigError("train.freeze", list(train.freeze), problem, "Use `msdiff grow` and train.init_from.")
        if stages.objectives:
            problem = "is no list for stages that begin as copies of one model, which predicts the same in all of them"
            raise ConfigError("stages.objectives", to_mapping(stages.objectives), problem, "Remove it, or `grow`.")
        if stages.adaptive is not None:
            raise ConfigError(
                "stages.adaptive", "given", "adapts shares of stages that change", "Remove it, or `grow`."
            )
        try:
            unified = self.unified(model)
            resized = [name for name, how in grown_from(unified, model).items() if how and not how.is_copy]
        except ConfigError as e:
            raise e.within("grow.") from None
        chosen = OPTIMIZERS[optimizer.name]
        if resized and chosen.moments(optimizer) and not chosen.degrees:
            problem = f"makes {resized[0]} of another size, and how the state of {optimizer.name} follows is not known"
            remedy = "Use adamw, adam or sgd, or decoders as wide as the unified model's."
            raise ConfigError("grow.width", unified.decoder_channels[0], problem, remedy)


@dataclass(frozen=True, kw_only=True)
class StageEndConfig:
    """When stages stop training before the run ends."""

    at: tuple[int | None, ...] = ()
    """For each stage, stage 0 first, the steps after which it has ended; null: none. An empty list: no stage."""
    patience: int | None = None
    """A stage ends whose held-out loss has not fallen in so many validations; null: none does. The last stage that
    trains goes on to `train.steps`."""
    min_delta: float = 0.0
    """By how much of its lowest value so far a held-out loss must be lower to have fallen: 0.001 is a thousandth."""

    def __post_init__(self) -> None:
        if not self.at and self.patience is None:
            raise ConfigError("patience", None, "nor `at` says when a stage ends", "Give one of them, or omit `end`.")
        for i, step in enumerate(self.at):
            check_between(f"at[{i}]", step, 1, MOST_STEPS)
        check_between("patience", self.patience, 1, 10**6)
        if not 0 <= self.min_delta < 1:
            raise ConfigError("min_delta", self.min_delta, "must lie in [0, 1)", "Use 0.001, say.")

    def check(self, first: int, steps: int, *, validates: bool) -> None:
        """Refuse ends that cannot be.

        Args:
            first: the first step that stages train.
            steps: `train.steps`.
            validates: whether the recipe has the section `validation`.

        Raises:
            ConfigError: naming a field of the recipe.
        """
        if self.patience is not None and not validates:
            raise ConfigError(
                "stages.end.patience", self.patience, "there is no held-out loss to watch",
                "Add the section `validation`: {fraction: 0.02, every: 1000}, say.",
            )  # fmt: skip
        raise_all(
            ConfigError(
                f"stages.end.at[{k}]", step, f"is not among the steps {first} to {steps - 1} after which a stage ends",
                "Correct it, or write null for a stage that does not end.",
            )
            for k, step in enumerate(self.at)
            if step is not None and not first <= step < steps
        )  # fmt: skip
        if self.at and None not in self.at:
            problem = "ends every stage, and nothing would be trained up to train.steps"
            raise ConfigError("stages.end.at", list(self.at), problem, "Write null for one, or lower train.steps.")


@dataclass(frozen=True, kw_only=True)
class TrainedStagesConfig(StagesConfig):
    """Stages may end before the run does."""

    end: StageEndConfig | None = None
    """When stages stop training before the run ends: their samples and ranks then go to the other stages."""
    ended: tuple[int, ...] = ()
    """Stages that do not train: their decoders stay as they are, no samples are drawn of them, and no ranks compute
    them. Checkpoints of a run with `end` name here those that have ended."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_different("ended", self.ended)
        raise_all(
            ConfigError(f"ended[{i}]", k, f"is no stage: there are {self.num_stages}", "Count from 0.")
            for i, k in enumerate(self.ended)
            if not 0 <= k < self.num_stages
        )
        if self.end and self.adaptive is not None:
            raise ConfigError("adaptive", "given", "adapts shares of stages that end", "Remove it, or `end`.")
        if self.end and self.end.at and len(self.end.at) != self.num_stages:
            raise ConfigError(
                "end.at", list(self.end.at),
                f"has {len(self.end.at)} entries for the {self.num_stages} stages of boundaries = "
                f"{list(self.boundaries)}",
                f"Give {self.num_stages}, stage 0 first, null for a stage that does not end.",
            )  # fmt: skip
