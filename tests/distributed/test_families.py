"""The pixel systems under the same trainer: U-Net families, processes, augmentation and averaging by half-life."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.recipe import Recipe, load_recipe, recipe_from, recipe_mapping
from tests.distributed.reference import train_reference
from tests.distributed.test_parity import DEBUG, OPTIMIZERS, SMALL, STEPS, check_equal

pytestmark = pytest.mark.distributed

MODEL = {
    "encoder_channels": 16,
    "decoder_channels": [24, 16, 8],
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_downsamples": [2],
    "num_classes": 4,
}
EDM = {
    "model": {**MODEL, "family": "ncsnpp", "augment_labels": 9},
    "diffusion": {"process": "edm"},
    "stages": {"boundaries": [0.2, 0.6]},
    "augmentation": {"probability": 0.5},
    "ema": {"halflife_images": 50},
}
DPM = {
    "model": {**MODEL, "family": "ncsnpp_vp"},
    "diffusion": {"process": "vp"},
    "stages": {"boundaries": [0.442, 0.6308], "sampling": "equal"},
}


def recipe_of(system: dict[str, Any], *overrides: str, dropout: float = 0.0) -> Recipe:
    mapping = recipe_mapping(load_recipe(DEBUG, [*SMALL, *OPTIMIZERS["adamw"], *overrides])) | system
    return recipe_from(mapping | {"model": {**system["model"], "dropout": dropout}})


@pytest.mark.parametrize(
    ("system", "world", "overrides"),
    [
        (EDM, 2, ["parallel.zero_shared=2", "train.gradient_accumulation_steps=2"]),
        (EDM, 3, ["parallel.placement=[[0],[0,1],[1,2]]", "parallel.zero_shared=3"]),
        (DPM, 3, ["parallel.placement=[[0],[0,1],[1,2]]"]),
        (DPM | {"model": {**DPM["model"], "share_encoder": False}}, 2, []),
    ],
    ids=["edm", "edm crossed", "dpm", "dpm separate"],
)
def test_same_training_as_one_process(system: dict[str, Any], world: int, overrides: list[str], tmp_path: Path) -> None:
    recipe = recipe_of(system, *overrides)
    assert run_local(recipe_mapping(recipe), tmp_path / "run", world) == "finished"
    check_equal(train_reference(recipe, STEPS), tmp_path / "run")


def test_dropout_masks_are_the_same_when_a_step_is_taken_again(tmp_path: Path) -> None:
    mapping = recipe_mapping(recipe_of(EDM, "checkpoint.every=2", dropout=0.4))
    run_local(mapping, tmp_path / "run", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step_00000004")
    run_local(mapping, tmp_path / "again", 2)
    first, again = (CheckpointReader(tmp_path / run / "checkpoints/step_00000004") for run in ("run", "again"))
    assert all(torch.equal(first.tensor("param", n), again.tensor("param", n)) for n in first.names())
    without = train_reference(recipe_of(EDM), STEPS).state
    difference = max(float((first.tensor("param", n) - p).abs().max()) for n, p in without.items())
    assert difference > 1e-4, "dropout is at work"
