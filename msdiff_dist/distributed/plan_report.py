"""What a placement costs: balance, state on every rank and bytes between ranks, computed without any device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from msdiff_dist.distributed.placement import Placement
from msdiff_dist.distributed.precision import Precision
from msdiff_dist.distributed.topology import nodes_spanned, ring_share_between_nodes

MOST_ROWS = 16
"""Ranks that get a row each in the table; in larger worlds neighbours with equal stages share one."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model and its training, as far as the cost of a placement depends on them.

    Attributes:
        cost_K: cost of one sample of each stage, encoder and decoder, in any unit.
        shared_params: number of parameters of the shared encoder.
        stage_params_K: number of parameters of each stage's decoder.
        payload_bytes: bytes of one routed sample, with its label and context.
        precision: of forward and backward passes.
        zero_shared, zero_decoders: ZeRO levels of the encoder and of the decoders.
        moments: numbers that the optimizer keeps for each parameter (AdamW: 2).
        averages: averages of the weights that are kept.
    """

    cost_K: Sequence[float]
    shared_params: int
    stage_params_K: Sequence[int]
    payload_bytes: int
    precision: Precision = "fp32"
    zero_shared: int = 1
    zero_decoders: int = 1
    moments: int = 2
    averages: int = 1

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter in forward and backward passes, and when it is gathered."""
        return 2 if self.precision == "bf16" else 4


def plan_report(
    placement: Placement, workload: Workload, warnings: Sequence[str] = (), ranks_per_node: int | None = None
) -> dict[str, Any]:
    """The placement as plain data for JSON; with `ranks_per_node` also the bytes between nodes.

    `balance` is the mean over the maximum of the ranks' work. Each of `stages` has its share of the work, the ranks
    that hold it and its samples per global batch. Each of `ranks` has its samples per global batch of each stage held,
    its `load` (its work over the mean) and its `state_bytes` (see `state_bytes_W`). `bytes_per_step`, over all ranks:
    `routed`, the payload that is expected to change ranks, and `reduced` (see `reduced_bytes`).
    """
    samples_WK = placement.samples_WK
    cost_K = np.asarray(workload.cost_K, dtype=float)
    work_K, work_W = samples_WK.sum(axis=0) * cost_K, samples_WK @ cost_K
    load_W = (work_W / work_W.mean()).round(4).tolist()
    state = state_bytes_W(placement, workload).tolist()
    report: dict[str, Any] = {
        "world_size": placement.world_size,
        "global_batch_size": int(samples_WK.sum()),
        "balance": placement.balance(workload.cost_K),
        "stages": [
            {"work_share": float(share), "ranks": list(placement.group(k)), "samples": int(samples_WK[:, k].sum())}
            for k, share in enumerate(work_K / work_K.sum())
        ],
        "ranks": [
            {
                "rank": rank,
                "stages": list(held),
                "samples": {str(k): n_K[k] for k in held},
                "load": load_W[rank],
                "state_bytes": state[rank],
            }
            for rank, (held, n_K) in enumerate(zip(placement.stages_of_rank, samples_WK.tolist(), strict=True))
        ],
        "bytes_per_step": {
            "routed": round(samples_crossing(placement) * workload.payload_bytes),
            "reduced": reduced_bytes(placement, workload),
        },
        "warnings": list(warnings),
    }
    if ranks_per_node is not None:
        report["nodes"] = _nodes_report(placement, workload, ranks_per_node)
    return report


def _nodes_report(placement: Placement, workload: Workload, ranks_per_node: int) -> dict[str, Any]:
    groups = [placement.group(k) for k in range(placement.num_stages)]
    return {
        "count": -(-placement.world_size // ranks_per_node),
        "ranks_per_node": ranks_per_node,
        "of_stage": [nodes_spanned(group, ranks_per_node) for group in groups],
        "reduced_between": round(reduced_between_nodes(placement, workload, ranks_per_node)),
        "reduced_between_replicated": round(replicated_between_nodes(placement, workload, ranks_per_node)),
    }


def state_bytes_W(placement: Placement, workload: Workload) -> np.ndarray:
    """Bytes of parameters, fp32 weights, moments and averages on each rank, [W]; without gradients and activations.

    The fp32 weights, moments and averages are sharded equally over the g ranks of a group; the fp32 weights are a copy
    apart from the parameters in fp32 training too. Besides, each rank has parameters in the training precision: all of
    them under ZeRO 1 and 2, one g-th under ZeRO 3.
    """

    def on_one_rank(params: int, group_size: int, zero: int) -> int:
        shard = -(-params // group_size)
        return (params if zero < 3 else shard) * workload.param_bytes + shard * 4 * (
            1 + workload.moments + workload.averages
        )

    total_W = np.full(
        placement.world_size, on_one_rank(workload.shared_params, placement.world_size, workload.zero_shared)
    )
    for k, params in enumerate(workload.stage_params_K):
        group = placement.group(k)
        total_W[list(group)] += on_one_rank(params, len(group), workload.zero_decoders)
    return total_W


def reduced_bytes(placement: Placement, workload: Workload) -> int:
    """Bytes that all ranks together send in a step to reduce gradients and to gather parameters, by ring algorithms.

    To reduce P values to their owners, or to gather them from their owners, a group of g ranks sends (g - 1) P values.
    ZeRO 1 reduces once a step and ZeRO 2 once a micro batch; both then gather the new parameters. In every micro batch
    ZeRO 3 gathers for the forward pass and for the backward pass and reduces once. Gradients are reduced in fp32.
    """
    return sum((len(group) - 1) * count for group, count in _ring_bytes(placement, workload))


def reduced_between_nodes(placement: Placement, workload: Workload, ranks_per_node: int) -> float:
    """The bytes among `reduced_bytes` that pass between nodes."""
    rings = _ring_bytes(placement, workload)
    return sum(ring_share_between_nodes(group, ranks_per_node) * count for group, count in rings)


def replicated_between_nodes(placement: Placement, workload: Workload, ranks_per_node: int) -> float:
    """Bytes between nodes if every rank held every decoder and all gradients were averaged once a step."""
    # A ring all-reduce is a reduction to the owners and a gathering from them: two passes.
    values = 2 * (workload.shared_params + sum(workload.stage_params_K))
    share = ring_share_between_nodes(range(placement.world_size), ranks_per_node)
    return share * values * workload.param_bytes


def _ring_bytes(placement: Placement, workload: Workload) -> list[tuple[Sequence[int], int]]:
    """Each group of ranks with the bytes of the values that are reduced or gathered round its ring in a step."""
    accumulation = len(placement.samples_AWK)

    def ring(group: Sequence[int], params: int, zero: int) -> tuple[Sequence[int], int]:
        reductions, gathers = {1: (1, 1), 2: (accumulation, 1), 3: (accumulation, 2 * accumulation)}[zero]
        return group, params * (4 * reductions + workload.param_bytes * gathers)

    shared = ring(range(placement.world_size), workload.shared_params, workload.zero_shared)
    stages = [ring(placement.group(k), n, workload.zero_decoders) for k, n in enumerate(workload.stage_params_K)]
    return [shared, *stages]


def samples_crossing(placement: Placement) -> float:
    """Expected number of samples per step that are read by one rank and computed by another.

    Every rank reads an equal share of the batch, in which stages and micro batches lie at random. So of the samples of
    a micro batch and stage it reads a hypergeometric number. Of these it keeps at most as many as it is to compute.
    """
    samples_AWK = placement.samples_AWK
    batch, world_size = int(samples_AWK.sum()), placement.world_size
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, batch + 1)).cumsum()])

    def log_choose(n: np.ndarray | int, k: np.ndarray | int) -> np.ndarray:
        values: np.ndarray = log_factorial[n] - log_factorial[k] - log_factorial[np.subtract(n, k)]
        return values

    def kept(read: int, quota: int, planned: int) -> float:
        """Mean of min(j, planned), where `j` of the `quota` samples are among the `read` ones of the batch."""
        j = np.arange(max(0, read + quota - batch), min(read, quota) + 1)
        log_p = log_choose(quota, j) + log_choose(batch - quota, read - j) - log_choose(batch, read)
        return float(np.exp(log_p) @ np.minimum(j, planned))

    quotas_AWK = np.broadcast_to(samples_AWK.sum(axis=1, keepdims=True), samples_AWK.shape)
    reads_W = batch // world_size + (np.arange(world_size) < batch % world_size)
    reads_AWK = np.broadcast_to(reads_W[None, :, None], samples_AWK.shape)
    # Most ranks are in the same case, so each distinct case is computed once.
    cases = np.stack([reads_AWK, quotas_AWK, samples_AWK], axis=-1)[samples_AWK > 0]
    distinct, counts = np.unique(cases, axis=0, return_counts=True)
    return batch - sum(int(n) * kept(*case) for case, n in zip(distinct.tolist(), counts, strict=True))


def render(report: dict[str, Any], title: str) -> RenderableType:
    """The report as tables. Neighbouring ranks with equal stages share a row in large worlds."""
    stages = Table("stage", "work", "samples", "ranks", title=title)
    for k, stage in enumerate(report["stages"]):
        stages.add_row(str(k), f"{stage['work_share']:.1%}", str(stage["samples"]), _ranges(stage["ranks"]))
    ranks = Table("rank", "stages", "samples", "load", "state")
    for neighbours in _rows(report["ranks"]):
        first = neighbours[0]
        samples = [f"{k}: {_span(r['samples'][str(k)] for r in neighbours)}" for k in first["stages"]]
        ranks.add_row(
            _ranges([r["rank"] for r in neighbours]),
            " ".join(map(str, first["stages"])),
            "  ".join(samples),
            f"{max(r['load'] for r in neighbours):.2f}",
            size(max(r["state_bytes"] for r in neighbours)),
        )
    traffic = report["bytes_per_step"]
    lines = [
        f"balance {report['balance']:.1%} of {report['world_size']} ranks, global batch {report['global_batch_size']}",
        "state: weights, fp32 masters, moments and average of a rank; gradients and activations come on top",
        f"each step {size(traffic['routed'])} of samples routed, {size(traffic['reduced'])} reduced and gathered",
        *_node_lines(report),
        *(f"[yellow]warning[/] {warning}" for warning in report["warnings"]),
    ]
    return Group(stages, ranks, *lines)


def _node_lines(report: dict[str, Any]) -> list[str]:
    if "nodes" not in report:
        return []
    nodes = report["nodes"]
    spans = ", ".join(map(str, nodes["of_stage"]))
    ours, replicated = nodes["reduced_between"], nodes["reduced_between_replicated"]
    return [
        f"{nodes['count']} nodes of {nodes['ranks_per_node']} ranks; the stages' groups span {spans} of them",
        f"{size(ours)} of these bytes pass between nodes; with every decoder on every rank {size(replicated)} would",
    ]


def _rows(ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    if len(ranks) <= MOST_ROWS:
        return [[rank] for rank in ranks]
    return [list(neighbours) for _, neighbours in groupby(ranks, key=lambda rank: rank["stages"])]


def _ranges(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as `0-2, 5`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(_span(run) for run in runs)


def _span(numbers: Iterable[int]) -> str:
    low, high = min(values := list(numbers)), max(values)
    return str(low) if low == high else f"{low}-{high}"


def size(count: float) -> str:
    """A number of bytes for people to read, in powers of 1000: 2.92 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
