"""What one DeepSpeed engine keeps on a rank, and what it sends and computes in a step besides the passes of its module.

All arithmetic that follows from how the engines are built is in this file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from msdiff_dist.distributed.precision import Precision


@dataclass(frozen=True)
class PartSize:
    """Number of parameters of an encoder or decoder, and of those of them that do not train."""

    params: int
    frozen: int = 0

    @property
    def trained(self) -> int:
        return self.params - self.frozen


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model and its training, as far as the cost of a placement depends on them.

    Attributes:
        cost_K: cost of one sample of each stage, encoder and decoder, in any unit.
        shared_params: number of parameters of the shared encoder.
        stage_params_K: number of parameters of each stage's decoder.
        shared_frozen, stage_frozen_K: how many of them do not train; empty: none.
        payload_bytes: bytes of one routed sample, with its label and context.
        precision: of forward and backward passes.
        zero_shared, zero_decoders: ZeRO levels of the encoder and of the decoders.
        moments: numbers that the optimizer keeps for each parameter (AdamW: 2).
        averages: averages of the weights that are kept.
        latent_values: numbers in one latent.
        channels_last: memory format of the network's inputs.
        tf32: matrix products and convolutions of fp32 factors in TF32.
        on_gpus: training on GPUs, not on CPUs.
        gathering: stages whose decoders keep gradients that wait for those of later batches.
    """

    cost_K: Sequence[float]
    shared_params: int
    stage_params_K: Sequence[int]
    payload_bytes: int
    shared_frozen: int = 0
    stage_frozen_K: Sequence[int] = ()
    precision: Precision = "fp32"
    zero_shared: int = 1
    zero_decoders: int = 1
    moments: int = 2
    averages: int = 1
    latent_values: int = 0
    channels_last: bool = False
    tf32: bool = False
    on_gpus: bool = False
    gathering: Collection[int] = ()

    @property
    def shared(self) -> PartSize:
        """The shared encoder."""
        return PartSize(self.shared_params, self.shared_frozen)

    @property
    def stages(self) -> list[PartSize]:
        """The decoders."""
        frozen = self.stage_frozen_K or [0] * len(self.stage_params_K)
        return [PartSize(params, count) for params, count in zip(self.stage_params_K, frozen, strict=True)]

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter in forward and backward passes."""
        return 2 if self.precision == "bf16" else 4


_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """Bytes of one engine on one rank.

    Attributes:
        weights: parameters in the precision of forward and backward passes.
        optimizer: fp32 weights and moments.
        averages: of the weights.
        gradients_before: of gradients when a micro batch begins, in the worst one of a step.
        gradients_during: of gradients in the part's own backward pass.
        gradients_after: of gradients after it, while they are reduced.
        gradients_reduced: of gradients when the optimizers step.
        in_passes: other buffers in forward and backward passes.
        in_step: other buffers while the optimizer steps.
    """

    weights: int
    optimizer: int
    averages: int
    gradients_before: int
    gradients_during: int
    gradients_after: int
    gradients_reduced: int
    in_passes: int
    in_step: int


def engine_bytes(
    part: PartSize, group_size: int, zero: int, accumulation: int, workload: Workload, gathers: bool = False
) -> EngineBytes:
    """What one engine keeps on a rank.

    If it `gathers`, gradients that wait for those of later batches are sharded in fp32, too.

    Frozen parameters are there in the training precision alone: whole, or with a ZeRO 3 engine of others sharded as
    these. In bf16 training their fp32 weights are sharded over the ranks' host memory.

    The fp32 weights, moments and averages are sharded equally over the g ranks of a group; the fp32 weights are a copy
    apart from the parameters in fp32 training too. Besides, each rank has parameters in the training precision: all of
    them under ZeRO 1 and 2, one g-th under ZeRO 3.
    """
    size, params = workload.param_bytes, part.trained
    shard, frozen_shard = -(-params // group_size), -(-part.frozen // group_size)
    aside = 0 if workload.on_gpus or workload.precision == "fp32" else _FP32 * frozen_shard
    # torch's unfused Adam makes a denominator and a quotient, each as large as the shard.
    in_step = 0 if workload.on_gpus else 2 * _FP32 * shard
    optimizer, averages = _FP32 * shard * (1 + workload.moments), _FP32 * shard * workload.averages
    if zero == 3 and params:
        # DeepSpeed keeps gathered parameters for their use in the backward pass, and collects gradients in a bucket of
        # the part's size.
        return EngineBytes(
            weights=(shard + frozen_shard) * size + aside,
            optimizer=optimizer,
            averages=averages,
            gradients_before=shard * _FP32,
            gradients_during=shard * _FP32,
            gradients_after=shard * _FP32,
            gradients_reduced=2 * shard * _FP32,
            in_passes=2 * part.params * size,
            in_step=in_step,
        )
    # All gradients of the part lie in one fp32 buffer from the backward pass until they are reduced; the reduction
    # receives the sums of this rank's range (with gloo, the terms of these sums).
    whole, own = _FP32 * params, _FP32 * shard
    received = 0 if group_size == 1 else own if workload.on_gpus else whole
    # ZeRO 1 keeps the whole buffer between micro batches. ZeRO 2 reduces each, and keeps the sums of its range: the
    # reduction of one micro batch ends before the part's next backward pass.
    more, reduces_each = accumulation > 1, zero == 2 and group_size > 1
    kept, waiting = own if more and reduces_each else 0, own if gathers else 0
    return EngineBytes(
        weights=part.params * size + aside,
        optimizer=optimizer,
        averages=averages,
        gradients_before=waiting + ((whole + (received + kept if reduces_each else 0)) if more else 0),
        gradients_during=waiting + whole + kept,
        gradients_after=waiting + whole + received + kept,
        gradients_reduced=waiting + own,
        in_passes=0,
        in_step=in_step,
    )


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A reduction of values to the ranks that own them, or a gathering of values from these.

    Attributes:
        bytes: of all values.
        times: how often in a step.
    """

    bytes: int
    times: int


def exchanges(part: PartSize, zero: int, accumulation: int, workload: Workload) -> tuple[Exchange, Exchange]:
    """What one engine reduces, and what it gathers, in a step of `accumulation` micro batches.

    ZeRO 1 reduces once a step and ZeRO 2 once a micro batch; both then gather the new parameters. In every micro batch
    ZeRO 3 gathers for the forward pass and for the backward pass and reduces once. Gradients are reduced in fp32. What
    is frozen is neither reduced nor gathered, except under ZeRO 3 where other parameters of the part train.
    """
    gathered = part.params if zero == 3 and part.trained else part.trained
    reductions, gathers = {1: (1, 1), 2: (accumulation, 1), 3: (accumulation, 2 * accumulation)}[zero]
    return (
        Exchange(bytes=part.trained * _FP32, times=reductions),
        Exchange(bytes=gathered * workload.param_bytes, times=gathers),
    )


def optimizer_traffic(shard: int, workload: Workload) -> int:
    """Bytes that optimizer and averages read and write in a step for a shard of so many parameters."""
    # Read: gradient, fp32 weight, moments; written: weight, moments, and the parameter in the training precision. An
    # average reads the weight and itself, and is written. The gradient norm reads the gradient once more.
    optimizer = _FP32 * (2 + workload.moments) + _FP32 * (1 + workload.moments) + workload.param_bytes
    return shard * (optimizer + 3 * _FP32 * workload.averages + _FP32)
