"""Stock U-Nets of diffusers, also of different sizes, become the stages of one model and come back bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel
from typer.testing import CliRunner

from msdiff_dist.cli.main import app
from msdiff_dist.config import from_mapping, to_mapping
from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.editing import extract
from msdiff_dist.convert.formats.export_folder import read_export
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import UserError
from msdiff_dist.models import LDMConfig, build_model
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.flops import costs
from tests.tiny_stable_diffusion import make_stable_diffusion
from tests.unit.convert.convert_helpers import files_below, loaded, randomise

SMALL: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "sample_size": 8,
}  # fmt: skip
LARGE = SMALL | {
    "block_out_channels": (32, 32, 64), "layers_per_block": 2, "norm_num_groups": 16, "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
TEXT = SMALL | {
    "cross_attention_dim": 12, "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
LARGE_TEXT = TEXT | {
    "block_out_channels": (32, 64), "layers_per_block": 2, "attention_head_dim": (4, 8),
    "transformer_layers_per_block": 2, "use_linear_projection": True,
}  # fmt: skip
PAIRS = {
    "unconditional": (UNet2DModel, SMALL, LARGE),
    "text": (UNet2DConditionModel, TEXT, LARGE_TEXT),
    "one architecture": (UNet2DModel, SMALL, SMALL),
}
VAE: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (8,), "norm_num_groups": 4, "scaling_factor": 0.5}


def pipeline(
    folder: Path, kind: Any, config: dict[str, Any], seed: int = 0, vae: dict[str, Any] | None = None, **scheduler: Any
) -> Path:
    """A diffusers folder with a U-Net, a scheduler and perhaps an autoencoder, written by diffusers."""
    randomise(kind(**config), seed).save_pretrained(folder / "unet")
    DDIMScheduler(**scheduler).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": "DiffusionPipeline", "unet": ["diffusers", kind.__name__]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    if vae is not None:
        randomise(AutoencoderKL(**{k: v for k, v in vae.items() if k != "seed"}), vae.get("seed", 0)).save_pretrained(
            folder / "vae"
        )
        index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def joined(tmp_path: Path, *folders: Path, boundaries: tuple[float, ...] | None = (875.0,)) -> Path:
    out = tmp_path / "joined"
    convert(folders, out, "diffusers", "msdiff", ConvertOptions(boundaries=boundaries))
    return out


@torch.no_grad()
@pytest.mark.parametrize(("kind", "near", "far"), PAIRS.values(), ids=PAIRS)
def test_each_stage_is_its_network(tmp_path: Path, kind: Any, near: dict, far: dict) -> None:
    folders = [pipeline(tmp_path / f"net{k}", kind, config, seed=k) for k, config in enumerate((near, far))]
    weights = read_export(joined(tmp_path, *folders), ConvertOptions())
    assert weights.description.stages.boundaries == (875.0,)
    assert not weights.model.share_encoder
    model = loaded(weights)
    assert not list(model.shared.parameters())
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([0, 874, 875, 999])
    context = torch.randn(4, 5, 12) if kind is UNet2DConditionModel else None
    output = model(x, t, torch.tensor([0, 0, 1, 1]), context)
    for k, folder in enumerate(folders):
        rows = slice(2 * k, 2 * k + 2)
        given = () if context is None else (context[rows],)
        expected = kind.from_pretrained(folder / "unet")(x[rows], t[rows], *given).sample
        assert (output[rows] - expected).abs().max() <= 1e-5
    parameters = [sum(p.numel() for p in kind.from_pretrained(folder / "unet").parameters()) for folder in folders]
    assert [part.params for part in costs(weights.model, (8, 8)).decoders] == parameters


@pytest.mark.parametrize(("kind", "near", "far"), PAIRS.values(), ids=PAIRS)
def test_they_come_back_as_stock_folders(tmp_path: Path, kind: Any, near: dict, far: dict) -> None:
    folders = [pipeline(tmp_path / f"net{k}", kind, c, seed=k, vae=VAE) for k, c in enumerate((near, far))]
    export = joined(tmp_path, *folders)
    report = convert(export, tmp_path / "back", "msdiff", "diffusers")
    extract(export, tmp_path / "alone", 1)
    convert(tmp_path / "alone", tmp_path / "far", "msdiff", "diffusers")
    assert not any("no stock" in remark for remark in report["remarks"])
    for original, back in zip([*folders, folders[1]], ["back/stage_0", "back/stage_1", "far"], strict=True):
        for part, cls in (("unet", kind), ("vae", AutoencoderKL)):
            first = cls.from_pretrained(original / part)
            again, said = cls.from_pretrained(tmp_path / back / part, output_loading_info=True)
            assert not any(said.values())  # no tensor is missing, unexpected or of another shape
            assert first.state_dict().keys() == again.state_dict().keys()
            assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
        scheduler = json.loads((tmp_path / back / "scheduler/scheduler_config.json").read_text())
        assert scheduler["beta_end"] == DDIMScheduler().config["beta_end"]
    assert all("to" in entry for entry in report["keys"].values())


def test_stages_of_a_network_without_scheduler(tmp_path: Path) -> None:
    near = pipeline(tmp_path / "near", UNet2DModel, SMALL, vae=VAE, prediction_type="v_prediction")
    far = pipeline(tmp_path / "far", UNet2DModel, LARGE) / "unet"
    description = read_export(joined(tmp_path, far, near), ConvertOptions()).description
    assert description.diffusion.settings().prediction_type == "v_prediction"
    assert description.autoencoder.scale_factor == 0.5
    assumed = json.loads((tmp_path / "joined/conversion_report.json").read_text())["assumed"]
    assert any("schedule" in line and "near" in line for line in assumed)


def test_equal_networks_keep_an_encoder_each(tmp_path: Path) -> None:
    one = pipeline(tmp_path / "one", UNet2DModel, SMALL)
    weights = read_export(joined(tmp_path, one, one, one, boundaries=(300.0, 875.0)), ConvertOptions())
    assert weights.model.num_stages == 3
    assert not weights.model.share_encoder
    assert isinstance(weights.model, LDMConfig)  # one family and one architecture: no list of networks is needed


Make = Callable[..., Path]
WRONG: dict[str, tuple[Callable[[Path], list[Path]], tuple[float, ...] | None, list[str]]] = {
    "prediction": (lambda p: [_net(p, 0), _net(p, 1, prediction_type="v_prediction")], (875.0,),
                   ["net1", "prediction_type", "v_prediction", "epsilon"]),
    "schedule": (lambda p: [_net(p, 0), _net(p, 1, beta_end=0.012)], (875.0,), ["net1", "beta_end", "0.012"]),
    "timesteps": (lambda p: [_net(p, 0), _net(p, 1, num_train_timesteps=500)], (300.0,), ["net1", "timesteps"]),
    "input channels": (lambda p: [_net(p, 0), _net(p, 1, SMALL | {"in_channels": 3})], (875.0,),
                       ["net1", "in_channels", "3"]),
    "output channels": (lambda p: [_net(p, 0), _net(p, 1, SMALL | {"out_channels": 8})], (875.0,),
                        ["net1", "out_channels", "8"]),
    "classes": (lambda p: [_net(p, 0), _net(p, 1, SMALL | {"num_class_embeds": 11})], (875.0,),
                ["net1", "num_classes", "10"]),
    "width of context": (
        lambda p: [_net(p, 0, TEXT, UNet2DConditionModel),
                   _net(p, 1, TEXT | {"cross_attention_dim": 16}, UNet2DConditionModel)], (875.0,),
        ["net1", "context_dim", "16", "12"]),
    "text and none": (lambda p: [_net(p, 0), _net(p, 1, TEXT, UNet2DConditionModel)], (875.0,),
                      ["net1", "context_dim", "12"]),
    "scale": (lambda p: [_net(p, 0, vae=VAE), _net(p, 1, vae=VAE | {"scaling_factor": 0.25})], (875.0,),
              ["net1", "scale_factor", "0.25"]),
    "latents": (lambda p: [_net(p, 0, vae=VAE), _net(p, 1, vae=VAE | {"seed": 1})], (875.0,), ["net1", "latents"]),
    "missing folder": (lambda p: [_net(p, 0), p / "nowhere"], (875.0,), ["nowhere", "missing"]),
    "no boundaries": (lambda p: [_net(p, 0), _net(p, 1)], None, ["--boundaries", "2 sources"]),
    "too many": (lambda p: [_net(p, 0), _net(p, 1)], (300.0, 875.0), ["--boundaries", "2 sources"]),
    "outside": (lambda p: [_net(p, 0), _net(p, 1)], (1200.0,), ["--boundaries", "1200", "outside"]),
    "between timesteps": (lambda p: [_net(p, 0), _net(p, 1)], (874.5,), ["--boundaries", "874.5"]),
    "descending": (lambda p: [_net(p, 0), _net(p, 1), _net(p, 2)], (875.0, 300.0), ["--boundaries", "ascend"]),
    "one source": (lambda p: [_net(p, 0)], (875.0,), ["--boundaries", "one stage", "source for each stage"]),
}  # fmt: skip


def _net(folder: Path, k: int, config: dict[str, Any] = SMALL, kind: Any = UNet2DModel, **more: Any) -> Path:
    return pipeline(folder / f"net{k}", kind, config, seed=k, **more)


@pytest.mark.parametrize(("make", "boundaries", "named"), WRONG.values(), ids=WRONG)
def test_what_makes_no_model(tmp_path: Path, make: Any, boundaries: tuple[float, ...], named: list[str]) -> None:
    sources = make(tmp_path)
    before = files_below(tmp_path)
    with pytest.raises(UserError) as caught:
        joined(tmp_path, *sources, boundaries=boundaries)
    assert all(word in str(caught.value) for word in named), str(caught.value)
    assert files_below(tmp_path) == before


def test_options_for_one_source(tmp_path: Path) -> None:
    sources = [_net(tmp_path, 0), _net(tmp_path, 1)]
    options = ConvertOptions(boundaries=(875.0,), stage=1)
    with pytest.raises(UserError, match="--stage"):
        convert(sources, tmp_path / "joined", "diffusers", "msdiff", options)
    with pytest.raises(UserError, match="--to"):
        convert(sources, tmp_path / "a.safetensors", "diffusers", "safetensors", ConvertOptions(boundaries=(875.0,)))


def test_a_model_of_stages_is_no_stage(tmp_path: Path, make_export: Any) -> None:
    staged = LDMConfig(encoder_channels=32, decoder_channels=(32, 32), num_heads=1)
    export = make_export(staged)
    with pytest.raises(UserError, match=r"more than one.*extract"):
        convert([export, export], tmp_path / "out", "msdiff", "msdiff", ConvertOptions(boundaries=(875.0,)))


def test_networks_of_two_families(tmp_path: Path, make_export: Any) -> None:
    """The stages need not be of one family, and any format that holds a unified model can be a source."""
    ldm = LDMConfig(encoder_channels=32, decoder_channels=(32,), num_heads=1)
    song = {"family": "ncsnpp", "encoder_channels": 16, "decoder_channels": [16], "channel_mult": [1, 2]}
    exports = [make_export(ldm, "ldm"), make_export(from_mapping(ModelConfig, song), "song")]
    convert(exports, tmp_path / "out", "msdiff", "msdiff", ConvertOptions(boundaries=(500.0,)))
    weights = read_export(tmp_path / "out", ConvertOptions())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    output = loaded(weights)(x, t, torch.tensor([0, 1]))
    for k, export in enumerate(exports):
        alone = loaded(read_export(export, ConvertOptions()))
        row = slice(k, k + 1)
        assert torch.equal(output[row], alone(x[row], t[row], torch.zeros(1, dtype=torch.int64)))
    assert from_mapping(ModelConfig, to_mapping(weights.model)) == weights.model


BASE = {"encoder_channels": 16, "decoder_channels": [16], "num_heads": 1, "norm_groups": 8}


@pytest.mark.parametrize(
    ("networks", "field"),
    [
        ([], "networks"),
        ([BASE, BASE | {"decoder_channels": [16, 16]}], r"networks\[1\]"),
        ([BASE, {"family": "separate", "networks": [BASE]}], r"networks\[1\]"),
        ([BASE, BASE | {"num_heads": 3}], r"networks\[1\]\.num_heads"),
        ([BASE | {"attention_backend": "math"}], r"networks\[0\]\.attention_backend"),
        ([BASE, BASE | {"in_channels": 4}], r"networks\[1\]\.in_channels"),
        ([BASE, BASE | {"chanel_mult": [1]}], r"networks\[1\]\.chanel_mult"),
    ],
)
def test_sections_that_are_no_networks(networks: list[Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"model\.{field}"):
        from_mapping(ModelConfig, {"family": "separate", "networks": networks}, "model")


def test_the_attention_of_all_networks_is_chosen_at_once() -> None:
    model = from_mapping(ModelConfig, {"family": "separate", "attention_backend": "math", "networks": [BASE, BASE]})
    parts = [part.config.attention_backend for part in build_model(model).stages]
    assert parts == ["math", "math"]
    assert replace(model, attention_backend="auto").of_stages([1]).attention_backend == "auto"


def test_the_command(tmp_path: Path) -> None:
    """Sources first, the result last; with two paths the second is the result, as it always was."""
    near, far = str(_net(tmp_path, 0)), str(_net(tmp_path, 1, LARGE))
    formats = ["--from", "diffusers", "--to", "msdiff"]
    for words in ([near, far, str(tmp_path / "joined"), "--boundaries", "875"], [near, str(tmp_path / "one")]):
        assert CliRunner().invoke(app, ["convert", *words, *formats]).exit_code == 0
    assert read_export(tmp_path / "joined", ConvertOptions()).model.num_stages == 2
    assert read_export(tmp_path / "one", ConvertOptions()).model.num_stages == 1
    merged = [str(tmp_path / "merged"), str(tmp_path / "one"), str(tmp_path / "one"), "--boundaries", "500"]
    assert CliRunner().invoke(app, ["merge", *merged]).exit_code == 0
    assert read_export(tmp_path / "merged", ConvertOptions()).model.share_encoder  # the encoders are equal


def test_captions_are_embedded_once(tmp_path: Path) -> None:
    """Folders of Stable Diffusion with one text encoder: every stage gets it back. Another encoder is refused."""
    folders = [make_stable_diffusion(tmp_path / name) for name in ("near", "far")]
    convert([*folders], tmp_path / "joined", "diffusers", "msdiff", ConvertOptions(boundaries=(875.0,)))
    convert(tmp_path / "joined", tmp_path / "back", "msdiff", "diffusers")
    first = CLIPTextModel.from_pretrained(folders[0] / "text_encoder").state_dict()
    for k in (0, 1):
        again = CLIPTextModel.from_pretrained(tmp_path / f"back/stage_{k}/text_encoder").state_dict()
        assert all(torch.equal(v, again[name]) for name, v in first.items())
    randomise(CLIPTextModel.from_pretrained(folders[1] / "text_encoder"), 5).save_pretrained(
        folders[1] / "text_encoder"
    )
    with pytest.raises(UserError, match=r"far.*text_encoder.*captions"):
        joined(tmp_path / "second", *folders)
