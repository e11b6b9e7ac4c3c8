"""Bytes that every rank holds at the peak of a training step, computed without any device.

What engines keep is in `engine_costs`; activations come from a trace of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from msdiff_dist.distributed.engine_costs import EngineBytes, Workload, engine_bytes
from msdiff_dist.distributed.placement import Placement
from msdiff_dist.models.trace import ModelTrace


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes of one rank at the moment of a step at which it holds most.

    Attributes:
        weights: parameters in the precision of forward and backward passes.
        gradients: of the parameters, what their reduction receives, and those that wait for later batches.
        optimizer: fp32 weights and the optimizer's moments.
        averages: of the weights.
        activations: and gradients of activations.
        buffers: the samples of the micro batch and of the next one, gathered parameters under ZeRO 3, temporary tensors
            of the optimizer.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    buffers: int

    @property
    def state(self) -> int:
        """Bytes that are there between steps, too."""
        return self.weights + self.optimizer + self.averages

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.activations + self.buffers

    def fields(self) -> dict[str, int]:
        """As plain data, with the total."""
        return dataclasses.asdict(self) | {"total": self.total}


def rank_bytes_W(placement: Placement, workload: Workload, trace: ModelTrace) -> list[RankBytes]:
    """Bytes of every rank at the peak of a step. Ranks in the same role share one object."""
    groups = [len(placement.group(k)) for k in range(placement.num_stages)]
    known: dict[tuple[tuple[int, ...], bytes], RankBytes] = {}
    result = []
    for rank, held in enumerate(placement.stages_of_rank):
        rows_AK = placement.samples_AWK[:, rank]
        role = held, rows_AK.tobytes()
        if role not in known:
            known[role] = _rank_bytes(held, rows_AK, placement.world_size, groups, workload, trace)
        result.append(known[role])
    return result


def _rank_bytes(
    held: Sequence[int],
    rows_AK: np.ndarray,
    world_size: int,
    groups: Sequence[int],
    workload: Workload,
    trace: ModelTrace,
) -> RankBytes:
    accumulation, decoders = len(rows_AK), workload.zero_decoders
    shared = engine_bytes(workload.shared, world_size, workload.zero_shared, accumulation, workload)
    stages = {
        k: engine_bytes(workload.stages[k], groups[k], decoders, accumulation, workload, k in workload.gathering)
        for k in held
    }
    engines = [shared, *stages.values()]
    # The weights of stages that no rank computes, fp32, of which every rank keeps a range in host memory.
    without = [part for part, ranks in zip(workload.stages, groups, strict=True) if not ranks]
    aside = sum(4 * -(-part.params // world_size) for part in without)
    moments = [
        moment
        for rows_K in np.unique(rows_AK, axis=0)
        for moment in _moments({k: int(rows_K[k]) for k in held if rows_K[k]}, shared, stages, workload, trace)
    ]
    peak = max(moments, key=lambda moment: moment.total)
    return RankBytes(
        weights=sum(e.weights for e in engines) + (0 if workload.on_gpus else aside),
        gradients=peak.gradients,
        optimizer=sum(e.optimizer for e in engines),
        averages=sum(e.averages for e in engines),
        activations=peak.activations,
        buffers=peak.buffers,
    )


@dataclass(frozen=True)
class _Moment:
    """Bytes at one moment of a step, besides those that are always there."""

    activations: int
    gradients: int
    buffers: int

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.buffers


def _moments(
    rows: Mapping[int, int],
    shared: EngineBytes,
    stages: Mapping[int, EngineBytes],
    workload: Workload,
    trace: ModelTrace,
) -> Iterator[_Moment]:
    """The moments of a step at which a rank may hold most, if all micro batches have these samples of each held stage.

    The engines run the shared encoder on all samples; then each stage forward and backward on features cut from the
    graph, which frees the stage's activations; then the encoder's backward pass.
    """
    engines = [*(stages[k] for k in sorted(rows)), shared]  # in the order of their backward passes
    if not rows:  # the rank stands by
        yield _Moment(0, shared.gradients_after, 0)
        yield _Moment(0, shared.gradients_reduced, shared.in_step)
        return
    encoder = trace.shared.memory(sum(rows.values()))
    decoders = {k: trace.stages[k].memory(n) for k, n in rows.items()}
    buffers = batch_bytes(sum(rows.values()), workload) + sum(e.in_passes for e in engines)

    def gradients(done: int) -> int:
        """In the backward pass that follows on `done` others."""
        after = sum(e.gradients_after for e in engines[:done])
        return after + engines[done].gradients_during + sum(e.gradients_before for e in engines[done + 1 :])

    yield _Moment(encoder.forward_peak, sum(e.gradients_before for e in engines), buffers)
    # One buffer collects the gradients of the features, from which the encoder's backward pass starts.
    kept = encoder.kept + encoder.outputs
    for done, k in enumerate(sorted(rows)):
        yield _Moment(kept + max(decoders[k].forward_peak, decoders[k].backward_peak), gradients(done), buffers)
    # The last stage's gradients of its inputs are still there.
    left = encoder.outputs + decoders[max(rows)].left
    if workload.zero_shared == 3:  # DeepSpeed's loss is scaled, which copies the gradients of the features
        left += encoder.outputs
    yield _Moment(encoder.backward_peak + left, gradients(len(rows)), buffers)
    yield _Moment(0, sum(e.gradients_after for e in engines), buffers)
    yield _Moment(0, sum(e.gradients_reduced for e in engines), buffers + max(e.in_step for e in engines))


def batch_bytes(rows: int, workload: Workload) -> int:
    """Bytes of a micro batch of `rows` samples, and of the next one, which is being exchanged.

    Of each: what is sent and what arrives. Of the current one also latents, noise, noised latents, targets, and the
    network's input, all in fp32 first.
    """
    return rows * (4 * workload.payload_bytes + 6 * 4 * workload.latent_values)
