"""What a step sends: how often, how much and when; and that nobody computes with weights that have not arrived."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.distributed.placement import plan
from msdiff_dist.distributed.plan_report import Workload, reduced_bytes
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.testing import run_distributed

pytestmark = pytest.mark.distributed

OVERLAPPING = ((0,), (0, 1), (1, 2))
REDUCTIONS = ("alltoall_base_", "_reduce_scatter_base_")  # on gloo; elsewhere
GATHER, AGREEMENT = "_allgather_base_", "allreduce_"


class Part(nn.Module):
    """A decoder, or with `as_encoder` an encoder."""

    def __init__(self, as_encoder: bool = False) -> None:
        super().__init__()
        self.inner, self.outer, self.as_encoder = nn.Linear(32, 100), nn.Linear(100, 32), as_encoder

    def forward(self, x: Tensor) -> Any:
        y = self.outer(torch.relu(self.inner(x)))
        return (y,) if self.as_encoder else y


SIZE = sum(p.numel() for p in Part().parameters())


def make_engines(
    rank: int,
    stages_of_rank: Any,
    *,
    zero: tuple[int, int] = (1, 1),
    accumulation: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Any:
    from msdiff_dist.distributed.engines import StageParallelEngines
    from msdiff_dist.distributed.groups import make_groups
    from msdiff_dist.distributed.part_engines import EngineConfig

    torch.manual_seed(0)
    parts = [Part(as_encoder=True), *(Part() for _ in range(1 + max(map(max, stages_of_rank))))]
    return StageParallelEngines(
        parts[0],
        {k: parts[1 + k] for k in stages_of_rank[rank]},
        lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        EngineConfig(
            precision=precision,
            zero_shared=zero[0],
            zero_decoders=zero[1],
            gradient_accumulation_steps=accumulation,
            grad_clip=1.0,
        ),
        make_groups(stages_of_rank, rank),
        torch.device("cpu"),
    )


def forward_backward(engines: Any, precision: str = "fp32") -> None:
    rows = {k: slice(i, i + 1) for i, k in enumerate(engines.stages)}
    x = torch.ones(len(rows), 32, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    engines.forward_backward((x,), rows, lambda k, output, _: output.float().square().sum())


def step(engines: Any, accumulation: int, precision: str = "fp32") -> None:
    for _ in range(accumulation):
        forward_backward(engines, precision)
    engines.reduce(engines.agreement()).step(0.1)


class Collectives(TorchDispatchMode):
    """Lists the collectives that are issued, with the bytes that one rank sends in each."""

    def __init__(self, issued: list[tuple[str, float]]) -> None:
        super().__init__()
        self.issued = issued

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
            size = next(dist.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject))
            whole = max(t.nbytes for t in tensors)
            self.issued.append((name, whole * (size - 1) / size))
        return func(*args, **(kwargs or {}))


CONFIGURATIONS: list[tuple[tuple[int, int], int, Literal["fp32", "bf16"]]] = [
    # ZeRO levels of the shared part and the decoders, accumulation, precision
    ((1, 1), 2, "fp32"),
    ((2, 2), 2, "fp32"),
    ((1, 2), 3, "bf16"),
]


def issued_in_a_step(rank: int, stages_of_rank: Any) -> list[list[tuple[str, float]]]:
    """In the second step of each configuration."""
    lists = []
    for zero, accumulation, precision in CONFIGURATIONS:
        engines = make_engines(rank, stages_of_rank, zero=zero, accumulation=accumulation, precision=precision)
        step(engines, accumulation, precision)
        with Collectives([]) as counted:
            step(engines, accumulation, precision)
        lists.append(counted.issued)
    return lists


def on_fake_ranks(rank: int, world_size: int) -> list[list[tuple[str, float]]]:
    """Of rank 0 of a world without the others. Its stages' groups grow with the world."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    third = world_size // 3
    return issued_in_a_step(0, ((0, 1), *[(0,)] * third, *[(1,)] * third, *[(2,)] * (world_size - 1 - 2 * third)))


def expected_counts(stages: int, zero: tuple[int, int], accumulation: int) -> dict[str, int]:
    """Of a rank that shares all of its `stages` with others: a reduction a step or a micro batch, and a gather."""
    of_level = {1: 1, 2: accumulation}
    reductions = of_level[zero[0]] + stages * of_level[zero[1]]
    return {"reductions": reductions, GATHER: 1 + stages, AGREEMENT: 1}


def counts(issued: list[tuple[str, float]]) -> dict[str, int]:
    names = ["reductions" if name in REDUCTIONS else name for name, _ in issued]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("world_size", [8, 64])
def test_counts_do_not_grow_with_the_world(world_size: int) -> None:
    (lists,) = run_ranks(on_fake_ranks, 1, world_size, preload=PRELOAD, env={"OMP_NUM_THREADS": "1"}, timeout=120)
    for issued, (zero, accumulation, _) in zip(lists, CONFIGURATIONS, strict=True):
        assert counts(issued) == expected_counts(2, zero, accumulation)


def test_counts_and_bytes_on_ranks() -> None:
    lists_W = run_distributed(issued_in_a_step, len(OVERLAPPING), OVERLAPPING)
    for i, (zero, accumulation, precision) in enumerate(CONFIGURATIONS):
        shared_stages = [1, 2, 1]  # stage 2 is held by one rank, which has nobody to reduce with
        for lists, stages in zip(lists_W, shared_stages, strict=True):
            assert counts(lists[i]) == expected_counts(stages, zero, accumulation)
        # The plan's bytes are those of rings: (g - 1) P for each pass over the P values of a part.
        sent = sum(size for lists in lists_W for name, size in lists[i] if name != AGREEMENT)
        workload = Workload(
            cost_K=[1.0] * 3,
            shared_params=SIZE,
            stage_params_K=[SIZE] * 3,
            payload_bytes=1,
            precision=precision,
            zero_shared=zero[0],
            zero_decoders=zero[1],
        )
        placement = plan(np.full((accumulation, 3), 6), [1.0] * 3, len(OVERLAPPING), OVERLAPPING)
        assert sent == pytest.approx(reduced_bytes(placement, workload), rel=0.002)  # padding


def order_of_events(rank: int) -> list[str]:
    """Gradients computed, collectives issued and results waited for in one step and the forward pass after it."""
    from msdiff_dist.distributed import flat_gradients

    engines = make_engines(rank, OVERLAPPING)
    step(engines, 1)
    events: list[str] = []

    def noted(name: str, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(self: Any) -> Any:
            events.append(name)
            return original(self)

        return call

    flat_gradients.SumScatter.wait = noted("wait for sums", flat_gradients.SumScatter.wait)  # type: ignore[method-assign]
    for name, engine in {"encoder": engines.shared, **{f"stage {k}": e for k, e in engines.stages.items()}}.items():
        for p in engine.module.parameters():
            p.register_hook(lambda gradient, name=name: events.append(name))

    class Noting(Collectives):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                events.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with Noting([]):
        step(engines, 1)
    return [event for i, event in enumerate(events) if events[i - 1] != event or i == 0]


def test_reductions_run_while_the_encoder_computes() -> None:
    events = run_distributed(order_of_events, len(OVERLAPPING))
    reduction, _ = REDUCTIONS
    assert events[1] == [
        "stage 0", reduction, "stage 1", reduction, "encoder", reduction, "wait for sums", AGREEMENT, GATHER,
    ]  # fmt: skip
    assert events[2][:4] == ["stage 1", reduction, "stage 2", "encoder"]


def after_a_late_rank(rank: int) -> tuple[list[Tensor], ...]:
    """Rank 1 steps long after rank 0, which reads the weights and computes with them at once."""
    seen = []
    for read_by_forward in (False, True):
        engines = make_engines(rank, ((0,), (0,)))
        module = engines.shared.module
        forward_backward(engines)
        gradients = engines.reduce(engines.agreement())
        if rank == 1:
            time.sleep(1)
        gradients.step(0.1)
        if read_by_forward:
            seen.append([module(torch.ones(1, 32))[0].detach()])
        else:
            seen.append([p.detach().clone() for p in engines.stages[0].module.parameters()])
    return tuple(seen)


def test_nobody_computes_with_weights_that_have_not_arrived() -> None:
    first, second = run_distributed(after_a_late_rank, 2)
    for on_first, on_second in zip(first, second, strict=True):
        for a, b in zip(on_first, on_second, strict=True):
            assert torch.equal(a, b)
