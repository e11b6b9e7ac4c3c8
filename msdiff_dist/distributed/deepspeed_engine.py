"""DeepSpeed as this package calls it: an engine over any process group. Only this file imports deepspeed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from msdiff_dist.distributed.precision import Precision

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed's shared-memory collective is compiled on first use (half a minute); gloo serves CPU ranks well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class GroupUnit:
    """The methods that DeepSpeed calls on an `mpu` (model parallel unit, Megatron's term): an engine's group is data
    parallel, and nothing is model parallel."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


@contextmanager
def deepspeed_unit(unit: GroupUnit) -> Iterator[None]:
    """DeepSpeed keeps its `mpu` in one module global: set it around every call of an engine."""
    previous, deepspeed_groups.mpu = deepspeed_groups.mpu, unit
    try:
        yield
    finally:
        deepspeed_groups.mpu = previous


def deepspeed_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    unit: GroupUnit,
    precision: Precision,
    accumulation: int,
    settings: dict[str, Any],
) -> Any:
    """DeepSpeed's engine of `module` over the unit's group. Collective in the group.

    Args:
        optimizer: of the parameters that train.
        accumulation: micro batches per optimizer step.
        settings: in DeepSpeed's words, besides those that all engines have.
    """
    settings = settings | {
        # DeepSpeed wants batch sizes whose product fits. Of these only the accumulation has an effect: losses are
        # divided by the global batch size before they reach DeepSpeed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * unit.get_data_parallel_world_size(),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
        # DeepSpeed's clock of the throughput waits for the device twice in every micro batch.
        "timers": {"throughput": {"enabled": False}},
    }
    with deepspeed_unit(unit):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=unit)
    return engine
