"""Two kinds of DeepSpeed engine in one process: one for the shared encoder, over all ranks, and one for the decoder of
each held stage, over the ranks that hold it.

The graph is cut between them. A micro batch runs the shared encoder once, then every held stage on detached features
(forward, loss, backward, reduction inside the stage's group, stages ascending), then the gradients of the features go
back through the encoder in one backward pass, whose reduction is over the world. Every rank thus issues its collectives
in one explicit order, and groups may overlap freely. Reductions are sums of gradients of a loss divided by the GLOBAL
batch size, so they are the exact global mean whatever the sizes of the groups. This is the only file that imports
deepspeed.

A step calls `forward_backward` for every micro batch, then `agreement`, to which other code adds what the ranks must
sum, then `reduce`, which makes the global gradient norm known, then the `step` of what `reduce` returned. No optimizer
can step before the norm is known, because only the result of `reduce` has that method.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from msdiff_dist.distributed.agree import Agreement
from msdiff_dist.distributed.device_clock import DeviceClock
from msdiff_dist.distributed.groups import Groups
from msdiff_dist.distributed.precision import Precision
from msdiff_dist.distributed.zero_state import ShardedState

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed's shared-memory collective is compiled on first use (half a minute); gloo serves CPU ranks well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""From an engine's parameters to its optimizer."""
StageLoss = Callable[[int, Tensor, slice], Tensor]
"""(stage, output of its decoder, rows of the batch that the output belongs to) -> this rank's scalar loss."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engines run.

    Attributes:
        precision: of forward and backward passes; master weights and optimizer moments are fp32.
        zero_shared, zero_decoders: ZeRO levels of the two kinds of engine.
        gradient_accumulation_steps: micro batches per optimizer step.
        grad_clip: greatest norm of the gradient of the whole model; 0: no clipping.
    """

    precision: Precision
    zero_shared: int
    zero_decoders: int
    gradient_accumulation_steps: int
    grad_clip: float


class _Unit:
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
def _deepspeed_unit(unit: _Unit) -> Iterator[None]:
    """DeepSpeed keeps its `mpu` in one module global: set it around every call of an engine."""
    previous, deepspeed_groups.mpu = deepspeed_groups.mpu, unit
    try:
        yield
    finally:
        deepspeed_groups.mpu = previous


class _GradientsAt(torch.autograd.Function):
    """A scalar 0 whose backward pass hands the given gradients to the given tensors.

    DeepSpeed's engine starts a backward pass from a scalar loss only, and the encoder's starts from gradients of its
    features.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors_then_gradients: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*tensors_then_gradients[count:])
        return torch.zeros((), device=tensors_then_gradients[0].device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # DeepSpeed may scale the loss, hence the product
        return (None, *(g * grad_outputs[0].to(g.dtype) for g in ctx.saved_tensors), *[None] * ctx.count)


class _Engine:
    """One DeepSpeed engine whose reduction is a sum over its group.

    Args:
        zero: ZeRO level.
        unit: the group.
    """

    def __init__(
        self, module: nn.Module, optimizer: OptimizerFactory, zero: int, config: EngineConfig, unit: _Unit
    ) -> None:
        self.unit = unit
        self._norm: Tensor | None = None  # of the gradients of the whole model, at the boundary
        size = unit.get_data_parallel_world_size()
        # ZeRO 3 knows only the mean over the group: multiplying the loss by the group's size makes it the sum.
        self.loss_scale = float(size) if zero == 3 else 1.0
        settings: dict[str, Any] = {
            # DeepSpeed wants batch sizes whose product fits. Of these only the accumulation has an effect: losses are
            # divided by the global batch size before they reach DeepSpeed.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "train_batch_size": config.gradient_accumulation_steps * size,
            "gradient_clipping": config.grad_clip,
            "gradient_allreduce_op": "mean" if zero == 3 else "sum",
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": zero,
                "stage3_param_persistence_threshold": 0,  # every parameter is sharded, however small
                # Each gradient goes to the rank that owns it alone: half the bytes of an all-reduce.
                "use_multi_rank_bucket_allreduce": False,
            },
            "bf16": {"enabled": config.precision == "bf16"},
            "steps_per_print": 10**9,
            # DeepSpeed's clock of the throughput waits for the device twice in every micro batch.
            "timers": {"throughput": {"enabled": False}},
        }
        with _deepspeed_unit(unit):
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer(list(module.parameters())), config=settings, mpu=unit
            )
        if config.grad_clip:
            self._clip_by_the_whole_norm()

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    def __call__(self, *inputs: Any) -> Any:
        with _deepspeed_unit(self.unit):
            return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add gradients of a loss that is already divided by the global batch, hence by the accumulation too."""
        with _deepspeed_unit(self.unit):
            self.engine.backward(loss, scale_wrt_gas=False)

    def count_micro_batch(self) -> None:
        """Let DeepSpeed count a micro batch that does not complete the global batch; no optimizer steps."""
        assert not self.engine.is_gradient_accumulation_boundary()
        with _deepspeed_unit(self.unit):
            self.engine.step()

    def step(self, lr: float, norm: Tensor) -> None:
        """Step the optimizer on gradients clipped by `norm`, the gradient norm of the whole model.

        The norm is on the host, where it is known: DeepSpeed asks whether it is finite, and would wait for a device.
        """
        self._norm = norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with _deepspeed_unit(self.unit):
            self.engine.step()
        self._norm = None

    def _clip_by_the_whole_norm(self) -> None:
        """Have DeepSpeed clip by the norm that `step` is given, not by that of this engine's gradients alone.

        It asks a method of its optimizer for the norm, which is replaced on this object.
        """

        def norm(norm_type: float = 2.0) -> Tensor:
            assert self._norm is not None, "DeepSpeed asks for the norm inside `step` only"
            return self._norm

        if hasattr(self.optimizer, "_get_norm_groups"):  # ZeRO 3
            self.optimizer._get_norm_groups = lambda: [norm()]
        else:
            self.optimizer.scaled_global_norm = norm

    def gradient_square_sum(self) -> Tensor:
        """Sum of squares of the reduced gradient elements that live on this rank."""
        # After the reduction ZeRO leaves on each rank the gradients of the elements that it owns, and of no others.
        squares = torch.zeros((), device=self.engine.device)
        for gradients in self.optimizer.averaged_gradients.values():
            for g in gradients or ():
                squares += g.detach().float().square().sum()
        return squares


@dataclass(frozen=True, kw_only=True)
class ReducedGradients:
    """The gradients of one global batch, known to every rank and ready to step on.

    Attributes:
        sums: sums over the ranks of everything in the step's agreement, by name.
        norm: norm of the gradient of the whole model, before clipping.
    """

    sums: Mapping[str, Tensor]
    norm: Tensor
    _step: Callable[[float], None]

    def step(self, lr: float) -> None:
        """Step every optimizer of this rank with learning rate `lr`. Once."""
        self._step(lr)


class StageParallelEngines:
    """The shared engine and the engines of the stages this rank holds, stepping as one model.

    Args:
        shared: maps the network's inputs to a tuple of features, batch first. It may have no parameters.
        stages: for each held stage, the module that maps (a row range of) those features to the output.
        optimizer: makes a torch optimizer for a list of parameters; called once per engine.
        groups: this rank's process groups.
        device: where the modules are.

    Attributes:
        forward_clock: how long this rank computes without waiting for others: the time of its forward passes, in which
            there is no collective (under ZeRO 1 and 2). On a CPU it is this thread's computing time.
        shared: the encoder's engine, None for an encoder without parameters.
        stages: the decoders' engines by stage.
    """

    def __init__(
        self,
        shared: nn.Module,
        stages: Mapping[int, nn.Module],
        optimizer: OptimizerFactory,
        config: EngineConfig,
        groups: Groups,
        device: torch.device,
    ) -> None:
        self.config = config
        self.forward_clock = DeviceClock(device, time.thread_time)
        self._shared_module = shared
        self._device = device
        self._is_complete = False  # whether the micro batches of a global batch have all run, and no step followed
        has_parameters = any(True for _ in shared.parameters())
        # The default group itself: without a unit DeepSpeed would make another group of all ranks.
        world = _Unit(dist.distributed_c10d._get_default_group())
        self.shared = _Engine(shared, optimizer, config.zero_shared, config, world) if has_parameters else None
        self.stages: dict[int, _Engine] = {}
        for k in sorted(stages):
            self.stages[k] = _Engine(stages[k], optimizer, config.zero_decoders, config, _Unit(groups.stage[k]))

    def _engines(self) -> list[_Engine]:
        """In the order of their collectives: held stages ascending, then the shared one."""
        return [*self.stages.values(), *([self.shared] if self.shared else [])]

    def state(self) -> dict[str, ShardedState]:
        """This rank's fp32 shards, by the prefix of their parameter names in the whole model."""
        named = {f"stages.{k}.": e for k, e in self.stages.items()} | ({"shared.": self.shared} if self.shared else {})
        return {prefix: ShardedState(e.engine.module, e.optimizer) for prefix, e in named.items()}

    def forward_backward(self, inputs: Sequence[Tensor | None], rows: Mapping[int, slice], loss: StageLoss) -> None:
        """One micro batch.

        Args:
            inputs: of the shared module, all samples of this rank in one batch, sorted by stage.
            rows: for every held stage its rows of that batch, at least one each.
            loss: this rank's share of a stage's loss, already divided by the global batch size.
        """
        assert not self._is_complete, "the global batch is complete: step before the next micro batch"
        with self.forward_clock:
            features = (self.shared or self._shared_module)(*inputs)
        # Cut the graph: each stage computes on leaves of its own, and the gradients that arrive there are collected in
        # one buffer per feature. Every row belongs to exactly one stage, so each row of a buffer is written once.
        differentiable = [i for i, f in enumerate(features) if f.requires_grad]
        gradients = [torch.empty_like(features[i]) for i in differentiable]
        shared_scale = self.shared.loss_scale if self.shared else 1.0
        for k, engine in self.stages.items():
            leaves = [f.detach()[rows[k]].requires_grad_(i in differentiable) for i, f in enumerate(features)]
            with self.forward_clock:
                stage_loss = loss(k, engine(*leaves), rows[k])
            # Reduces inside the stage's group before the next stage begins: the collectives' order is that of this
            # loop.
            engine.backward(stage_loss * engine.loss_scale)
            for gradient, i in zip(gradients, differentiable, strict=True):
                leaf_grad = leaves[i].grad
                if leaf_grad is None:  # a stage without cross-attention ignores the context
                    gradient[rows[k]].zero_()
                else:
                    torch.mul(leaf_grad, shared_scale / engine.loss_scale, out=gradient[rows[k]])
        # One backward of the encoder for all stages, last of all on every rank, over the world.
        if self.shared:
            self.shared.backward(
                _GradientsAt.apply(len(differentiable), *(features[i] for i in differentiable), *gradients)
            )
        # All engines count the same micro batches, so the first speaks for all. At the boundary `step` counts the last.
        self._is_complete = bool(self._engines()[0].engine.is_gradient_accumulation_boundary())
        if not self._is_complete:
            for counted in self._engines():
                counted.count_micro_batch()

    def agreement(self) -> Agreement:
        """What the ranks sum in this step's one reduction; it already has the squares of the gradients.

        To be called after the last micro batch. Every gradient element of the encoder and of the decoders lives on
        exactly one rank, so the sum over the ranks of the squares of their own elements is the squared norm of the
        whole gradient.
        """
        assert self._is_complete, "micro batches are missing from the global batch"
        agreement = Agreement(self._device)
        squares = sum((e.gradient_square_sum() for e in self._engines()), torch.zeros((), device=self._device))
        agreement.add("gradient square sum", squares)
        return agreement

    def reduce(self, agreement: Agreement) -> ReducedGradients:
        """Sum `agreement` over the ranks. One world all_reduce."""
        sums = agreement.reduce()
        norm = sums["gradient square sum"][0].sqrt().float()
        return ReducedGradients(sums=sums, norm=norm, _step=lambda lr: self._step(lr, norm))

    def modules_with_bad_gradients(self) -> list[str]:
        """Names of the modules of which a gradient element on this rank is not finite, after the reduction."""
        named = {f"stage {k}": e for k, e in self.stages.items()} | (
            {"the shared part": self.shared} if self.shared else {}
        )
        return [name for name, e in named.items() if not e.gradient_square_sum().isfinite()]

    def _step(self, lr: float, norm: Tensor) -> None:
        for engine in self._engines():
            engine.step(lr, norm)
        self._is_complete = False
