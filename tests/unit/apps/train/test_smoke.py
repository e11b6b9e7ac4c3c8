"""What `--smoke` makes of a recipe that freezes parts of a large model."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.apps.train.smoke import smoke
from msdiff_dist.recipe import load_recipe

RECIPE = Path(__file__).parents[4] / "recipes/celebahq256_ldm_3stage.yaml"


@pytest.mark.parametrize(
    ("freeze", "kept"),
    [
        ("[shared,stages.1]", ("shared", "stages.1")),
        ("[shared.input_blocks.11,stages.2]", ("stages.2",)),
        ("[]", ()),
    ],
)
def test_patterns_of_blocks_that_the_small_model_lacks_are_dropped(freeze: str, kept: tuple[str, ...]) -> None:
    small = smoke(load_recipe(RECIPE, [f"train.freeze={freeze}"]))
    assert small.train.freeze == kept
    assert small.freezing().stages
