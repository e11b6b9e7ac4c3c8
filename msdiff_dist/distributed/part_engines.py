"""DeepSpeed's engine of one part of the model: the shared encoder, or the decoder of one stage.

DeepSpeed partitions a part's weights, fp32 master weights and optimizer state over the ranks of its group. Under ZeRO 1
and 2 gradients and weights are communicated by `flat_gradients`: DeepSpeed itself reduces with one collective for each
rank of the group, in the training precision, and waits for each. Under ZeRO 3, whose weights are gathered layer by
layer in the forward and backward passes, DeepSpeed does it all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msdiff_dist.distributed.deepspeed_engine import GroupUnit, deepspeed_engine, deepspeed_unit
from msdiff_dist.distributed.flat_gradients import FlatPart
from msdiff_dist.distributed.frozen_weights import keep_in_zero3, keep_whole, trained_parameters, zero3_ranges
from msdiff_dist.distributed.precision import Precision
from msdiff_dist.distributed.zero_state import ShardedState

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""From an engine's parameters to its optimizer."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engines run.

    Attributes:
        precision: of forward and backward passes. Master weights, optimizer moments, and the sums of gradients over
            micro batches and ranks are fp32.
        zero_shared, zero_decoders: ZeRO levels of the two kinds of engine.
        gradient_accumulation_steps: micro batches per optimizer step.
        grad_clip: greatest norm of the gradient of the whole model; 0: no clipping.
    """

    precision: Precision
    zero_shared: int
    zero_decoders: int
    gradient_accumulation_steps: int
    grad_clip: float

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations in forward and backward passes."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def make_engine(
    module: nn.Module,
    optimizer: OptimizerFactory,
    zero: int,
    config: EngineConfig,
    group: dist.ProcessGroup,
    gathers: bool = False,
) -> PartEngine:
    """The engine of `module` over `group`, under ZeRO level `zero`. Collective in the group.

    The parameters that require no gradient are frozen; a module of which all are has no DeepSpeed engine.

    Args:
        gathers: whether gradients may wait for those of later batches; not under level 3.
    """
    if not trained_parameters(module):
        return _FrozenEngine(module, config, group)
    if zero == 3:
        assert not gathers, "ZeRO 3 has no gradients that wait"
        return _Zero3Engine(module, optimizer, config, group)
    return _FlatEngine(module, optimizer, zero, config, group, gathers)


class PartEngine(ABC):
    """A part of the model, sharded over a group. Gradients are sums over the group."""

    trains = True
    """Whether it has gradients, a reduction and an optimizer."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The part, with the weights after the last step."""

    @abstractmethod
    def wait_for_weights(self) -> None:
        """Wait until the weights after the last step have arrived, as the forward pass does anyway."""

    @abstractmethod
    def __call__(self, *inputs: Any) -> Any:
        """The part's forward pass."""

    @abstractmethod
    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, is_last: bool) -> None:
        """Add the gradients of a micro batch.

        Args:
            gradients: of the loss, for each output; None: the output is the loss itself. The loss must be divided by
                the global batch size, hence by the accumulation too.
            is_last: whether this is the step's last micro batch.
        """

    @abstractmethod
    def no_backward(self, is_last: bool) -> None:
        """Take part in a micro batch of which this rank has no samples, as `backward` does with gradients of zero."""

    @abstractmethod
    def reduced_gradients(self) -> list[Tensor]:
        """The reduced gradient elements that live on this rank, each on exactly one rank of the group."""

    @abstractmethod
    def step(self, lr: float, norm: float) -> None:
        """Step the optimizer on gradients clipped by `norm`, the gradient norm of the whole model."""

    @abstractmethod
    def state(self) -> ShardedState:
        """This rank's fp32 shards."""

    def gather(self, samples: int) -> None:
        """Let the reduced gradients, of a batch with so many samples of the part's stage, wait instead of stepping."""
        raise AssertionError("this engine was not made to gather gradients")

    def join(self, samples: int, gathered: int) -> None:
        """Replace the reduced gradients by their mean with those that wait, which weigh as many samples as they are of.

        Args:
            samples, gathered: numbers of samples of the new gradients, and of those that wait.
        """
        raise AssertionError("this engine was not made to gather gradients")

    def gradient_square_sum(self) -> Tensor:
        """Sum of squares of `reduced_gradients`, a float64 scalar on the device."""
        # float64: on CPUs the norm of 50 million numbers loses three digits in fp32.
        norms = torch._foreach_norm(self.reduced_gradients(), 2, torch.float64)
        return torch.stack(norms).square().sum()


def _sharded(
    module: nn.Module, optimizer: OptimizerFactory, config: EngineConfig, unit: GroupUnit, settings: dict[str, Any]
) -> Any:
    """DeepSpeed's engine of the parameters that train."""
    return deepspeed_engine(
        module,
        optimizer(trained_parameters(module)),
        unit,
        config.precision,
        config.gradient_accumulation_steps,
        settings,
    )


class _FrozenEngine(PartEngine):
    """A part that does not train, whole on every rank. Gradients pass through it to its inputs."""

    trains = False

    def __init__(self, module: nn.Module, config: EngineConfig, group: dist.ProcessGroup) -> None:
        self._frozen = keep_whole(module, group, config.dtype)
        self._module = module.to(config.dtype)

    @property
    def module(self) -> nn.Module:
        return self._module

    def wait_for_weights(self) -> None:
        return

    def __call__(self, *inputs: Any) -> Any:
        return self._module(*inputs)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, is_last: bool) -> None:
        torch.autograd.backward(outputs, gradients)

    def no_backward(self, is_last: bool) -> None:
        return

    def reduced_gradients(self) -> list[Tensor]:
        return []

    def step(self, lr: float, norm: float) -> None:
        return

    def state(self) -> ShardedState:
        return ShardedState(self._module, None, lambda: None, self._frozen)


class _FlatEngine(PartEngine):
    """ZeRO 1 and 2: DeepSpeed partitions the weights and the optimizer's state; `FlatPart` communicates.

    The two levels differ in the gradients that a rank keeps between micro batches: all of them, or its own range.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerFactory,
        zero: int,
        config: EngineConfig,
        group: dist.ProcessGroup,
        gathers: bool,
    ) -> None:
        self._module, self._grad_clip = module, config.grad_clip
        self._frozen = keep_whole(module, group, config.dtype)
        # Without contiguous gradients DeepSpeed's ZeRO 1 sets no hooks on the gradients and allocates no buckets.
        sharding = {"stage": 1, "contiguous_gradients": False, "overlap_comm": False}
        engine = _sharded(module, optimizer, config, GroupUnit(group), {"zero_optimization": sharding})
        self._optimizer = engine.optimizer
        self._parts = [
            FlatPart(weights, parameters, group, reduce_each=zero == 2)
            for weights, parameters in zip(self._optimizer.bit16_groups_flat, self._optimizer.bit16_groups, strict=True)
        ]
        # Sums of waiting gradients times their numbers of samples, of this rank's ranges.
        self._gathered = [torch.zeros_like(p.own_weights, dtype=torch.float32) for p in self._parts] if gathers else []
        # Whoever calls the module, computes with weights that have arrived.
        module.register_forward_pre_hook(lambda *_: self.wait_for_weights())

    @property
    def module(self) -> nn.Module:
        self.wait_for_weights()
        return self._module

    def wait_for_weights(self) -> None:
        for part in self._parts:
            part.wait_for_weights()

    def __call__(self, *inputs: Any) -> Any:
        return self._module(*inputs)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, is_last: bool) -> None:
        for part in self._parts:
            part.open_gradients()
        torch.autograd.backward(outputs, gradients)
        for part in self._parts:
            part.close_gradients(is_last)

    def no_backward(self, is_last: bool) -> None:
        for part in self._parts:
            part.open_gradients()
            part.close_gradients(is_last)

    def gather(self, samples: int) -> None:
        for part, gathered in zip(self._parts, self._gathered, strict=True):
            gathered.add_(part.take_gradient(), alpha=samples)

    def join(self, samples: int, gathered: int) -> None:
        for part, waiting in zip(self._parts, self._gathered, strict=True):
            part.gradient.mul_(samples).add_(waiting).div_(samples + gathered)
            waiting.zero_()

    def reduced_gradients(self) -> list[Tensor]:
        return [part.gradient for part in self._parts]

    def step(self, lr: float, norm: float) -> None:
        scale = min(1.0, self._grad_clip / (norm + 1e-6)) if self._grad_clip else 1.0
        masters: list[Tensor] = self._optimizer.single_partition_of_fp32_groups
        for part, master in zip(self._parts, masters, strict=True):
            master.grad = part.take_gradient().mul_(scale)
        optimizer: torch.optim.Optimizer = self._optimizer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._publish()

    def state(self) -> ShardedState:
        return ShardedState(self._module, self._optimizer, self._publish, self._frozen, self._gathered)

    def _publish(self) -> None:
        """Give all ranks the network's weights of this rank's fp32 weights."""
        for part, master in zip(self._parts, self._optimizer.single_partition_of_fp32_groups, strict=True):
            part.publish(master.detach())


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
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # the factor of the loss, hence the product
        return (None, *(g * grad_outputs[0].to(g.dtype) for g in ctx.saved_tensors), *[None] * ctx.count)


_gradients_at: Callable[..., Tensor] = _GradientsAt.apply  # not all versions of torch give it a type


class _Zero3Engine(PartEngine):
    """ZeRO 3, by DeepSpeed alone."""

    def __init__(
        self, module: nn.Module, optimizer: OptimizerFactory, config: EngineConfig, group: dist.ProcessGroup
    ) -> None:
        self._unit, self._size = GroupUnit(group), dist.get_world_size(group)
        self._norm: Tensor | None = None  # of the gradients of the whole model, inside `step`
        settings = {
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,  # every parameter is sharded, however small
                # By default a gigabyte in bf16.
                "reduce_bucket_size": sum(p.numel() for p in trained_parameters(module)),
            },
            "gradient_clipping": config.grad_clip,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        masters = zero3_ranges(module, group) if config.precision == "bf16" else None
        self._engine = _sharded(module, optimizer, config, self._unit, settings)
        self._frozen = keep_in_zero3(module, group, masters)
        # DeepSpeed asks a method of its optimizer for the norm by which it clips, and would take that of this engine's
        # gradients alone.
        self._engine.optimizer._get_norm_groups = self._whole_norm

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    def wait_for_weights(self) -> None:
        return  # each layer's weights are gathered where they are used

    def __call__(self, *inputs: Any) -> Any:
        with deepspeed_unit(self._unit):
            return self._engine(*inputs)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, is_last: bool) -> None:
        (loss,) = (_gradients_at(len(outputs), *outputs, *gradients),) if gradients is not None else outputs
        with deepspeed_unit(self._unit):
            # DeepSpeed takes the mean over the group: multiplying the loss by the group's size makes it the sum.
            self._engine.backward(loss * self._size, scale_wrt_gas=False)
            if not is_last:
                self._engine.step()  # counts the micro batch; no optimizer steps

    def no_backward(self, is_last: bool) -> None:
        raise AssertionError("under ZeRO 3 every rank has samples in every micro batch")

    def reduced_gradients(self) -> list[Tensor]:
        return [g for gradients in self._engine.optimizer.averaged_gradients.values() for g in gradients or ()]

    def step(self, lr: float, norm: float) -> None:
        self._norm = torch.tensor(norm)  # on the host: DeepSpeed asks whether it is finite, and would wait for a device
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with deepspeed_unit(self._unit):
            self._engine.step()
        self._norm = None

    def state(self) -> ShardedState:
        return ShardedState(self._engine.module, self._engine.optimizer, self._publish, self._frozen)

    def _whole_norm(self) -> list[Tensor]:
        assert self._norm is not None, "DeepSpeed asks for the norm inside `step` only"
        return [self._norm]

    def _publish(self) -> None:
        """Copy the fp32 weights to the network's parameters on all ranks, as DeepSpeed does at the end of a step."""
        optimizer = self._engine.optimizer
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
