"""Recipes that continue from a model: planned as they are written, and a start from its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from msdiff_dist.apps.init_recipe import init_recipe
from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.apps.train.warm_start import start_weights
from msdiff_dist.config import to_mapping
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.edm import EDMConfig
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.song.config import SongConfig
from msdiff_dist.recipe import load_recipe
from tests.unit.checkpoint.conftest import RECIPE, run
from tests.unit.convert.conftest import make_export

__all__ = ["make_export", "run"]

WIDTHS: dict[str, Any] = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_downsamples": (2,), "norm_groups": 16}
LDM = LDMConfig(encoder_channels=32, decoder_channels=(48, 32, 32), num_head_channels=16, **WIDTHS)
SONG = SongConfig(
    encoder_channels=32, decoder_channels=(48, 32, 32), family="ncsnpp", num_classes=5, augment_labels=9, **WIDTHS
)


@pytest.mark.parametrize(
    ("model", "sections"),
    [
        (LDM, {}),
        (LDM, {"sample_size": (8, 16), "name": "wide"}),
        (LDM, {"autoencoder": AutoencoderConfig(kind="vq", path="some/vq-f4", factor=4), "precision": "bf16"}),
        (
            LDMConfig(encoder_channels=32, decoder_channels=(32,), num_heads=2, context_dim=24, **WIDTHS),
            {"context_shape": (20, 24)},
        ),
        (LDMConfig(encoder_channels=32, decoder_channels=(32,), num_heads=2, context_dim=24, **WIDTHS), {}),
        (LDM, {"extensions": ("msdiff_dist.registry",)}),
        (
            SONG,
            {
                "diffusion": DiffusionConfig(process="edm", section=EDMConfig()),
                "stages": StagesConfig(boundaries=(2.5, 7.6), sampling="equal"),
            },
        ),
    ],
    ids=["pixels", "not square", "latents", "context", "context of unknown length", "extensions", "song"],
)
def test_from_an_export(model: Any, sections: dict[str, Any], make_export: Any, tmp_path: Path) -> None:
    export, out = make_export(model, **sections), tmp_path / "new" / "recipe.yaml"
    assert init_recipe(None, export, out).written == [out]
    recipe, description = load_recipe(out), open_weights(export).description
    assert recipe.model == model
    assert recipe.diffusion == description.diffusion
    stored = to_mapping(description.stages)
    assert {key: to_mapping(recipe.stages)[key] for key in stored} == stored  # a recipe may say when stages end, too
    assert recipe.autoencoder == description.autoencoder
    assert recipe.extensions == description.extensions
    assert recipe.train.precision == description.precision
    assert recipe.latent_shape == description.latent_shape
    assert plan_run(recipe, 2).placement.num_stages == model.num_stages
    assert start_weights(recipe, tmp_path / "none") is not None
    advice = re.findall(r"# With freeze: \[(.*)\] only the decoder of stage 0 trains", out.read_text())
    assert len(advice) == (model.num_stages > 1)
    for patterns in advice:
        assert load_recipe(out, [f"train.freeze=[{patterns}]"]).freezing().stages == (0,)


def test_from_a_run_and_a_checkpoint(run: Path, tmp_path: Path) -> None:
    for source, step in ((run, 5), (run / "checkpoints/step_00000003", 3)):
        out = tmp_path / f"{step}.yaml"
        init_recipe(None, source, out)
        recipe = load_recipe(out)
        assert recipe.name == "tiny_continued"
        assert recipe.data.latent_shape == tuple(RECIPE["data"]["latent_shape"])
        assert recipe.train.steps == RECIPE["train"]["steps"]
        assert recipe.train.init_from == str(run / f"checkpoints/step_{step:08d}")
        weights = start_weights(recipe, tmp_path / "none")
        assert weights is not None
        assert weights.description.weights == "ema"
        plan_run(recipe, 2)


def test_default_name_and_no_overwriting(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert init_recipe(None, run, None).written == [Path("tiny_continued.yaml")]
    with pytest.raises(ConfigError, match=r"--out = 'tiny_continued\.yaml': exists already"):
        init_recipe(None, run, None)


@pytest.mark.parametrize("both", [True, False])
def test_one_source_is_needed(both: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="either NAME or --from is needed"):
        init_recipe("quickstart" if both else None, tmp_path if both else None, tmp_path / "out.yaml")


def _ldm_file(folder: Path) -> Path:
    path = folder / "model.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}}, path)
    return path


def _official_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file({"model.diffusion_model.de_modules.0.weight": torch.zeros(2)}, path)
    return path


def _diffusers_folder(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    return folder


def _deepspeed_folder(folder: Path) -> Path:
    (folder / "latest").write_text("global_step5")
    return folder


@pytest.mark.parametrize(
    ("make", "format_"),
    [
        (_ldm_file, "ldm"),
        (_official_file, "official-ldm"),
        (_diffusers_folder, "diffusers"),
        (_deepspeed_folder, "deepspeed"),
    ],
)
def test_other_programs_weights_name_the_conversion(make: Any, format_: str, tmp_path: Path) -> None:
    source = make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        init_recipe(None, source, tmp_path / "out.yaml")
    assert f"`msdiff convert {source} converted --from {format_} --to msdiff`" in caught.value.remedy
    assert not (tmp_path / "out.yaml").exists()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        init_recipe(None, tmp_path / "none", None)
    with pytest.raises(CheckpointError, match="is an empty folder"):
        init_recipe(None, tmp_path, None)
