"""Numbers of an ablation's report."""

from __future__ import annotations

import numpy as np
import pytest

from msdiff_dist.apps.ablation.report import compute_to_reach


def test_compute_to_reach_a_score() -> None:
    petaflops, scores = np.array([1.0, 2.0, 4.0]), np.array([9.0, 5.0, 4.0])
    assert compute_to_reach(7.0, petaflops, scores) == pytest.approx(1.5)
    assert compute_to_reach(4.5, petaflops, scores) == pytest.approx(3.0)
    assert compute_to_reach(4.0, petaflops, scores) == pytest.approx(4.0)
    assert compute_to_reach(9.5, petaflops, scores) == pytest.approx(1.0)
    assert compute_to_reach(3.9, petaflops, scores) is None
    assert compute_to_reach(4.5, petaflops, np.array([9.0, np.nan, np.nan])) is None
