"""What a recipe says about its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msdiff_dist.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions to train.

    With both batch sizes, global = micro x ranks x accumulation must hold.

    Args:
        steps: optimizer steps.
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: instead: the mean number of samples per rank in a micro batch.
        init_from: an export, or a checkpoint (its averages), whose weights training starts from, instead of random
            ones; the run's own checkpoints come first.
        gradient_accumulation_steps: micro batches per optimizer step.
        precision: of the computation; masters, moments and averages are always fp32.
        seed: of weights, sample order, times and noise.
        condition_dropout: probability of training a sample without its class and caption, for guidance.
        loss: of each element.
        channels_last: memory format of the network's inputs; faster convolutions on most GPUs.
        threads: CPU threads per rank, 0 to share the cores evenly.
        timeout_s: how long a collective may wait.
    """

    steps: int
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    init_from: str | None = None
    gradient_accumulation_steps: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    condition_dropout: float = 0.0
    loss: Literal["l2", "l1"] = "l2"
    channels_last: bool = False
    threads: int = 0
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.global_batch_size is None and self.micro_batch_size is None:
            raise ConfigError("global_batch_size", None, "is required and missing", "Give it, or micro_batch_size.")
        for field in ("steps", "global_batch_size", "micro_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(field, value, "must be at least 1", "Give a positive number.")
        if not 0 <= self.condition_dropout < 1:
            raise ConfigError("condition_dropout", self.condition_dropout, "must lie in [0, 1)", "LDM uses 0.1.")
        if self.threads < 0 or self.timeout_s <= 0:
            field = "threads" if self.threads < 0 else "timeout_s"
            raise ConfigError(field, getattr(self, field), "must not be negative", "Leave it out for the default.")

    def batch_size(self, world_size: int) -> int:
        """Samples per optimizer step on `world_size` ranks.

        Raises:
            ConfigError: both sizes are given and contradict each other.
        """
        if self.micro_batch_size is None:
            assert self.global_batch_size is not None
            return self.global_batch_size
        product = self.micro_batch_size * world_size * self.gradient_accumulation_steps
        if self.global_batch_size not in (None, product):
            raise ConfigError(
                "train.global_batch_size", self.global_batch_size,
                f"is not micro_batch_size x ranks x accumulation = {self.micro_batch_size} x {world_size} x "
                f"{self.gradient_accumulation_steps} = {product}",
                "Leave one of train.global_batch_size and train.micro_batch_size out (null).",
            )  # fmt: skip
        return product
