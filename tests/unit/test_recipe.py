"""Recipes as a whole: every shipped one loads, survives a round trip, and contradictions between parts are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from msdiff_dist.errors import ConfigError
from msdiff_dist.recipe import load_recipe, recipe_from, recipe_mapping

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
DEBUG = next(p for p in RECIPES if p.stem == "debug")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe_from(recipe_mapping(recipe)) == recipe
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"recipes/{path.name}" in line for line in header), "the header shows the command"
    for word in ("Hardware:", "Expect:", "Data:"):
        assert any(word in line for line in header), f"the header lacks {word!r}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_fit_the_machine(path: Path) -> None:
    train = load_recipe(path).train
    assert (train.precision, train.threads) == ("auto", 0)


def test_overrides_of_every_kind() -> None:
    recipe = load_recipe(
        DEBUG,
        ["train.steps=7", "optimizer.lr=1e-4", "stages.boundaries=[300,600]", "parallel.placement=[[0],[1,2]]"],
    )
    assert recipe.train.steps == 7
    assert recipe.optimizer.lr == 1e-4
    assert recipe.stages.boundaries == (300, 600)
    assert recipe.parallel.placement == ((0,), (1, 2))


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["model.in_channels=4"], "model.in_channels"),
        (["model.channel_mult=[1,2,2,2,2,2]", "model.attention_downsamples=[]"], "model.channel_mult"),
        (["data.context_shape=[7,32]"], "model.context_dim"),
        (["data.num_classes=null", "model.num_classes=null"], "train.condition_dropout"),
        (["stages.boundaries=[442.5,631]"], "stages.boundaries[0]"),
    ],
)
def test_contradictions_between_parts(overrides: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(DEBUG, overrides)
    assert caught.value.field == field


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: [1,\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_batch_sizes_obey_one_identity() -> None:
    train = load_recipe(DEBUG, ["train.global_batch_size=null", "train.micro_batch_size=5"]).train
    assert train.batch_size(4) == 20
    both = load_recipe(
        DEBUG, ["train.global_batch_size=40", "train.micro_batch_size=5", "train.gradient_accumulation_steps=2"]
    ).train
    assert both.batch_size(4) == 40
    with pytest.raises(ConfigError, match="5 x 3 x 2 = 30"):
        both.batch_size(3)


EDM = DEBUG.parent / "fashion_mnist_edm_3stage.yaml"


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["model.augment_labels=0"], "model.augment_labels"),
        (["augmentation=null"], "model.augment_labels"),
        (["augmentation.probability=2"], "augmentation.probability"),
        (["autoencoder.kind=space_to_depth", "autoencoder.factor=2", "model.in_channels=4", "model.out_channels=4"],
         "augmentation.probability"),
        (["model.family=ldm"], "model.augment_labels"),
        (["model.family=dpm"], "model.family"),
        (["ema.decay=0.999"], "ema.halflife_images"),
    ],
)  # fmt: skip
def test_contradictions_of_the_pixel_systems(overrides: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(EDM, overrides)
    assert field in [error.field for error in caught.value.errors]


def test_reference_of_fields_is_current() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "tools/recipe_reference.py"]
    page = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert (root / "docs/recipe.md").read_text() == page, "python tools/recipe_reference.py > docs/recipe.md"
