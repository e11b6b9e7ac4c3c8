"""Frozen parameters on a GPU: their weights stay, in fp32 and in bf16, and checkpoints hold them exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.models.multistage_unet import build_model
from msdiff_dist.recipe import load_recipe, recipe_mapping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEBUG = Path(__file__).parents[2] / "recipes/debug.yaml"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("[shared,stages.1,stages.2]", ("shared.", "stages.1.", "stages.2.")),
        ("[shared.input_blocks,stages.1]", ("shared.input_blocks.", "stages.1.")),
    ],
)
def test_frozen_weights_stay(tmp_path: Path, freeze: str, frozen: tuple[str, ...], precision: str) -> None:
    recipe = load_recipe(DEBUG, ["train.steps=4", f"train.precision={precision}", f"train.freeze={freeze}"])
    for steps in (2, 4):  # the second start resumes
        mapping = recipe_mapping(recipe)
        mapping["train"]["steps"] = steps
        assert run_local(mapping, tmp_path, 1) == "finished"
    first = build_model(recipe.model, recipe.train.seed).state_dict()
    checkpoint = CheckpointReader(tmp_path / "checkpoints/step_00000004")
    for name in checkpoint.names():
        if name.startswith(frozen):
            assert torch.equal(checkpoint.tensor("param", name), first[name])
            assert torch.equal(checkpoint.tensor("ema", name), first[name])
        assert checkpoint.holds("exp_avg", name) != name.startswith(frozen)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    losses = [json.loads(line)["loss_per_stage"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all((loss is None) == ("shared," in freeze) for of_step in losses for loss in of_step[1:])
