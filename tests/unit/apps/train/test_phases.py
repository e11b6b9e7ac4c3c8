"""What a run says of the steps at which its stages change."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.apps.train.phases import warnings_of
from msdiff_dist.recipe import load_recipe

DEBUG = Path(__file__).parents[4] / "recipes/debug.yaml"
END = "stages.end={at: [null, 12, null]}"


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ([], False),
        ([END], True),
        ([END, "model.share_encoder=false", "stages.sampling=uniform"], False),
        ([END, "train.freeze=[shared]"], False),
    ],
)
def test_an_end_beside_an_encoder_that_trains_on_is_said(changes: list[str], warned: bool) -> None:
    warnings = warnings_of(load_recipe(DEBUG, changes))
    assert [w.startswith("stages.end ") for w in warnings] == [True] * warned
