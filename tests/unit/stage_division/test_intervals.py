"""The best intervals, against a search over all of them, and the paper's boundaries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiff_dist.diffusion.clock import clock_grid
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import ConfigError
from msdiff_dist.stage_division.intervals import (
    Lengths,
    affinity_boundaries,
    best_intervals,
    centred_costs,
    similarity_intervals,
    snr_boundaries,
    timestep_boundaries,
)

DISCRETE, VP, EDM = DiscreteProcess(DiscreteConfig()), VPProcess(VPConfig()), EDMProcess(EDMConfig())


def test_the_papers_boundaries_under_vp_sde() -> None:
    assert snr_boundaries(VP, 3) == [0.348, 0.709]
    assert timestep_boundaries(VP, 3) == pytest.approx([0.33, 0.67], abs=0.005)


def intervals(cuts: tuple[int, ...], G: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise((0, *cuts, G)))


def search(cost, G: int, stages: int) -> float:
    """The least total cost over every way to cut."""
    return min(sum(cost(i, j) for i, j in intervals(c, G)) for c in itertools.combinations(range(1, G), stages - 1))


@given(st.lists(st.floats(0.01, 5), min_size=4, max_size=9), st.integers(1, 4))
def test_centred_clusters_are_the_best_of_all(steps: list[float], stages: int) -> None:
    feature, G = np.cumsum(steps), len(steps)

    def cost(i: int, j: int) -> float:
        members = feature[i:j]
        return float(np.abs(members - members[len(members) // 2]).sum())

    cuts = best_intervals(centred_costs(feature), stages)
    assert len(cuts) == stages - 1
    assert sum(cost(i, j) for i, j in intervals(tuple(cuts), G)) == pytest.approx(search(cost, G, stages))


@given(st.integers(6, 11), st.integers(1, 4), st.integers(0, 1000))
def test_lengths_limit_the_search(G: int, stages: int, seed: int) -> None:
    """Against a search over the divisions whose stages all have floor(G / 2K) to ceil(3 G / 2K) points."""
    costs = np.random.default_rng(seed).random((G, G))
    least, most = G // (2 * stages), -(-3 * G // (2 * stages))
    allowed = [
        sum(costs[i, j - 1] for i, j in intervals(cuts, G))
        for cuts in itertools.combinations(range(1, G), stages - 1)
        if all(least <= j - i <= most for i, j in intervals(cuts, G))
    ]
    lengths = Lengths(min=1 / (2 * stages), max=min(1, 3 / (2 * stages)))
    cuts = best_intervals(costs, stages, lengths)
    assert all(least <= j - i <= most for i, j in intervals(tuple(cuts), G))
    assert sum(costs[i, j - 1] for i, j in intervals(tuple(cuts), G)) == pytest.approx(min(allowed))


def test_a_limit_of_the_length_moves_boundaries_of_the_papers_grid() -> None:
    """Without limits the noisiest of two stages by signal-to-noise ratio holds 0.432 of the clock."""
    assert snr_boundaries(VP, 2) == [0.568]
    assert snr_boundaries(VP, 2, Lengths(min=0.45)) == [0.551], "450 of the times 0.001, ..., 1"
    assert snr_boundaries(DISCRETE, 2, Lengths(max=0.5)) == [500]


def test_lengths_that_no_division_has_are_refused() -> None:
    for lengths, message in ((Lengths(min=0.4), "--min-length = 0.4: 3 stages"), (Lengths(max=0.3), "--max-length")):
        with pytest.raises(ConfigError, match=message):
            timestep_boundaries(VP, 3, lengths)
    for low, high, name in ((-0.1, 1, "--min-length"), (0.5, 0.4, "--max-length"), (0, 0, "--max-length")):
        with pytest.raises(ConfigError, match=name):
            Lengths(min=low, max=high)


@given(st.integers(4, 8), st.integers(1, 4), st.integers(0, 1000))
def test_affinity_clusters_are_the_best_of_all(G: int, stages: int, seed: int) -> None:
    affinity = np.random.default_rng(seed).normal(size=(G, G))

    def cost(i: int, j: int) -> float:
        return -float(affinity[i + (j - i) // 2, i:j].sum())

    cuts = affinity_boundaries(np.arange(G), affinity, stages)
    assert sum(cost(i, j) for i, j in intervals(tuple(cuts), G)) == pytest.approx(search(cost, G, stages))


@given(st.integers(4, 8), st.integers(1, 4), st.integers(0, 1000))
def test_similarity_clusters_are_the_best_of_all(G: int, stages: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).random((G, G))

    def cost(i: int, j: int) -> float:
        return -float((j - i) * similarity[i:j, i:j].mean())

    cuts = similarity_intervals(similarity, stages)
    assert sum(cost(i, j) for i, j in intervals(tuple(cuts), G)) == pytest.approx(search(cost, G, stages))


def test_blocks_of_similar_times_are_found() -> None:
    block = np.repeat([0, 1, 2, 3], [5, 2, 8, 6])
    similarity = np.where(block[:, None] == block, 1.0, 0.2)
    assert similarity_intervals(similarity, 4).tolist() == [5, 7, 15]
    assert affinity_boundaries(np.arange(21), similarity, 4) == [5, 7, 15]


@pytest.mark.parametrize("process", [DISCRETE, VP, EDM], ids=lambda p: p.unit)
@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("method", [timestep_boundaries, snr_boundaries])
def test_boundaries_make_a_partition_of_their_process(process: Process, stages: int, method) -> None:
    boundaries = method(process, stages)
    assert build_partition(StagesConfig(boundaries=tuple(boundaries)), process).num_stages == stages


def test_systems_agree_on_the_clock() -> None:
    np.testing.assert_allclose(EDM.sigma_of(snr_boundaries(EDM, 3)), VP.sigma_of(snr_boundaries(VP, 3)))
    assert timestep_boundaries(DISCRETE, 4) == pytest.approx([250, 500, 750], abs=2)
    assert len(clock_grid(DiscreteProcess(DiscreteConfig(timesteps=100)))) == 100


def test_more_stages_than_times_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--stages = 101: a grid of 100 times"):
        snr_boundaries(DiscreteProcess(DiscreteConfig(timesteps=100)), 101)
