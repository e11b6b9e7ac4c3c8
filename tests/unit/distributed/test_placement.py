from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from msdiff_dist.config import from_mapping
from msdiff_dist.distributed.placement import ParallelConfig, Placement, StageSets, plan
from msdiff_dist.errors import ConfigError, PlacementError

PAPER_COSTS = [120.44, 84.2, 56.6]


def micro_quotas(quotas: list[int], accumulation: int) -> np.ndarray:
    m = np.arange(accumulation)[:, None]
    return np.array(quotas) * (m + 1) // accumulation - np.array(quotas) * m // accumulation


def thirds(total: int) -> list[int]:
    return [total // 3 + (k < total % 3) for k in range(3)]


def assert_serves(placement: Placement, quotas_AK: np.ndarray) -> None:
    samples_AWK = placement.samples_AWK
    holds_WK = np.zeros(samples_AWK.shape[1:], dtype=bool)
    for rank, held in enumerate(placement.stages_of_rank):
        assert held
        assert list(held) == sorted(held)
        holds_WK[rank, list(held)] = True
    np.testing.assert_array_equal(samples_AWK.sum(axis=1), quotas_AK)
    assert ((samples_AWK >= 1) == holds_WK).all(), "every holder has a sample in every micro batch, and nobody else"
    assert (samples_AWK.min(axis=0) >= samples_AWK.max(axis=0) - 1).all(), "micro batches are alike"
    for k in range(placement.num_stages):
        assert placement.group(k) == tuple(np.flatnonzero(holds_WK[:, k]))


def assert_is_a_line(stages_of_rank: StageSets) -> None:
    flat = [k for held in stages_of_rank for k in held]
    assert flat == sorted(flat)
    for held in stages_of_rank:
        assert list(held) == list(range(held[0], held[-1] + 1))


def least_maximal_load(quotas: list[int], costs: list[float], least: int, world_size: int) -> float:
    """Dynamic programme over the samples laid out on the line: the best any line can do."""
    cost_S = np.repeat(costs, quotas)
    stage_S = np.repeat(np.arange(len(quotas)), quotas)
    total, work_S = len(cost_S), np.concatenate([[0.0], np.cumsum(cost_S)])
    best = np.full((world_size + 1, total + 1), np.inf)
    best[0, 0] = 0.0
    for w in range(1, world_size + 1):
        for a in range(total):
            for b in range(a + 1, total + 1):
                if np.bincount(stage_S[a:b])[stage_S[a:b]].min() >= least:
                    best[w, b] = min(best[w, b], max(best[w - 1, a], work_S[b] - work_S[a]))
    return float(best[world_size, total])


@st.composite
def problems(draw: st.DrawFn, largest: int = 400, ranks: int = 64) -> tuple[list[int], list[float], int, int]:
    accumulation = draw(st.integers(1, 5))
    num_stages = draw(st.integers(1, 5))
    quotas = draw(st.lists(st.integers(accumulation, largest), min_size=num_stages, max_size=num_stages))
    costs = draw(st.lists(st.floats(0.05, 20.0), min_size=num_stages, max_size=num_stages))
    capacity = sum(q // accumulation for q in quotas)
    return quotas, costs, accumulation, draw(st.integers(1, min(capacity, ranks)))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_automatic_plans_serve_all_quotas_on_a_line(problem: tuple[list[int], list[float], int, int]) -> None:
    quotas, costs, accumulation, world_size = problem
    quotas_AK = micro_quotas(quotas, accumulation)
    placement = plan(quotas_AK, costs, world_size)
    assert placement.world_size == world_size
    assert_serves(placement, quotas_AK)
    assert_is_a_line(placement.stages_of_rank)
    assert 0 < placement.balance(costs) <= 1 + 1e-12


@given(problems(largest=7, ranks=6))
@settings(max_examples=40, deadline=None)
def test_automatic_plans_are_nearly_the_best_lines(problem: tuple[list[int], list[float], int, int]) -> None:
    quotas, costs, accumulation, world_size = problem
    placement = plan(micro_quotas(quotas, accumulation), costs, world_size)
    best = float(np.dot(quotas, costs)) / world_size / least_maximal_load(quotas, costs, accumulation, world_size)
    assert placement.balance(costs) >= min(0.95, best - 0.03)


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_explicit_plans_are_obeyed_and_balanced(
    problem: tuple[list[int], list[float], int, int], random: object
) -> None:
    quotas, costs, accumulation, world_size = problem
    num_stages = len(quotas)
    explicit = tuple(
        tuple(k for k in range(num_stages) if random.random() < 0.5) or (rank % num_stages,)  # type: ignore[attr-defined]
        for rank in range(world_size)
    )
    holders = [sum(k in held for held in explicit) for k in range(num_stages)]
    assume(all(1 <= h <= q // accumulation for h, q in zip(holders, quotas, strict=True)))
    quotas_AK = micro_quotas(quotas, accumulation)
    placement = plan(quotas_AK, costs, world_size, explicit)
    assert placement.stages_of_rank == explicit
    assert_serves(placement, quotas_AK)
    load_W, samples_WK = placement.samples_WK @ np.array(costs), placement.samples_WK
    for k, cost in enumerate(costs):
        group = list(placement.group(k))
        givers = [r for r in group if samples_WK[r, k] > accumulation]
        if givers:  # no move of one sample lightens the busier of two ranks
            assert load_W[givers].max() <= load_W[group].min() + cost * (1 + 1e-6)


def test_paper_model_balances_on_every_world_in_seconds() -> None:
    start = time.process_time()
    for world_size in range(2, 1025):
        placement = plan(micro_quotas(thirds(48 * world_size), 1), PAPER_COSTS, world_size)
        assert placement.balance(PAPER_COSTS) >= 0.95, world_size
        assert (placement.samples_WK.sum(axis=0) == 16 * world_size).all()
    assert time.process_time() - start < 10


def test_disjoint_groups_where_they_balance_well() -> None:
    for world_size, shared in [(8, True), (64, False)]:
        placement = plan(micro_quotas(thirds(48 * world_size), 1), PAPER_COSTS, world_size)
        assert any(len(held) > 1 for held in placement.stages_of_rank) == shared


def test_one_rank_holds_everything_and_fewer_ranks_than_stages_work() -> None:
    quotas_AK = micro_quotas([7, 8, 9, 10], 3)
    assert plan(quotas_AK, [1.0, 1.0, 1.0, 1.0], 1).stages_of_rank == ((0, 1, 2, 3),)
    assert {k for held in plan(quotas_AK, [4.0, 3.0, 2.0, 1.0], 2).stages_of_rank for k in held} == {0, 1, 2, 3}


def test_all_stages_on_all_ranks() -> None:
    quotas_AK = micro_quotas([40, 40, 40], 2)
    placement = plan(quotas_AK, PAPER_COSTS, 4, ((0, 1, 2),) * 4)
    assert (placement.samples_WK == 10).all()
    assert placement.balance(PAPER_COSTS) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("explicit", "field", "problem"),
    [
        (((0,), (1,)), "parallel.placement", "lists the stages of 2 ranks and there are 3"),
        (((0,), (1,), ()), r"parallel.placement\[2\]", "leaves rank 2 without a stage"),
        (((0,), (1,), (3,)), r"parallel.placement\[2\]", "unknown stage"),
        (((0,), (1, 1), (2,)), r"parallel.placement\[1\]", "twice"),
        (((0,), (1,), (0, 1)), "parallel.placement", "leaves stage 2 to no rank"),
    ],
)
def test_wrong_placements_are_refused(explicit: StageSets, field: str, problem: str) -> None:
    with pytest.raises(PlacementError, match=f"{field} = .*{problem}"):
        plan(micro_quotas([6, 6, 6], 1), PAPER_COSTS, 3, explicit)


def test_batches_too_small_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"train.global_batch_size = 6: .*use at most 6 ranks"):
        plan(micro_quotas([2, 2, 2], 1), PAPER_COSTS, 7)
    with pytest.raises(PlacementError, match=r"train.global_batch_size = 6: gives stage 1 1 samples for 2 micro"):
        plan(micro_quotas([3, 1, 2], 2), PAPER_COSTS, 2)
    with pytest.raises(PlacementError, match=r"gives stage 0 2 samples in a micro batch and 3 ranks"):
        plan(micro_quotas([4, 4, 4], 2), PAPER_COSTS, 3, ((0, 1), (0,), (0, 2)))


def test_parallel_config() -> None:
    config = from_mapping(ParallelConfig, {"placement": [[0], [0, 1], [2]], "zero_shared": 3, "zero_decoders": 2})
    assert config.placement == ((0,), (0, 1), (2,))
    assert from_mapping(ParallelConfig, {}).placement == "auto"
    with pytest.raises(ConfigError, match=r"parallel.zero_shared = 0: must be 1, 2 or 3"):
        from_mapping(ParallelConfig, {"zero_shared": 0}, "parallel")
    with pytest.raises(ConfigError, match=r"parallel.zero_decoders = 3: must be 1 or 2: ZeRO 3 compares"):
        from_mapping(ParallelConfig, {"zero_decoders": 3}, "parallel")
    with pytest.raises(ConfigError, match=r"parallel.placement"):
        from_mapping(ParallelConfig, {"placement": "disjoint"}, "parallel")


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_stages_without_samples_have_no_ranks(world_size: int) -> None:
    quotas_AK = micro_quotas([12, 0, 7], 2)
    placement = plan(quotas_AK, PAPER_COSTS, world_size)
    assert_serves(placement, quotas_AK)
    assert placement.group(1) == ()
    without = plan(quotas_AK[:, [0, 2]], [PAPER_COSTS[0], PAPER_COSTS[2]], world_size)
    np.testing.assert_array_equal(placement.samples_AWK[:, :, [0, 2]], without.samples_AWK)
    with pytest.raises(PlacementError, match=r"gives stage 2 1 samples for 2 micro"):
        plan(micro_quotas([12, 0, 1], 2), PAPER_COSTS, 1)
    assert plan(quotas_AK, PAPER_COSTS, 2, ((0,), (0, 2))).stages_of_rank == ((0,), (0, 2))
