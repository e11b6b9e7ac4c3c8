"""The state that a plan predicts for each rank is what the engines and averages hold there."""

from __future__ import annotations

import gc
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msdiff_dist.distributed.engine_costs import Workload
from msdiff_dist.distributed.placement import plan
from msdiff_dist.testing import run_distributed

pytestmark = pytest.mark.distributed

STAGES_OF_RANK = ((0,), (0, 1), (1,))
CONFIGURATIONS: list[tuple[Literal["fp32", "bf16"], int, int]] = [("bf16", 2, 2), ("fp32", 1, 1), ("fp32", 3, 2)]


class Part(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, width), nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)))


class Shared(Part):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (super().forward(x),)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def live_bytes() -> int:
    """Bytes of the storages of all tensors of this process, whoever holds them."""
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor) and t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def held_bytes_of_all(rank: int) -> list[tuple[int, int]]:
    return [held_bytes(rank, *configuration) for configuration in CONFIGURATIONS]


def held_bytes(rank: int, precision: Literal["fp32", "bf16"], zero_shared: int, zero_decoders: int) -> tuple[int, int]:
    """Bytes of weights, moments and averages after a step, and of all that was made since the start before the next."""
    from msdiff_dist.distributed.engines import ReducedGradients, StageParallelEngines
    from msdiff_dist.distributed.groups import make_groups
    from msdiff_dist.distributed.part_engines import EngineConfig
    from msdiff_dist.training.ema import EmaConfig, ShardedEma

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = live_bytes()
    torch.manual_seed(0)
    shared, stages = Shared(300), {k: Part(100 * (k + 1)) for k in STAGES_OF_RANK[rank]}
    engines = StageParallelEngines(
        shared,
        stages,
        lambda params: torch.optim.AdamW(params, lr=1e-3),
        EngineConfig(
            precision=precision,
            zero_shared=zero_shared,
            zero_decoders=zero_decoders,
            gradient_accumulation_steps=1,
            grad_clip=1.0,
        ),
        make_groups(STAGES_OF_RANK, rank),
        torch.device("cpu"),
    )
    state = engines.state()
    ema = ShardedEma(EmaConfig(), state, batch_size=8)
    rows = {k: slice(i, i + 1) for i, k in enumerate(stages)}

    def reduced() -> ReducedGradients:
        x = torch.randn(len(rows), 32, dtype=dtype)
        engines.forward_backward((x,), rows, lambda k, out, _: out.float().square().sum())
        return engines.reduce(engines.agreement())

    reduced().step(1e-3)
    parts = [shared, *stages.values()]
    tensors = [getattr(p, "ds_tensor", p) for part in parts for p in part.parameters()]
    for sharded in state.values():
        tensors += [*sharded.flats(), *(t for moments in sharded.moments() for t in moments.values())]
    tensors += [t for shards in ema.averages["ema"].values() for t in shards]
    distinct = {t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size(): t for t in tensors}
    gradients = reduced()
    with_gradients = live_bytes() - before
    gradients.step(1e-3)
    return sum(t.numel() * t.element_size() for t in distinct.values()), with_gradients


def test_predicted_state_is_what_the_engines_hold() -> None:
    from msdiff_dist.distributed.memory import rank_bytes_W
    from tests.unit.distributed.traces import model_trace

    placement = plan(np.array([[6, 6]]), [1.0, 1.0], 3, STAGES_OF_RANK)
    held = run_distributed(held_bytes_of_all, 3)
    for i, (precision, zero_shared, zero_decoders) in enumerate(CONFIGURATIONS):
        workload = Workload(
            cost_K=[1.0, 1.0],
            shared_params=size(Shared(300)),
            stage_params_K=[size(Part(100)), size(Part(200))],
            payload_bytes=1,
            precision=precision,
            zero_shared=zero_shared,
            zero_decoders=zero_decoders,
        )
        state_W = [of_rank.state for of_rank in rank_bytes_W(placement, workload, model_trace(2))]
        assert state_W == pytest.approx([of_rank[i][0] for of_rank in held], rel=0.02)  # padding
        if i == 0:  # later ones find what DeepSpeed keeps of earlier engines
            # When the optimizers are about to step, a rank holds besides its state the fp32 gradients that it owns.
            gradients = 4 * (size(Shared(300)) / 3 + np.array([0.5, 0.5, 0]) * size(Part(100)))
            gradients += 4 * np.array([0, 0.5, 0.5]) * size(Part(200))
            assert [of_rank[i][1] for of_rank in held] == pytest.approx((state_W + gradients).tolist(), rel=0.02)
