"""Intervals of stages, and boundaries that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdiff_dist.config import from_mapping
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import ConfigError

PROCESS = build_process(DiffusionConfig())


@given(st.sets(st.integers(1, 999), max_size=6))
def test_intervals_are_half_open_and_tile_the_process(boundaries: set[int]) -> None:
    partition = build_partition(StagesConfig(boundaries=tuple(sorted(boundaries))), PROCESS)
    t = np.arange(1000)
    stage = partition.stage_of(t)
    assert stage.dtype == np.int64
    for k in range(partition.num_stages):
        lo, hi = partition.interval(k)
        assert np.array_equal(t[stage == k], np.arange(lo, hi))
    assert np.array_equal(partition.stage_of(torch.arange(1000)).numpy(), stage)


def test_without_boundaries_there_is_one_stage() -> None:
    partition = build_partition(StagesConfig(), PROCESS)
    assert partition.num_stages == 1
    assert partition.interval(0) == (0, 1000)
    assert not partition.stage_of(np.arange(1000)).any()


@pytest.mark.parametrize("boundaries", [[442.5], [0.442, 0.631], [0], [1000], [-3], [442, 2000]])
def test_boundaries_that_the_process_does_not_have_are_refused(boundaries: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"stages\.boundaries\["):
        build_partition(from_mapping(StagesConfig, {"boundaries": boundaries}, "stages"), PROCESS)


def test_a_fraction_of_time_is_answered_with_its_timestep() -> None:
    with pytest.raises(ConfigError, match="Write 442"):
        build_partition(StagesConfig(boundaries=(0.442, 0.631)), PROCESS)


@pytest.mark.parametrize(
    "section",
    [
        {"boundaries": [631, 442]},
        {"boundaries": [442, 442]},
        {"boundaries": [float("nan")]},
        {"boundaries": [442], "sampling": [1, 1, 1]},
        {"boundaries": [442], "sampling": [1, 0]},
        {"boundaries": [442], "sampling": "often"},
    ],
)
def test_bad_sections_are_refused_by_field(section: dict) -> None:
    with pytest.raises(ConfigError, match=r"^stages\.(boundaries|sampling)"):
        from_mapping(StagesConfig, section, "stages")
