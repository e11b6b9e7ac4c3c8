"""Every recipe trains, samples and saves in its shrunken form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.apps.train.smoke import STEPS, smoke
from msdiff_dist.recipe import load_recipe, recipe_from, recipe_mapping

# bf16 is emulated on many CPUs: one recipe of each family trains in it, the others in fp32.
IN_BF16 = {"quickstart", "fashion_mnist_edm_3stage", "fashion_mnist_dpm_3stage"}
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# Of the unified recipes, which differ from their three-stage twins in stages alone, one of each system is enough.
OFTEN = {path for path in RECIPES if "unified" not in path.stem or path.stem.startswith(("celebahq", "cifar10"))}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path in OFTEN else pytest.mark.slow) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_smoke(path: Path, tmp_path: Path) -> None:
    recipe = smoke(load_recipe(path))
    precision = "bf16" if path.stem in IN_BF16 else "fp32"
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    run = tmp_path / "run"
    assert run_local(recipe_mapping(recipe), run, min(2, recipe.stages.num_stages)) == "finished"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS
    assert last["petaflops"] > 0
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{STEPS:08d}"]
    assert (run / f"samples/step_{STEPS:08d}.png").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_smoke_keeps_what_a_recipe_is_about(path: Path) -> None:
    recipe = load_recipe(path)
    small = smoke(recipe)
    assert path.stem == recipe.name
    for section in ("diffusion", "stages", "augmentation", "ema", "optimizer"):
        assert getattr(small, section) == getattr(recipe, section)
    assert type(small.model) is type(recipe.model)
    for field in ("family", "num_stages", "share_encoder", "takes_label", "takes_context", "attention_downsamples"):
        assert getattr(small.model, field) == getattr(recipe.model, field)
    assert len(small.model.channel_mult) == len(recipe.model.channel_mult)
    assert smoke(recipe) == small


def test_smoke_leaves_out_what_needs_images() -> None:
    changes = ["validation.fraction=0.1", "evaluation.every=100", "guide.features=mobilenet"]
    recipe = load_recipe(RECIPES[0].with_name("fashion_mnist_3stage.yaml"), changes)
    small = smoke(recipe)
    assert None not in (recipe.validation, recipe.guide)
    assert (recipe.evaluation.every, small.evaluation.every) == (100, 0)
    assert (small.validation, small.guide) == (None, None)
    assert recipe_from(recipe_mapping(small)) == small
