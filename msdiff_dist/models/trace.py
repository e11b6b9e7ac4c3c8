"""What the parts of a model allocate and compute in a training step, found without computing anything.

The real modules run forward and backward on fake tensors, which have shapes but no data, while a dispatch mode records
the birth and death of every storage and the work of every operator. All of these are affine in the number of samples,
so two traces of a few samples give the numbers for any batch.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from msdiff_dist.models.activation_checkpointing import ActivationCheckpointingConfig, checkpoint_activations
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.freezing import freezing
from msdiff_dist.models.gpu_operators import compute_as_gpus_do
from msdiff_dist.models.multistage_unet import build_parts

_ROWS = (2, 3)
"""Samples of the two traces. One sample would be special: its tensors are contiguous in every order of dimensions."""

aten = torch.ops.aten

_NO_KERNELS = {
    "detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh",
    "device", "_reshape_alias",
}  # fmt: skip
"""Operators that compute nothing, besides views."""

_CONVOLUTIONS = {"convolution", "convolution_backward"}

_MORE_READS = {"native_group_norm": 1, "native_group_norm_backward": 1, "native_layer_norm_backward": 1}
"""Operators that read their inputs more often than once, and how often more: statistics first, then the result."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Work of the operators of one part, in the order in which they run; for each the constant and the part per sample.

    Attributes:
        flops_N2: floating-point operations of matrix products and convolutions.
        bytes_N2: bytes read and written.
        layout_bytes_N2: bytes of a convolution's images: what is read and written once more where they must change
            their memory format for the kernel.
    """

    flops_N2: np.ndarray
    bytes_N2: np.ndarray
    layout_bytes_N2: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PartTrace:
    """One forward and one backward pass of a part of the model.

    Parameters and their gradients are not counted, nor are the inputs of the part and the gradients of its outputs. The
    gradients of its inputs are.

    Attributes:
        growth_E2: bytes by which memory grows at each of E events: the constant, and the part per sample.
        forward_events: how many of the events belong to the forward pass.
        output_bytes_2: bytes of the outputs that can have gradients.
        kernels: of both passes.
    """

    growth_E2: np.ndarray
    forward_events: int
    output_bytes_2: np.ndarray
    kernels: Kernels

    def memory(self, rows: int) -> PartMemory:
        """Bytes at the turning points of a pass over `rows` samples."""
        live_E = (self.growth_E2 @ np.array([1, rows])).cumsum()
        forward, backward = live_E[: self.forward_events], live_E[self.forward_events :]
        kept = int(forward[-1]) if len(forward) else 0
        return PartMemory(
            forward_peak=int(forward.max(initial=0)),
            kept=kept,
            backward_peak=int(backward.max(initial=kept)),
            left=int(live_E[-1]) if len(live_E) else 0,
            outputs=int(self.output_bytes_2 @ np.array([1, rows])),
        )


@dataclass(frozen=True, kw_only=True)
class PartMemory:
    """Bytes of activations of one part.

    Attributes:
        forward_peak: the most during the forward pass.
        kept: after it, for the backward pass; the outputs are among them.
        backward_peak: the most during the backward pass.
        left: after it: the outputs, and the gradients of the inputs.
        outputs: the outputs that can have gradients, and so the gradients of these.
    """

    forward_peak: int
    kept: int
    backward_peak: int
    left: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class ModelTrace:
    """The passes of the shared encoder (nothing in a model without one) and of each stage's part."""

    shared: PartTrace
    stages: tuple[PartTrace, ...]


@lru_cache(maxsize=64)
def trace_model(
    config: ModelConfig,
    latent_size: tuple[int, int],
    context_tokens: int,
    dtype: torch.dtype,
    checkpointing: ActivationCheckpointingConfig,
    *,
    on_gpus: bool,
    channels_last: bool = False,
    freeze: tuple[str, ...] = (),
) -> ModelTrace:
    """Trace the parts of a model as the training step runs them: the graph is cut between encoder and decoders.

    Inputs that checkpointing offloads to the host are counted as if they stayed.

    Args:
        latent_size: height and width of the input.
        context_tokens: length of the context, where the model takes one.
        dtype: of parameters and inputs.
        on_gpus: trace what runs on a GPU: attention in one fused kernel unless the configuration asks for `math`, and
            what `compute_as_gpus_do` changes.
        freeze: what does not train (`train.freeze`). Of a stage whose samples train nothing only the forward pass is
            traced.
    """
    backend = config.attention_backend
    if backend == "xformers" or (backend == "auto" and on_gpus):
        backend = "sdpa"
    config = dataclasses.replace(config, attention_backend=backend)
    # Some buffers are made from values that modules compute as they are built: these are real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True), _no_collections():
        shared, stages = build_parts(config, range(config.num_stages))
        for part in (shared, *stages.values()):
            _convert(part, dtype, channels_last)
            checkpoint_activations(part, checkpointing)
            if on_gpus:
                compute_as_gpus_do(part)
        freezing(config, freeze).apply(shared, stages)
        recorded = [
            _record(shared, stages, config, latent_size, context_tokens, dtype, n, channels_last) for n in _ROWS
        ]
    return ModelTrace(
        shared=_affine([parts[0] for parts in recorded]),
        stages=tuple(_affine([parts[1 + k] for parts in recorded]) for k in range(config.num_stages)),
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python from collecting cycles: deaths would move to other places in one of two traces that are matched."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _convert(part: nn.Module, dtype: torch.dtype, channels_last: bool) -> None:
    """`part.to(dtype)`, which exchanges the data of parameters: fake tensors do not allow that."""
    for module in part.modules():
        for name, p in module.named_parameters(recurse=False):
            own = p.detach().to(dtype)
            if channels_last and own.dim() == 4:
                own = own.contiguous(memory_format=torch.channels_last)
            setattr(module, name, nn.Parameter(own))


class _Kernel(NamedTuple):
    """What one operator does at one number of samples; see `Kernels`."""

    name: str
    flops: int
    bytes: int
    layout_bytes: int


class _Recorder(TorchDispatchMode):
    """Records births and deaths of storages as pairs (number of the storage, change in bytes), and operators.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.kernels: list[_Kernel] = []
        self._ignored: list[UntypedStorage] = []
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._count = 0
        self.ignore(known)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors."""
        storages = [t.untyped_storage() for t in tensors]
        self._ignored += storages  # alive, so that no other storage gets the same address
        self._numbers |= {s._cdata: (-1, None) for s in storages}

    def number(self, tensor: Tensor) -> int:
        """Number of the storage under a tensor."""
        return self._numbers[tensor.untyped_storage()._cdata][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if func.is_view or name in _NO_KERNELS:
            if name != "device":
                self._meet(out)
            return out
        self._meet(out)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        moved = sum(map(_bytes, inputs)) * (1 + _MORE_READS.get(name, 0)) + sum(map(_bytes, outputs))
        layout = sum(_bytes(t) for t in (*inputs, *outputs) if t.dim() == 4) if name in _CONVOLUTIONS else 0
        self.kernels.append(_Kernel(name, _flops(func, args, kwargs, out), moved, layout))
        return out

    def _meet(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._numbers:
                continue
            number, self._count = self._count, self._count + 1
            self.events.append((number, size))

            def dead(_: Any, key: int = key, number: int = number, size: int = size) -> None:
                self.events.append((number, -size))
                del self._numbers[key]

            self._numbers[key] = (number, weakref.ref(storage, dead))


def _bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes of a tensor; an expanded one is read from fewer."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    # torch's table of formulas has the fused attention of GPUs only.
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


@dataclass(frozen=True)
class _Recorded:
    """One pass at one number of samples, of events (number of the storage, change in bytes)."""

    events: list[tuple[int, int]]
    forward_events: int
    output_bytes: int
    kernels: list[_Kernel]


def _record(
    shared: nn.Module,
    stages: dict[int, nn.Module],
    config: ModelConfig,
    latent_size: tuple[int, int],
    context_tokens: int,
    dtype: torch.dtype,
    rows: int,
    channels_last: bool,
) -> list[_Recorded]:
    """The passes of the shared part and of every stage over `rows` samples each."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x_BCHW = torch.empty(rows, config.in_channels, *latent_size, dtype=dtype).to(memory_format=memory_format)
    width = config.context_channels
    context = None if width is None else torch.empty(rows, context_tokens, width, dtype=dtype)
    label = torch.empty(rows, dtype=torch.int64) if config.takes_label else None
    augment = torch.empty(rows, config.augment_labels) if config.augment_labels else None
    inputs = [x_BCHW, torch.empty(rows), context, label, augment]
    with torch.set_grad_enabled(any(p.requires_grad for p in shared.parameters())):
        features: Sequence[Tensor] = shared(*inputs)
        recorded = [_record_pass(shared, inputs)]
    for stage in stages.values():
        recorded.append(_record_pass(stage, [f.detach().requires_grad_(f.requires_grad) for f in features]))
    return recorded


def _record_pass(part: nn.Module, inputs: Sequence[Tensor | None]) -> _Recorded:
    given = [t for t in inputs if t is not None]
    parameters = list(part.parameters())
    for p in parameters:
        p.grad = None
    with _Recorder([*given, *parameters, *part.buffers()]) as recorder:
        out = part(*inputs)
        outputs = [out] if isinstance(out, Tensor) else [f for f in out if f.requires_grad]
        forward_events = len(recorder.events)
    output_bytes = sum(_bytes(f) for f in outputs)
    if isinstance(out, Tensor):  # a stage: its loss is computed in fp32, and its output is not kept
        with recorder:
            loss = out.float().square().sum()
            del out, outputs
            if loss.requires_grad:
                loss.backward()
    elif outputs:  # the shared part: the features stay alive, since the training step holds them
        gradients = [torch.empty_like(f) for f in outputs]
        recorder.ignore(gradients)
        with recorder:
            torch.autograd.backward(outputs, gradients)
    of_parameters = {recorder.number(p.grad) for p in parameters if p.grad is not None}
    events = recorder.events
    counted = [number not in of_parameters for number, _ in events]
    return _Recorded(
        events=[event for event, counts in zip(events, counted, strict=True) if counts],
        forward_events=sum(counted[:forward_events]),
        output_bytes=output_bytes,
        kernels=list(recorder.kernels),
    )


def _affine(recorded: Sequence[_Recorded]) -> PartTrace:
    """The line through the traces of two numbers of samples, event by event."""
    few, more = recorded
    assert [n for n, _ in few.events] == [n for n, _ in more.events], "the passes differ by the number of samples"
    assert [k.name for k in few.kernels] == [k.name for k in more.kernels]

    def line(a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        at_few, at_more = np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)
        slope = (at_more - at_few) // (_ROWS[1] - _ROWS[0])
        return np.stack([at_few - slope * _ROWS[0], slope], axis=-1)

    def of_kernels(count: Callable[[_Kernel], int]) -> np.ndarray:
        return line([count(k) for k in few.kernels], [count(k) for k in more.kernels])

    return PartTrace(
        growth_E2=line([size for _, size in few.events], [size for _, size in more.events]),
        forward_events=few.forward_events,
        output_bytes_2=line([few.output_bytes], [more.output_bytes])[0],
        kernels=Kernels(
            flops_N2=of_kernels(lambda k: k.flops),
            bytes_N2=of_kernels(lambda k: k.bytes),
            layout_bytes_N2=of_kernels(lambda k: k.layout_bytes),
        ),
    )
