"""Checkpoints in LDM's names, made by hand, are read, written and checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.formats.ldm import ema_name, read_ldm
from msdiff_dist.convert.formats.noise_tables import recognise_schedule, schedule_tables
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.tensor_sources import MemorySource, open_source
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.models import build_model
from msdiff_dist.models.ldm.config import LDMConfig
from tests.unit.convert.convert_helpers import (
    export_tensors,
    files_below,
    inputs,
    loaded,
    randomise,
    same_tensors,
)

PLAIN = LDMConfig(
    encoder_channels=32, decoder_channels=(32,), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,),
    num_head_channels=32,
)  # fmt: skip
STAGED = LDMConfig(
    encoder_channels=32, decoder_channels=(64, 32, 32), channel_mult=(1, 2), num_res_blocks=1,
    attention_downsamples=(2,), decoder_attention=((2,), (), ()), num_head_channels=32,
)  # fmt: skip
CLASSES = LDMConfig(
    encoder_channels=32, decoder_channels=(32,), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,),
    num_head_channels=32, num_classes=6, context_dim=16, class_conditioning="context",
)  # fmt: skip


def ldm_state(config: LDMConfig, seed: int = 0, multistage: bool = False) -> dict[str, Tensor]:
    """The state dict of LDM's module, with names made here and not by the code under test."""
    state = {}
    for name, p in randomise(build_model(config), seed).state_dict().items():
        part, _, rest = name.partition(".")
        if part == "stages":
            stage, block, rest = rest.split(".", 2)
            place = {"output_blocks": f"de_modules.{stage}", "out": f"outs.{stage}"} if multistage else {}
            rest = f"{place.get(block, block)}.{rest}"
        if rest.endswith(("qkv.weight", "proj_out.weight")) and config.context_dim is None:
            p = p[:, :, None]
        if rest == "label_emb.weight" and config.class_conditioning == "context":
            state["cond_stage_model.embedding.weight"] = p
        else:
            state[f"model.diffusion_model.{rest}"] = p
    return state


def with_ema(state: dict[str, Tensor]) -> dict[str, Tensor]:
    averaged = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
        for k, v in state.items()
        if k.startswith("model.diffusion_model.")
    }
    return {**state, **averaged, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state, "global_step": 3}, path)
    return path


def ldm_yaml(path: Path, **changes: Any) -> Path:
    unet = {
        "in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2], "num_res_blocks": 1,
        "channel_mult": [1, 2], "num_head_channels": 32, "image_size": 8,
    }  # fmt: skip
    model = {"linear_start": 0.0015, "linear_end": 0.0155, "timesteps": 1000, "scale_factor": 0.3}
    unet |= {k: v for k, v in changes.items() if k in unet or k in ("num_heads", "stage_interval", "de_nfs")}
    model |= {k: v for k, v in changes.items() if k not in unet}
    path.write_text(yaml.safe_dump({"model": {"params": {**model, "unet_config": {"params": unet}}}}))
    return path


@pytest.mark.parametrize("weights", ["auto", "ema", "raw"])
def test_averaged_and_last_weights(tmp_path: Path, weights: Any) -> None:
    state = ldm_state(PLAIN)
    source = open_source(save(tmp_path / "x.ckpt", with_ema(state)))
    found = read_ldm(source, ConvertOptions(weights=weights))
    shift = 0 if weights == "raw" else 1
    assert found.model == PLAIN
    key = "stages.0.output_blocks.0.0.in_layers.2.weight"
    expected = state["model.diffusion_model.output_blocks.0.0.in_layers.2.weight"] + shift
    assert torch.equal(found.tensors.read(key), expected)
    keys = {*found.used, *found.left_out}
    assert set(source.names()) <= keys


def test_average_asked_for_and_missing(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", ldm_state(PLAIN))
    with pytest.raises(CheckpointError, match="averaged"):
        convert(path, tmp_path / "out", "ldm", "msdiff", ConvertOptions(weights="ema"))
    assert files_below(tmp_path) == ["x.ckpt"]


def test_a_lacking_average_of_one_parameter_is_named(tmp_path: Path) -> None:
    state = with_ema(ldm_state(PLAIN))
    name = ema_name("model.diffusion_model.out.2.bias")
    del state[name]
    with pytest.raises(CheckpointError, match=name):
        convert(save(tmp_path / "x.ckpt", state), tmp_path / "out", "ldm", "msdiff")


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    ("config", "form"), [(PLAIN, "ldm"), (CLASSES, "ldm"), (STAGED, "official-ldm")], ids=["plain", "classes", "staged"]
)
def test_there_and_back_is_bitwise(tmp_path: Path, config: LDMConfig, form: str, suffix: str) -> None:
    state = ldm_state(config, multistage=form == "official-ldm")
    state |= {k: v.half() for k, v in state.items() if "input_blocks" in k}
    tables = schedule_tables(DiscreteConfig(beta_end=0.0155))
    state |= {k: tables.read(k) for k in tables.names()}
    state["scale_factor"] = torch.tensor(0.25)
    convert(save(tmp_path / "x.ckpt", state), tmp_path / "ours", form, "msdiff")
    back = tmp_path / f"back.{suffix}"
    convert(tmp_path / "ours", back, "msdiff", form, ConvertOptions(model_ema=False))
    source = open_source(back)
    assert same_tensors({k: source.read(k) for k in source.names()}, state)
    config_json = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config_json["diffusion"]["discrete"]["beta_end"] == 0.0155
    assert config_json["autoencoder"]["scale_factor"] == 0.25


def test_averages_are_written_for_ldms_samplers(tmp_path: Path) -> None:
    convert(save(tmp_path / "x.ckpt", ldm_state(PLAIN)), tmp_path / "y.ckpt", "ldm", "ldm")
    state = torch.load(tmp_path / "y.ckpt", weights_only=True)["state_dict"]
    for key in [k for k in state if k.startswith("model.diffusion_model.")]:
        assert torch.equal(state[key], state[ema_name(key)])


def test_decoders_without_attention_are_read_from_keys(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", ldm_state(STAGED, multistage=True))
    found = read_ldm(open_source(path), ConvertOptions(), multistage=True)
    assert found.model == STAGED
    assert found.description.stages.boundaries == (442, 631)
    model, expected = loaded(found), randomise(build_model(STAGED))
    x, t, _ = inputs(STAGED, batch=3)
    stage = torch.tensor([2, 0, 1])
    assert torch.equal(model(x, t, stage), expected(x, t, stage))


def test_stage_boundaries_that_must_be_given(tmp_path: Path) -> None:
    two = LDMConfig(
        encoder_channels=32, decoder_channels=(32, 32), channel_mult=(1, 2), attention_downsamples=(2,), num_heads=1
    )
    path = save(tmp_path / "x.ckpt", ldm_state(two, multistage=True))
    with pytest.raises(CheckpointError, match="--boundaries"):
        convert(path, tmp_path / "out", "official-ldm", "msdiff")
    convert(path, tmp_path / "out", "official-ldm", "msdiff", ConvertOptions(boundaries=(500.0,)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["stages"]["boundaries"] == [500.0]


def test_yaml_decides(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", ldm_state(PLAIN))
    sheet = ldm_yaml(tmp_path / "x.yaml", num_heads=2, num_head_channels=-1, parameterization="v")
    found = read_ldm(open_source(path), ConvertOptions(config=sheet))
    assert found.model.num_heads == 2
    assert found.description.diffusion.section == DiscreteConfig(beta_end=0.0155, prediction_type="v_prediction")
    assert found.description.autoencoder.scale_factor == 0.3
    assert found.description.sample_size == 8
    assert found.assumed == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_channels", 64), ("channel_mult", [1, 2, 4]), ("num_res_blocks", 2), ("attention_resolutions", [1])],
)
def test_yaml_of_another_model_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    path, sheet = save(tmp_path / "x.ckpt", ldm_state(PLAIN)), ldm_yaml(tmp_path / "x.yaml", **{field: value})
    with pytest.raises(CheckpointError, match=field):
        read_ldm(open_source(path), ConvertOptions(config=sheet))


def test_yaml_that_is_none(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", ldm_state(PLAIN))
    (tmp_path / "x.yaml").write_text("a: b")
    with pytest.raises(ConfigError, match="--config"):
        read_ldm(open_source(path), ConvertOptions(config=tmp_path / "x.yaml"))


def test_tables_of_classes_without_a_row_for_dropped_ones(tmp_path: Path) -> None:
    state = ldm_state(CLASSES)
    path, options = save(tmp_path / "x.ckpt", state), ConvertOptions(null_class=False)
    convert(path, tmp_path / "ours", "ldm", "msdiff", options)
    table = export_tensors(tmp_path / "ours")["shared.label_emb.weight"]
    assert table.shape[0] == 8
    assert torch.equal(table[:7], state["cond_stage_model.embedding.weight"])
    assert not table[7].any()
    convert(tmp_path / "ours", tmp_path / "back.safetensors", "msdiff", "ldm", replace(options, model_ema=False))
    back = open_source(tmp_path / "back.safetensors")
    assert torch.equal(back.read("cond_stage_model.embedding.weight"), state["cond_stage_model.embedding.weight"])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("model.diffusion_model.id_predictor.0.weight", "id_predictor"),
        ("model.diffusion_model.output_blocks.0.1.strange", "strange"),
        ("model_extra.weight", "model_extra"),
    ],
)
def test_keys_left_over_are_named(tmp_path: Path, extra: str, named: str) -> None:
    path = save(tmp_path / "x.ckpt", ldm_state(PLAIN) | {extra: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=named):
        convert(path, tmp_path / "out", "ldm", "msdiff")
    assert files_below(tmp_path) == ["x.ckpt"]


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = ldm_state(PLAIN)
    state["model.diffusion_model.middle_block.2.out_layers.3.weight"] = torch.zeros(64, 32, 3, 3)
    with pytest.raises(CheckpointError, match=r"middle_block\.2\.out_layers"):
        convert(save(tmp_path / "x.ckpt", state), tmp_path / "out", "ldm", "msdiff")


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("conditioner.embedders.0.transformer.x", "Stable Diffusion XL"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("lora_unet_down_blocks_0.alpha", "LoRA"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("decoder.conv_in.weight", "autoencoder"),
        ("weight", "no tensor"),
    ],
)
def test_other_families_are_called_by_name(tmp_path: Path, key: str, family: str) -> None:
    with pytest.raises(CheckpointError, match=family):
        convert(save(tmp_path / "x.ckpt", {key: torch.zeros(1)}), tmp_path / "out", "ldm", "msdiff")


def test_the_right_format_is_suggested(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", ldm_state(STAGED, multistage=True))
    with pytest.raises(CheckpointError, match="--from official-ldm"):
        convert(path, tmp_path / "out", "ldm", "msdiff")


@pytest.mark.parametrize(
    "schedule",
    [
        DiscreteConfig(),
        DiscreteConfig(beta_start=0.00085, beta_end=0.012),
        DiscreteConfig(schedule="linear", beta_start=1e-4, beta_end=0.02, timesteps=500),
        DiscreteConfig(schedule="cosine"),
    ],
)
def test_schedules_are_recognised(schedule: DiscreteConfig) -> None:
    found = recognise_schedule(schedule_tables(schedule).read("betas"))
    assert found == schedule


SCHEDULES = [
    DiscreteConfig(),
    DiscreteConfig(beta_end=0.0155),
    DiscreteConfig(beta_start=0.00085, beta_end=0.012),
    DiscreteConfig(schedule="linear", beta_start=0.00085, beta_end=0.012),
    DiscreteConfig(schedule="linear", beta_start=1e-4, beta_end=0.02),
    DiscreteConfig(schedule="linear", beta_start=0.0015, beta_end=0.0195),
    DiscreteConfig(schedule="cosine"),
]


@pytest.mark.parametrize("table", ["betas", "alphas_cumprod"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.schedule} {s.beta_start} {s.beta_end}")
def test_schedules_are_told_apart_at_the_precision_of_their_tables(
    schedule: DiscreteConfig, dtype: torch.dtype, table: str
) -> None:
    values = schedule_tables(schedule).read(table)
    assert recognise_schedule(values.to(dtype), table) == schedule
    assert recognise_schedule(values.to(dtype).float()[None, :, None], table) == schedule  # once rounded, kept in fp32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_ends_in_half_precision(dtype: torch.dtype) -> None:
    for start, end in [(0.001, 0.015), (2e-4, 0.03), (0.004, 0.0041)]:
        expected = DiscreteConfig(beta_start=start, beta_end=end, timesteps=250)
        found = recognise_schedule(schedule_tables(expected).read("betas").to(dtype))
        assert (found.beta_start, found.beta_end, found.timesteps) == (start, end, 250)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    schedule = DiscreteConfig(beta_start=0.00085, beta_end=0.012)
    tables = schedule_tables(schedule)
    buffers = {k: torch.nn.Parameter(tables.read(k), requires_grad=False) for k in tables.names()}
    state = ldm_state(PLAIN) | buffers | {"scale_factor": torch.tensor(0.18215)}
    path = save(tmp_path / "x.ckpt", {k: v.to(dtype) for k, v in state.items()})
    found = read_ldm(open_source(path), ConvertOptions())
    assert found.description.diffusion.section == schedule
    assert found.description.autoencoder.scale_factor == 0.18215
    assert set(tables.names()) <= set(found.left_out)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (torch.linspace(0.01, 0.02, 100).half() ** 3, "betas.*none of the schedules"),
        (torch.linspace(0.001, 1.0, 100).double(), r"betas.*zero terminal SNR"),
        (torch.arange(1000), r"betas = .int64 \[1000\].*no table"),
        (torch.rand(10, 100), r"betas = .float32 \[10, 100\].*no table"),
        (torch.full((1000,), torch.nan), "betas.*none of the schedules"),
        (torch.tensor(0.1), "betas.*no table"),
    ],
)
def test_tables_that_fit_nothing_are_named(table: Tensor, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_ldm(MemorySource(ldm_state(PLAIN) | {"betas": table}), ConvertOptions())


@pytest.mark.parametrize(("channels", "text", "first"), [(4, 24, 0.00085), (3, 24, 0.0015), (4, None, 0.0015)])
def test_files_without_tables(channels: int, text: int | None, first: float) -> None:
    config = replace(PLAIN, in_channels=channels, out_channels=channels, context_dim=text)
    found = read_ldm(MemorySource(ldm_state(config)), ConvertOptions())
    section = found.description.diffusion.section
    assert isinstance(section, DiscreteConfig)
    assert (section.beta_start, section.schedule) == (first, "scaled_linear")
    assert found.description.autoencoder.scale_factor == (0.18215 if first == 0.00085 else 1)
    said = "\n".join(found.assumed)
    assert "has no tables; give --config otherwise" in said
    assert "--prediction v_prediction" in said


def test_latents_of_stable_diffusion_have_its_schedule() -> None:
    found = read_ldm(MemorySource(ldm_state(PLAIN) | {"scale_factor": torch.tensor(0.18215)}), ConvertOptions())
    assert found.description.diffusion.section == DiscreteConfig(beta_start=0.00085, beta_end=0.012)


def test_tables_follow_their_definitions() -> None:
    tables = schedule_tables(DiscreteConfig(timesteps=10))
    beta = tables.read("betas").double()
    a = (1 - beta).cumprod(0)
    assert torch.allclose(tables.read("alphas_cumprod").double(), a, atol=1e-7)
    # Posterior q(x_{t-1} | x_t, x_0): its mean of x_0 = x_t = 1 at t = 0 is 1, its variance 0.
    means = tables.read("posterior_mean_coef1") + tables.read("posterior_mean_coef2")
    assert means[0] == pytest.approx(1, abs=1e-6)
    assert tables.read("posterior_variance")[0] == 0


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(CheckpointError, match="betas"):
        recognise_schedule(torch.from_numpy(np.linspace(0.01, 0.02, 100) ** 3))


def test_tables_that_contradict_the_schedule(tmp_path: Path) -> None:
    tables = schedule_tables(DiscreteConfig())
    state = ldm_state(PLAIN) | {"betas": tables.read("betas"), "alphas_cumprod": torch.ones(1000)}
    with pytest.raises(CheckpointError, match="alphas_cumprod"):
        read_ldm(MemorySource(state), ConvertOptions())


def test_bare_networks(tmp_path: Path) -> None:
    state = {k.removeprefix("model.diffusion_model."): v for k, v in ldm_state(PLAIN).items()}
    found = read_ldm(open_source(save(tmp_path / "x.ckpt", state)), ConvertOptions())
    assert found.model == PLAIN


def test_models_that_ldm_does_not_have(tmp_path: Path, make_export: Any) -> None:
    staged = make_export(STAGED)
    with pytest.raises(CheckpointError, match="official-ldm"):
        convert(staged, tmp_path / "x.ckpt", "msdiff", "ldm")
    with pytest.raises(CheckpointError, match="--stage"):
        convert(staged, tmp_path / "x.ckpt", "msdiff", "ldm", ConvertOptions(stage=0))
    convert(staged, tmp_path / "x.ckpt", "msdiff", "ldm", ConvertOptions(stage=1))
    with pytest.raises(CheckpointError, match=r"\.ckpt"):
        convert(staged, tmp_path / "folder", "msdiff", "official-ldm")
