"""How long a step takes on a GPU, estimated: a roofline for each operator, and latency and bandwidth for collectives.

The roofline takes for each kernel the longer of its arithmetic and its memory traffic. What it does not know: kernels
that miss the assumed efficiencies, waiting for data, and the host's work between steps. So it is a lower bound with
stated assumptions, all of them fields of `Gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msdiff_dist.distributed.engine_costs import PartSize, Workload, exchanges, optimizer_traffic
from msdiff_dist.distributed.gpus import GIGA, MICRO, Gpu
from msdiff_dist.distributed.placement import Placement
from msdiff_dist.distributed.topology import most_on_one_node, nodes_spanned
from msdiff_dist.models.trace import Kernels, ModelTrace


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute_W: of every rank, forward and backward passes.
        communication: of all reductions and gathers of the rank that has most of them.
        optimizer: optimizers and averages, where they last longest.
        step: of the whole step.
        flops: floating-point operations of the step's matrix products and convolutions, without recomputation.
    """

    compute_W: np.ndarray
    communication: float
    optimizer: float
    step: float
    flops: float

    @property
    def exposed(self) -> float:
        """The part of communication that is not hidden behind computation."""
        return self.step - float(self.compute_W.max()) - self.optimizer

    def utilisation(self, gpu: Gpu, workload: Workload) -> float:
        """Model FLOPs utilisation: share of the GPUs' peak that the model's own operations make up."""
        peak = gpu.matrix_flops(workload.precision, workload.tf32)
        return self.flops / (self.step * peak * len(self.compute_W))


@dataclass(frozen=True)
class _EngineSeconds:
    """Seconds of one engine in a step."""

    reduction: float
    gather: float
    optimizer: float


def step_time(
    placement: Placement, workload: Workload, trace: ModelTrace, gpu: Gpu, ranks_per_node: int | None
) -> StepTime:
    """The estimate for a placement on `gpu`, `ranks_per_node` of which share a node (None: all).

    A stage's reduction runs in the background, behind the passes that follow on this rank; that of the shared part is
    last and is waited for. The shared part's new weights are waited for, those of the stages arrive behind the
    encoder's forward pass. The routing of samples runs behind the previous micro batch.
    """
    world, per_node = range(placement.world_size), ranks_per_node or placement.world_size
    accumulation = len(placement.samples_AWK)
    compute_W, behind_W, encoder_W = _passes(placement, workload, trace, gpu)

    def of_engine(part: PartSize, group: Sequence[int], zero: int) -> _EngineSeconds:
        reduction, gather = (
            e.times * ring_seconds(e.bytes, group, gpu, per_node) for e in exchanges(part, zero, accumulation, workload)
        )
        traffic = optimizer_traffic(-(-part.trained // len(group)), workload)
        return _EngineSeconds(reduction, gather, traffic / (gpu.bandwidth * GIGA * gpu.bandwidth_efficiency))

    shared = of_engine(workload.shared, world, workload.zero_shared)
    stages = {
        k: of_engine(workload.stages[k], placement.group(k), workload.zero_decoders)
        for k in sorted({k for held in placement.stages_of_rank for k in held})
    }
    computed = placement.samples_WK.sum(axis=0) > 0
    reduction_W, gather_W, optimizer_W = (
        np.array([sum(getattr(stages[k], kind) for k in held if computed[k]) for held in placement.stages_of_rank])
        for kind in ("reduction", "gather", "optimizer")
    )
    until_shared = float((compute_W + np.maximum(reduction_W - behind_W, 0)).max()) + shared.reduction
    optimizer = float(optimizer_W.max()) + shared.optimizer
    weights = max(shared.gather, float((gather_W - encoder_W).max()))
    return StepTime(
        compute_W=compute_W,
        communication=float((reduction_W + gather_W).max()) + shared.reduction + shared.gather,
        optimizer=optimizer,
        step=until_shared + optimizer + weights,
        flops=6 * float(placement.samples_WK.sum(axis=0) @ np.asarray(workload.cost_K, dtype=float)),
    )


def _passes(
    placement: Placement, workload: Workload, trace: ModelTrace, gpu: Gpu
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of every rank, [W] each: of all passes; of what follows in a micro batch on the first stage; of the
    encoder's forward pass in a micro batch."""
    # A backward pass is two thirds of a pass. A frozen encoder has none.
    backward = 2 / 3 if workload.shared.trained else 0.0
    known: dict[tuple[int, int], float] = {}

    def seconds(part: int, rows: int) -> float:
        """Of a stage, or of the shared part (-1)."""
        if (part, rows) not in known:
            kernels = (trace.stages[part] if part >= 0 else trace.shared).kernels
            known[part, rows] = kernel_seconds(kernels, rows, gpu, workload)
        return known[part, rows]

    accumulation, W, _ = placement.samples_AWK.shape
    compute_W, behind_W, encoder_W = np.zeros(W), np.zeros(W), np.zeros(W)
    for rank in range(W):
        for rows_K in placement.samples_AWK[:, rank].tolist():
            if not any(rows_K):
                continue
            encoder = seconds(-1, sum(rows_K))
            _, *later = stages = [seconds(k, n) for k, n in enumerate(rows_K) if n]
            compute_W[rank] += encoder + sum(stages)
            behind_W[rank] += (sum(later) + encoder * backward) / accumulation
            encoder_W[rank] += encoder * (1 - backward) / accumulation
    return compute_W, behind_W, encoder_W


def kernel_seconds(kernels: Kernels, rows: int, gpu: Gpu, workload: Workload) -> float:
    """Seconds of one forward and backward pass of a part over `rows` samples: the host's or the GPU's, if longer."""
    at = np.array([1, rows])
    flops_N, bytes_N = kernels.flops_N2 @ at, (kernels.bytes_N2 @ at).astype(float)
    if not workload.channels_last:
        # Convolutions compute in channels-last: their images are read and written once more on the way in and out.
        bytes_N += 2 * (kernels.layout_bytes_N2 @ at)
    arithmetic_N = flops_N / (gpu.matrix_flops(workload.precision, workload.tf32) * gpu.compute_efficiency)
    traffic_N = bytes_N / (gpu.bandwidth * GIGA * gpu.bandwidth_efficiency)
    on_gpu = np.maximum(arithmetic_N, traffic_N).sum() + len(flops_N) * gpu.kernel_us * MICRO
    return float(max(on_gpu, len(flops_N) * gpu.dispatch_us * MICRO))


def ring_seconds(values: int, group: Sequence[int], gpu: Gpu, ranks_per_node: int) -> float:
    """Seconds of one reduction of so many bytes to owners, or gathering from them, round the ring of a group.

    g ranks take g - 1 steps; in each a rank sends one g-th of the values. Between nodes the ranks of a group on one
    node share their network cards: NCCL builds a ring for each card.
    """
    size = len(group)
    if size == 1:
        return 0.0
    link = gpu.link
    if nodes_spanned(group, ranks_per_node) > 1:
        link = min(link, gpu.network * most_on_one_node(group, ranks_per_node))
    return (size - 1) * (gpu.hop_us * MICRO + values / size / (link * GIGA * gpu.link_efficiency))
