"""Which rank holds which stages, and how many samples of each it computes: decided once, by arithmetic alone.

The work of a stage is its number of samples times the cost of one. The work of all stages is laid out along a line, and
each rank takes a range of it, so a rank holds one stage or a few consecutive ones. The planner looks for the ranges
whose heaviest is lightest. Numbers of samples are whole and constant: every rank that holds a stage computes at least
one sample of it in every micro batch, so that no rank of its group is missing in a collective.

Suffixes of arrays: A micro batches of a step, W ranks, K stages.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from msdiff_dist.distributed.line_of_work import lightest_line
from msdiff_dist.errors import ConfigError, PlacementError

# Disjoint groups (no rank holds two decoders) are taken where they balance this well, or nearly as well as shared.
GOOD_BALANCE, SMALL_LOSS = 0.95, 0.02

StageSets = tuple[tuple[int, ...], ...]
"""The stages of every rank."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the ranks."""

    placement: Literal["auto"] | StageSets = "auto"
    """`auto`, or the stages of every rank: [[0], [0], [0, 1], [2]]."""
    zero_shared: int = 1
    """DeepSpeed's ZeRO level of the shared encoder, over all ranks (1-3)."""
    zero_decoders: int = 1
    """DeepSpeed's ZeRO level of each stage's decoder, over the ranks that hold it (1-2)."""

    def __post_init__(self) -> None:
        why_not = (
            "without ZeRO every rank would keep the whole optimizer state and gradients would not be summed exactly"
        )
        if self.zero_shared not in (1, 2, 3):
            raise ConfigError("zero_shared", self.zero_shared, f"must be 1, 2 or 3: {why_not}", "Choose 1, 2 or 3.")
        if self.zero_decoders == 3:
            why_not = "ZeRO 3 compares all ranks of the job with each other, and ranks of different stages differ"
        if self.zero_decoders not in (1, 2):
            raise ConfigError("zero_decoders", self.zero_decoders, f"must be 1 or 2: {why_not}", "Choose 1 or 2.")


@dataclass(frozen=True)
class Placement:
    """The stages of every rank and its samples in every micro batch.

    Attributes:
        stages_of_rank: for each rank its stages, ascending.
        samples_AWK: number of samples of each stage that each rank computes in each micro batch; 0 exactly where rank w
            does not hold stage k, or the batch has no samples of it.
    """

    stages_of_rank: StageSets
    samples_AWK: np.ndarray

    @property
    def world_size(self) -> int:
        return len(self.stages_of_rank)

    @property
    def num_stages(self) -> int:
        return int(self.samples_AWK.shape[2])

    @property
    def samples_WK(self) -> np.ndarray:
        """Number of samples of each stage that each rank computes in a global batch."""
        values: np.ndarray = self.samples_AWK.sum(axis=0)
        return values

    def group(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold `stage`, ascending."""
        return tuple(rank for rank, held in enumerate(self.stages_of_rank) if stage in held)

    def balance(self, cost_K: Sequence[float]) -> float:
        """Mean over maximum of the ranks' work in a step, in (0, 1].

        Args:
            cost_K: cost of one sample of each stage, in any unit.
        """
        return _balance(self.samples_WK, np.asarray(cost_K, dtype=float))


def plan(
    micro_quotas_AK: np.ndarray, cost_K: Sequence[float], world_size: int, explicit: StageSets | None = None
) -> Placement:
    """Place K stages on `world_size` ranks.

    Args:
        micro_quotas_AK: number of samples of each stage in each micro batch. The micro batches' numbers of one stage
            differ by one at most. A stage without samples has no ranks.
        cost_K: cost of one sample of each stage (encoder and its decoder), in any unit.
        explicit: the stages that every rank is to hold; None: they are chosen.

    Raises:
        PlacementError: the batch is too small for the ranks, or `explicit` does not make sense.
    """
    quotas_AK, cost = np.asarray(micro_quotas_AK), np.asarray(cost_K, dtype=float)
    assert np.ptp(quotas_AK, axis=0).max() <= 1
    assert (cost > 0).all()
    computed = quotas_AK.any(axis=0)
    samples_WK = np.zeros((world_size, len(cost)), dtype=np.int64)
    if explicit is None:
        _check_size(quotas_AK, world_size)
        samples_WK[:, computed] = _choose(quotas_AK[:, computed], cost[computed], world_size)
    else:
        holds_WK = _checked(explicit, quotas_AK, world_size)
        samples_WK[:, computed] = _shared_among_holders(quotas_AK[:, computed], cost[computed], holds_WK[:, computed])
    stages_of_rank = tuple(tuple(k for k, n in enumerate(n_K) if n) for n_K in samples_WK.tolist())
    return Placement(stages_of_rank, _micro_samples(samples_WK, quotas_AK))


def plan_on(stages_of_rank: StageSets, micro_quotas_AK: np.ndarray, cost_K: Sequence[float]) -> Placement:
    """Place samples on ranks that hold the given stages. A rank whose stages have no samples in the batch has none.

    Args:
        micro_quotas_AK, cost_K: as `plan` takes them.

    Raises:
        PlacementError: a stage has samples, but not one for each of its ranks in each micro batch.
    """
    quotas_AK, cost = np.asarray(micro_quotas_AK), np.asarray(cost_K, dtype=float)
    computed = quotas_AK.any(axis=0)
    holds_WK = np.array([[k in held for k in range(len(cost))] for held in stages_of_rank])
    for k in np.flatnonzero(computed & (holds_WK.sum(axis=0) > quotas_AK.min(axis=0))).tolist():
        raise _too_few(quotas_AK, k, int(holds_WK[:, k].sum()))
    samples_WK = np.zeros(holds_WK.shape, dtype=np.int64)
    samples_WK[:, computed] = _shared_among_holders(quotas_AK[:, computed], cost[computed], holds_WK[:, computed])
    return Placement(stages_of_rank, _micro_samples(samples_WK, quotas_AK))


def _balance(samples_WK: np.ndarray, cost_K: np.ndarray) -> float:
    work_W = samples_WK @ cost_K
    return float(work_W.mean() / work_W.max())


def _check_size(quotas_AK: np.ndarray, world_size: int) -> None:
    """Raise PlacementError if the batch is too small for the ranks."""
    least = len(quotas_AK)
    of_stage = {k: q for k, q in enumerate(quotas_AK.sum(axis=0).tolist()) if q}
    quotas = [*of_stage.values()]
    capacity = sum(q // least for q in quotas)
    if min(quotas) < least:
        k = min(of_stage, key=lambda k: of_stage[k])
        raise PlacementError(
            "train.global_batch_size",
            sum(quotas),
            f"gives stage {k} {of_stage[k]} samples for {least} micro batches",
            f"Make it at least {-(-sum(quotas) * least // of_stage[k])}, or accumulate less.",
        )
    if world_size > capacity:
        raise PlacementError(
            "train.global_batch_size",
            sum(quotas),
            f"is too small: {world_size} ranks need at least one sample each in each of {least} micro batches",
            f"Make it at least {world_size * least + len(quotas) * (least - 1)}, or use at most {capacity} ranks.",
        )


def _choose(quotas_AK: np.ndarray, cost_K: np.ndarray, world_size: int) -> np.ndarray:
    """Samples per rank and stage, [W, K]: disjoint groups where they balance well enough, else the line."""
    # `least` is the least number of samples of a stage that a rank can hold: one in each micro batch.
    least, quotas, costs = len(quotas_AK), quotas_AK.sum(axis=0).tolist(), cost_K.tolist()
    # A line balances best, but its ranks at the edges of stages hold two decoders: that is more memory, and they take
    # part in the collectives of two groups. Disjoint groups have no such ranks and are taken where they cost little.
    line = lightest_line(quotas, costs, least, world_size)
    if world_size < len(quotas):
        assert line is not None
        return line
    disjoint = _disjoint(quotas, costs, least, world_size)
    if line is None:
        return disjoint
    wanted = min(GOOD_BALANCE, _balance(line, cost_K) - SMALL_LOSS)
    if _balance(disjoint, cost_K) >= wanted:
        return disjoint
    return _with_fewer_holders(line, quotas_AK, cost_K, wanted)


def _with_fewer_holders(samples_WK: np.ndarray, quotas_AK: np.ndarray, cost_K: np.ndarray, wanted: float) -> np.ndarray:
    """Take from ranks with several stages those with the fewest samples, as long as the balance stays `wanted`.

    Each decoder less on a rank saves memory and communication.
    """
    holds_WK = samples_WK > 0
    shared = [
        (samples_WK[r, k], r, k) for r in np.flatnonzero(holds_WK.sum(axis=1) > 1) for k in np.flatnonzero(holds_WK[r])
    ]
    for _, r, k in sorted(shared):
        fewer_WK = holds_WK.copy()
        fewer_WK[r, k] = False
        if not fewer_WK[r].any() or not fewer_WK[:, k].any():
            continue
        freed_WK = _shared_among_holders(quotas_AK, cost_K, fewer_WK)
        if _balance(freed_WK, cost_K) >= wanted:
            samples_WK, holds_WK = freed_WK, fewer_WK
    return samples_WK


def _disjoint(quotas: list[int], costs: list[float], least: int, world_size: int) -> np.ndarray:
    """Samples of one stage per rank, [W, K]: ranks go one by one to the stage whose ranks have the most work."""
    # Greedy is optimal here: the stage with the most work per rank sets the time of the step, and only a further rank
    # of that stage can lower it.
    sizes = [1] * len(quotas)
    heaviest = [(-q * c, k) for k, (q, c) in enumerate(zip(quotas, costs, strict=True))]
    heapq.heapify(heaviest)
    for _ in range(world_size - len(quotas)):
        while quotas[heaviest[0][1]] // least == sizes[heaviest[0][1]]:
            heapq.heappop(heaviest)  # with one more rank, some rank would have fewer than `least` samples
        k = heaviest[0][1]
        sizes[k] += 1
        # The busiest rank of the stage has the ceiling of quota / size; -q // s is minus that ceiling.
        heapq.heapreplace(heaviest, (-quotas[k] // sizes[k] * costs[k], k))
    rows = [np.zeros((size, len(quotas)), dtype=np.int64) for size in sizes]
    for k, (rows_k, quota) in enumerate(zip(rows, quotas, strict=True)):
        rows_k[:, k] = _even(quota, len(rows_k))
    return np.concatenate(rows)


def _even(total: int, count: int) -> np.ndarray:
    """`count` whole numbers that add up to `total` and differ by one at most, the larger ones first."""
    return total // count + (np.arange(count) < total % count)


def _checked(explicit: StageSets, quotas_AK: np.ndarray, world_size: int) -> np.ndarray:
    """Whether each rank holds each stage, bool [W, K], from the recipe's lists.

    Raises:
        PlacementError: the lists contradict the number of ranks or stages, or the batch is too small for them.
    """
    field, num_stages = "parallel.placement", quotas_AK.shape[1]
    if len(explicit) != world_size:
        raise PlacementError(
            field,
            [list(held) for held in explicit],
            f"lists the stages of {len(explicit)} ranks and there are {world_size}",
            f"List {world_size} ranks, start {len(explicit)}, or write `auto`.",
        )
    holds_WK = np.zeros((world_size, num_stages), dtype=bool)
    for rank, held in enumerate(explicit):
        if not held:
            raise PlacementError(f"{field}[{rank}]", [], f"leaves rank {rank} without a stage", "Give it at least one.")
        if len(set(held)) < len(held) or not all(0 <= k < num_stages for k in held):
            raise PlacementError(
                f"{field}[{rank}]",
                list(held),
                "names an unknown stage or one twice",
                f"The stages are 0 to {num_stages - 1}.",
            )
        holds_WK[rank, list(held)] = True
    for k, (size, quota) in enumerate(zip(holds_WK.sum(axis=0), quotas_AK.min(axis=0), strict=True)):
        if size == 0 and quotas_AK[:, k].any():
            raise PlacementError(
                field,
                [list(held) for held in explicit],
                f"leaves stage {k} to no rank",
                f"Add {k} to some rank's stages.",
            )
        if size > quota:
            raise _too_few(quotas_AK, k, size)
    return holds_WK


def _too_few(quotas_AK: np.ndarray, stage: int, holders: int) -> PlacementError:
    """A stage has fewer samples in a micro batch than there are ranks that hold it."""
    quota = quotas_AK[:, stage].min()
    return PlacementError(
        "train.global_batch_size",
        int(quotas_AK.sum()),
        f"gives stage {stage} {quota} samples in a micro batch and {holders} ranks of parallel.placement hold it",
        f"Raise it, accumulate less, or let at most {quota} ranks hold stage {stage}.",
    )


def _shared_among_holders(quotas_AK: np.ndarray, cost_K: np.ndarray, holds_WK: np.ndarray) -> np.ndarray:
    """Samples per rank and stage, [W, K], for ranks that hold the stages of the mask `holds_WK`.

    Each stage is dealt evenly over its ranks, then samples move from busier to idler ranks until no move helps.
    """
    least = len(quotas_AK)
    samples_WK = np.zeros(holds_WK.shape, dtype=np.int64)
    for k, quota in enumerate(quotas_AK.sum(axis=0)):
        samples_WK[holds_WK[:, k], k] = _even(quota, holds_WK[:, k].sum())
    stages = np.arange(len(cost_K))
    # In each round one stage moves samples from the busiest of its ranks that has more than `least` of it to the idlest
    # of its ranks: the stage where the gap between the two exceeds the cost of a sample by most. A move of one sample
    # helps while the gap is wider than that cost. Half the gap is moved at once, so that a few rounds are enough.
    while True:
        load_W = samples_WK @ cost_K
        giver_K = np.where(samples_WK > least, load_W[:, None], -np.inf).argmax(axis=0)
        taker_K = np.where(holds_WK, load_W[:, None], np.inf).argmin(axis=0)
        gap_K = np.where(samples_WK[giver_K, stages] > least, load_W[giver_K] - load_W[taker_K], 0)
        k = int((gap_K - cost_K).argmax())
        if gap_K[k] <= cost_K[k] * (1 + 1e-9):
            return samples_WK
        spare = samples_WK[giver_K[k], k] - least
        moved = min(spare, max(1, int(gap_K[k] / (2 * cost_K[k]))))
        samples_WK[giver_K[k], k] -= moved
        samples_WK[taker_K[k], k] += moved


def _micro_samples(samples_WK: np.ndarray, quotas_AK: np.ndarray) -> np.ndarray:
    """Split every rank's samples over the micro batches, [A, W, K]: evenly, and keeping each micro batch's quotas.

    The samples of a stage stand in a row, rank after rank, and are dealt to the micro batches in turn. Any A neighbours
    in the row reach every micro batch, hence so do a rank's samples, which are at least A. The first turn is cut short
    at its start: it deals only to the micro batches whose quota is one sample larger.
    """
    accumulation = len(quotas_AK)
    ends_WK = samples_WK.cumsum(axis=0)
    # The argsort of an argsort is the rank of each element: the place of each micro batch in a turn, the larger last.
    turn_AK = quotas_AK.argsort(axis=0, kind="stable").argsort(axis=0)
    offset_AK = turn_AK + quotas_AK.sum(axis=0) % accumulation + 1

    def dealt(row_WK: np.ndarray) -> np.ndarray:
        """How many of the first `row_WK` samples of a row each micro batch gets, up to a constant per micro batch."""
        values: np.ndarray = (row_WK[None] - offset_AK[:, None]) // accumulation
        return values

    values: np.ndarray = dealt(ends_WK) - dealt(ends_WK - samples_WK)
    return values
