"""Training that starts from an export: a grown model's first loss is the unified model's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from msdiff_dist.apps.train.warm_start import start_weights
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.convert.edit.stages import grow
from msdiff_dist.convert.formats.export_folder import read_export, write_export
from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.tensor_sources import MemorySource
from msdiff_dist.errors import ConfigError
from msdiff_dist.export.description import describe
from msdiff_dist.models import build_model
from msdiff_dist.recipe import recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from tests.distributed.reference import train_reference
from tests.distributed.tiny_run import ADAM, recipe_of, trained

pytestmark = pytest.mark.distributed


class EveryStage(nn.Module):
    """A unified model with the interface of a multi-stage one: it computes every stage."""

    def __init__(self, unified: nn.Module) -> None:
        super().__init__()
        self.unified = unified

    def forward(self, x: Tensor, t: Tensor, stage: Tensor, *conditions: Any) -> Tensor:
        return self.unified(x, t, torch.zeros_like(stage), *conditions)


@pytest.fixture
def unified(tmp_path: Path) -> nn.Module:
    """A unified model, without parameters that are zero as at initialisation, exported to tmp_path/unified."""
    mapping = recipe_of(ADAM, model__decoder_channels=[8], stages__boundaries=[])
    recipe = recipe_from(mapping)
    model, draw = build_model(recipe.model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    description = replace(describe(recipe_mapping(recipe), 7), weights="ema")
    write_export(
        ModelWeights(description=description, tensors=MemorySource(model.state_dict())), tmp_path / "unified", {}
    )
    return model


def grown(folder: Path, widths: list[int]) -> dict[str, Any]:
    """Grow folder/unified to folder/grown; returns a recipe that starts from it."""
    weights = read_export(folder / "unified", ConvertOptions())
    shutil.rmtree(folder / "grown", ignore_errors=True)
    write_export(grow(weights, (442.0, 631.0), widths), folder / "grown", {})
    return recipe_of(ADAM, model__decoder_channels=widths, train__init_from=str(folder / "grown"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_first_loss_is_the_unified_models(tmp_path: Path, unified: nn.Module, world_size: int) -> None:
    mapping, run = grown(tmp_path, [8, 8, 8]), tmp_path / "run"
    losses = run_distributed(trained, world_size, world_size, mapping, run, [0, 1])[0][0]
    expected = train_reference(recipe_from(mapping), 1, EveryStage(unified)).losses
    assert losses == pytest.approx(expected, rel=1e-6)
    reader, exported = (
        CheckpointReader(run / "checkpoints/step_00000000"),
        load_file(tmp_path / "grown/model.safetensors"),
    )
    assert sorted(reader.names()) == sorted(exported)
    for name, values in exported.items():
        assert torch.equal(reader.tensor("param", name), values)
        assert torch.equal(reader.tensor("ema", name), values)

    further = {**mapping, "train": {**mapping["train"], "init_from": str(run / "checkpoints/step_00000001")}}
    run_distributed(trained, world_size, world_size, further, tmp_path / "further", [0])
    first, second = (
        CheckpointReader(f) for f in (run / "checkpoints/step_00000001", tmp_path / "further/checkpoints/step_00000000")
    )
    for name in exported:
        assert torch.equal(second.tensor("param", name), first.tensor("ema", name))
    with pytest.raises(ConfigError, match=r"the newest is .*step_00000001"):
        start_weights(recipe_from({**further, "train": {**further["train"], "init_from": str(run)}}), tmp_path / "none")

    shutil.rmtree(tmp_path / "grown")  # no longer needed: the run has checkpoints of its own
    assert len(run_distributed(trained, world_size, world_size, mapping, run, [2])[0][0]) == 1


@pytest.mark.usefixtures("unified")
def test_an_export_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    mapping = grown(tmp_path, [12, 8, 12])
    assert start_weights(recipe_from(mapping), tmp_path / "none")
    for change, named in (
        ({"decoder_channels": [8, 8, 8]}, r"model\.decoder_channels is \[12, 8, 12\] there and \[8, 8, 8\] here"),
        ({"num_heads": 1}, r"model\.num_heads is 2 there and 1 here"),
    ):
        other = recipe_from({**mapping, "model": {**mapping["model"], **change}})
        with pytest.raises(ConfigError, match=named) as caught:
            start_weights(other, tmp_path / "none")
        assert caught.value.field == "train.init_from"
    with pytest.raises(ConfigError, match=r"train\.init_from.*is neither an export folder nor a checkpoint"):
        start_weights(recipe_from(recipe_of(ADAM, train__init_from=str(tmp_path))), tmp_path / "none")
