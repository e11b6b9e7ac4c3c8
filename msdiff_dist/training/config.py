"""The recipe section `train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msdiff_dist.bounds import check_between, check_seed
from msdiff_dist.errors import ConfigError

MOST_STEPS, _MOST_ACCUMULATED = 10**9, 10**5
_LONGEST_S = 1e9  # thirty years; process groups count in 64 bits of nanoseconds


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, with which batch sizes and in which precision.

    If both batch sizes are given, global = micro x ranks x accumulation must hold.
    """

    steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int | None = None
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int | None = None
    """Mean number of samples per rank in a micro batch, instead of `global_batch_size`."""
    init_from: str | None = None
    """Export, or checkpoint (its averages), whose weights training starts from instead of random ones. The run's own
    checkpoints come first."""
    freeze: tuple[str, ...] = ()
    """What does not train: parameters and modules by name (`shared`, `stages.0`, `stages.1.out`), or by patterns with
    `*`, `?` and `[...]` (`stages.*.out.*`; `*` matches dots too). If the shared part is among them, a stage without
    trained parameters has no ranks, and its samples are not drawn."""
    gradient_accumulation_steps: int = 1
    """Micro batches per optimizer step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of forward and backward passes; master weights, optimizer moments and averages are always fp32. `auto`
    is bf16 where the devices of all ranks compute it natively, else fp32; the run keeps what its first start chose."""
    seed: int = 0
    """Seed of first weights, sample order, times and noise."""
    condition_dropout: float = 0.0
    """Probability of training a sample without its class and caption, for classifier-free guidance."""
    loss: Literal["l2", "l1"] = "l2"
    """Error of each output element: squared (`l2`) or absolute (`l1`)."""
    channels_last: bool | None = None
    """Whether activations have the channels of a pixel side by side in memory. null: on GPUs, whose convolutions are
    fastest with it, and not on CPUs."""
    tf32: bool = False
    """In fp32 on GPUs, round the factors of matrix products and convolutions to TF32, which has 10 bits of mantissa."""
    compile: bool = False
    """Compile encoder and decoders by torch.compile, which takes minutes at the first start. Not with ZeRO 3 or
    activation checkpointing."""
    threads: int = 0
    """CPU threads per rank; 0 takes OMP_NUM_THREADS, or else the rank's share of the cores that it may use."""
    device: Literal["auto", "cuda"] = "auto"
    """`cuda` refuses to start where a rank sees no GPU; `auto` trains on CPUs there. Launched jobs that asked for GPUs
    refuse too."""
    timeout_s: float = 600.0
    """Seconds that a rank may wait for the others in a step. The ranks that keep them waiting are named then; a rank
    whose process or host is gone is named within half a minute."""
    start_timeout_s: float = 1800.0
    """The same while the run starts, saves and draws previews; at least `timeout_s`."""

    def __post_init__(self) -> None:
        if self.global_batch_size is None and self.micro_batch_size is None:
            raise ConfigError("global_batch_size", None, "is required and missing", "Give it, or micro_batch_size.")
        check_between("steps", self.steps, 1, MOST_STEPS)
        check_between("gradient_accumulation_steps", self.gradient_accumulation_steps, 1, _MOST_ACCUMULATED)
        for field in ("global_batch_size", "micro_batch_size"):  # plans compare them with memory
            check_between(field, getattr(self, field), 1, 2**63)
        if self.init_from is not None and not self.init_from.strip():
            raise ConfigError("init_from", self.init_from, "is empty", "Name a folder, or write null.")
        check_seed("seed", self.seed)
        if not 0 <= self.condition_dropout < 1:
            raise ConfigError("condition_dropout", self.condition_dropout, "must lie in [0, 1)", "LDM uses 0.1.")
        check_between("threads", self.threads, 0, 4096)
        for field in ("timeout_s", "start_timeout_s"):
            if not getattr(self, field) > 0:
                raise ConfigError(field, getattr(self, field), "must be above 0", "Leave it out for the default.")
            check_between(field, getattr(self, field), 0.01, _LONGEST_S)

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
