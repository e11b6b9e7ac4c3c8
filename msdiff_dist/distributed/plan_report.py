"""What a placement costs: balance, state on every rank and bytes between ranks, computed without any device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from msdiff_dist.distributed.engine_costs import PartSize, Workload, exchanges
from msdiff_dist.distributed.gpus import Gpu
from msdiff_dist.distributed.memory import rank_bytes_W
from msdiff_dist.distributed.placement import Placement
from msdiff_dist.distributed.step_time import step_time
from msdiff_dist.distributed.topology import nodes_spanned, ring_share_between_nodes
from msdiff_dist.models.trace import ModelTrace

MOST_ROWS = 16
"""Ranks that get a row each in the table; in larger worlds neighbours with equal stages share one."""


def plan_report(
    placement: Placement,
    workload: Workload,
    trace: ModelTrace,
    *,
    warnings: Sequence[str] = (),
    ranks_per_node: int | None = None,
    gpu: Gpu | None = None,
) -> dict[str, Any]:
    """The placement as plain data for JSON; with `ranks_per_node` also the bytes between nodes.

    `balance` is the mean over the maximum of the ranks' work. Each of `stages` has its share of the work, the ranks
    that hold it and its samples per global batch. `frozen`: how many parameters of the shared part and of each stage
    do not train; None if all do. Each of `ranks` has its samples per global batch of each stage held,
    its `load` (its work over the mean), its `state_bytes` (what is there between steps) and its `peak_bytes` (see
    `RankBytes`). `bytes_per_step`, over all ranks: `routed`, the payload that is expected to change ranks, and
    `reduced` (see `reduced_bytes`). With `gpu`, `step_seconds` and `gpu` are estimates for it, and each rank has its
    `compute_seconds`.
    """
    samples_WK = placement.samples_WK
    cost_K = np.asarray(workload.cost_K, dtype=float)
    work_K, work_W = samples_WK.sum(axis=0) * cost_K, samples_WK @ cost_K
    load_W = (work_W / work_W.mean()).round(4).tolist()
    bytes_W = rank_bytes_W(placement, workload, trace)
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
                "state_bytes": bytes_W[rank].state,
                "peak_bytes": bytes_W[rank].fields(),
            }
            for rank, (held, n_K) in enumerate(zip(placement.stages_of_rank, samples_WK.tolist(), strict=True))
        ],
        "bytes_per_step": {
            "routed": round(samples_crossing(placement) * workload.payload_bytes),
            "reduced": reduced_bytes(placement, workload),
        },
        "frozen": _frozen(workload),
        "warnings": list(warnings),
    }
    if ranks_per_node is not None:
        report["nodes"] = _nodes_report(placement, workload, ranks_per_node)
    if gpu is not None:
        seconds = step_time(placement, workload, trace, gpu, ranks_per_node)
        for rank, compute in zip(report["ranks"], seconds.compute_W.tolist(), strict=True):
            rank["compute_seconds"] = compute
        report["step_seconds"] = seconds.step
        report["gpu"] = {
            "name": gpu.name,
            "usable_bytes": gpu.usable_bytes,
            "fits": max(of_rank.total for of_rank in bytes_W) <= gpu.usable_bytes,
            "images_per_second": report["global_batch_size"] / seconds.step,
            "mfu": seconds.utilisation(gpu, workload),
            "communication_seconds": seconds.communication,
            "exposed_seconds": seconds.exposed,
            "optimizer_seconds": seconds.optimizer,
            "compute_efficiency": gpu.compute_efficiency,
            "bandwidth_efficiency": gpu.bandwidth_efficiency,
        }
    return report


def _frozen(workload: Workload) -> dict[str, Any] | None:
    parts = [workload.shared, *workload.stages]
    if not any(part.frozen for part in parts):
        return None
    return {
        "shared": workload.shared.frozen,
        "stages": [part.frozen for part in workload.stages],
        "parameters": sum(part.params for part in parts),
        "trained": sum(part.trained for part in parts),
    }


def _nodes_report(placement: Placement, workload: Workload, ranks_per_node: int) -> dict[str, Any]:
    groups = [placement.group(k) for k in range(placement.num_stages)]
    return {
        "count": -(-placement.world_size // ranks_per_node),
        "ranks_per_node": ranks_per_node,
        "of_stage": [nodes_spanned(group, ranks_per_node) for group in groups],
        "reduced_between": round(reduced_between_nodes(placement, workload, ranks_per_node)),
        "reduced_between_replicated": round(replicated_between_nodes(placement, workload, ranks_per_node)),
    }


def reduced_bytes(placement: Placement, workload: Workload) -> int:
    """Bytes that all ranks together send in a step to reduce gradients and to gather parameters, by ring algorithms.

    To reduce P values to their owners, or to gather them from their owners, a group of g ranks sends (g - 1) P values.
    """
    return sum((len(group) - 1) * values for group, values in _ring_bytes(placement, workload))


def reduced_between_nodes(placement: Placement, workload: Workload, ranks_per_node: int) -> float:
    """The bytes among `reduced_bytes` that pass between nodes."""
    rings = _ring_bytes(placement, workload)
    return sum(ring_share_between_nodes(group, ranks_per_node) * values for group, values in rings)


def replicated_between_nodes(placement: Placement, workload: Workload, ranks_per_node: int) -> float:
    """Bytes between nodes if every rank held every decoder and all gradients were averaged once a step."""
    # A ring all-reduce is a reduction to the owners and a gathering from them: two passes.
    values = 2 * (workload.shared.trained + sum(part.trained for part in workload.stages))
    share = ring_share_between_nodes(range(placement.world_size), ranks_per_node)
    return share * values * workload.param_bytes


def _ring_bytes(placement: Placement, workload: Workload) -> list[tuple[Sequence[int], int]]:
    """Each group of ranks with the bytes that are reduced or gathered round its ring in a step."""
    accumulation = len(placement.samples_AWK)

    def passing(part: PartSize, zero: int) -> int:
        return sum(e.times * e.bytes for e in exchanges(part, zero, accumulation, workload))

    shared = (range(placement.world_size), passing(workload.shared, workload.zero_shared))
    stages = [
        (placement.group(k), passing(part, workload.zero_decoders))
        for k, part in enumerate(workload.stages)
        if placement.samples_AWK[:, :, k].any()
    ]
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
    """The report as tables. Neighbouring ranks with equal stages share a row in large worlds.

    If it has reports of `phases`, they are rows of a table.
    """
    stages = Table("stage", "work", "samples", "ranks", title=title)
    for k, stage in enumerate(report["stages"]):
        stages.add_row(str(k), f"{stage['work_share']:.1%}", str(stage["samples"]), _ranges(stage["ranks"]))
    ranks = Table("rank", "stages", "samples", "load", "state", "activations", "peak")
    for neighbours in _rows(report["ranks"]):
        first = neighbours[0]
        samples = [f"{k}: {_span(r['samples'][str(k)] for r in neighbours)}" for k in first["stages"]]
        ranks.add_row(
            _ranges([r["rank"] for r in neighbours]),
            " ".join(map(str, first["stages"])),
            "  ".join(samples),
            f"{max(r['load'] for r in neighbours):.2f}",
            size(max(r["state_bytes"] for r in neighbours)),
            size(max(r["peak_bytes"]["activations"] for r in neighbours)),
            size(max(r["peak_bytes"]["total"] for r in neighbours)),
        )
    traffic = report["bytes_per_step"]
    lines = [
        f"balance {report['balance']:.1%} of {report['world_size']} ranks, global batch {report['global_batch_size']}",
        *_rate_lines(report),
        "state: weights, fp32 masters, moments and averages of a rank; peak: with gradients, activations and buffers",
        f"each step {size(traffic['routed'])} of samples routed, {size(traffic['reduced'])} reduced and gathered",
        *_frozen_lines(report),
        *_guide_lines(report),
        *_node_lines(report),
        *_gpu_lines(report),
        *(f"[yellow]warning[/] {warning}" for warning in report["warnings"]),
    ]
    return Group(stages, ranks, *_phase_table(report), *lines)


def _phase_table(report: dict[str, Any]) -> list[Table]:
    if not report.get("phases"):
        return []
    table = Table("steps", "trains", "ranks of the stages", "balance", "state", "peak")
    timed = "gpu" in report
    if timed:
        table.add_column("step")
    for phase in report["phases"]:
        ranks = phase["ranks"]
        table.add_row(
            _span((phase["first"], phase["last"])),
            phase["about"],
            " | ".join(_ranges(stage["ranks"]) or "none" for stage in phase["stages"]),
            f"{phase['balance']:.1%}",
            size(max(rank["state_bytes"] for rank in ranks)),
            size(max(rank["peak_bytes"]["total"] for rank in ranks)),
            *([f"{phase['step_seconds']:.3g} s"] if timed else []),
        )
    return [table]


def _rate_lines(report: dict[str, Any]) -> list[str]:
    """What the recipe's learning rate comes to; a placement alone has none."""
    if "lr" not in report:
        return []
    lr, batch = report["lr"], report["global_batch_size"]
    per = f" = {lr / batch:g} a sample x {batch}" if report["lr_per"] == "sample" else ""
    return [f"learning rate {lr:g}{per}"]


def _frozen_lines(report: dict[str, Any]) -> list[str]:
    if not report["frozen"]:
        return []
    frozen, stages = report["frozen"], report["stages"]
    lines = [f"{frozen['trained'] / 1e6:.2f} M of {frozen['parameters'] / 1e6:.2f} M parameters train"]
    without = [str(k) for k, stage in enumerate(stages) if not stage["ranks"]]
    if without:
        lines.append(f"no samples are drawn of stage {', '.join(without)}: they would train nothing")
    return lines


def _guide_lines(report: dict[str, Any]) -> list[str]:
    guide = report.get("guide")
    if not guide:
        return []
    return [
        f"guide to step {guide['last_step']}: for each sample {guide['teacher_gmacs']:.3g} GMAC of the teacher and "
        f"{guide['projector_gmacs']:.3g} of a projector of {guide['params'] / 1e6:.2f} M parameters"
    ]


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


def _gpu_lines(report: dict[str, Any]) -> list[str]:
    if "gpu" not in report:
        return []
    gpu, ranks = report["gpu"], report["ranks"]
    in_phases = [rank for phase in report.get("phases", ()) for rank in phase["ranks"]]
    peak = max([*ranks, *in_phases], key=lambda rank: rank["peak_bytes"]["total"])
    compute = [rank["compute_seconds"] for rank in ranks]
    lines = [
        f"{gpu['name']}: {'fits' if gpu['fits'] else '[red]does not fit[/]'}, rank {peak['rank']} needs "
        f"{size(peak['peak_bytes']['total'])} of {size(gpu['usable_bytes'])}",
        f"a step takes at least {report['step_seconds']:.3g} s: {gpu['images_per_second']:.3g} img/s, MFU "
        f"{gpu['mfu']:.0%}; compute {min(compute):.3g}-{max(compute):.3g} s, communication "
        f"{gpu['communication_seconds']:.2g} s ({gpu['exposed_seconds']:.2g} s not hidden), optimizer "
        f"{gpu['optimizer_seconds']:.2g} s",
        f"assumed: {gpu['compute_efficiency']:.0%} of the peak in matrix products, {gpu['bandwidth_efficiency']:.0%} "
        "of the memory bandwidth; time for data is not counted",
    ]
    if "largest_micro_batch" in report:
        lines.append(f"largest micro batch: {report['largest_micro_batch']} samples a rank")
    if not gpu["fits"] and not gpu.get("remedies"):
        lines.append("neither smaller micro batches, bf16, activation checkpointing, ZeRO nor more ranks alone help")
    return lines + [f"fits with {remedy}" for remedy in gpu.get("remedies", [])]


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
