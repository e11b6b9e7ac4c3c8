"""Networks of the official EDM and score_sde codes: names, layouts and averages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msdiff_dist import load_model
from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.formats.official_edm import InterleavedQKV
from msdiff_dist.convert.formats.official_scoresde import PAPER_BOUNDARIES, Transposed
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import CheckpointError
from msdiff_dist.models import build_model
from msdiff_dist.models.song.config import SongConfig
from tests.unit.convert.convert_helpers import export_tensors, randomise, same_tensors

SHAPE: dict[str, Any] = {
    "encoder_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 2, "attention_downsamples": (2,),
    "norm_groups": 16,
}  # fmt: skip
EDM = SongConfig(**SHAPE, family="ddpmpp", decoder_channels=(24, 16, 8), augment_labels=9)
NCSN = SongConfig(**SHAPE, family="ncsnpp_vp", decoder_channels=(24, 16, 8))
PROCESS = {
    "official-edm": (EDM, DiffusionConfig(process="edm"), (2.5103, 7.6577)),
    "official-scoresde": (NCSN, DiffusionConfig(process="vp"), (442 / 999, 630.8 / 999)),
}


def exported(make_export: Any, form: str, **changes: Any) -> Path:
    config, diffusion, bounds = PROCESS[form]
    return make_export(config, **{"diffusion": diffusion, "stages": StagesConfig(boundaries=bounds), **changes})


@torch.no_grad()
@pytest.mark.parametrize("form", PROCESS)
def test_there_and_back_is_bitwise(tmp_path: Path, make_export: Any, form: str) -> None:
    export = exported(make_export, form)
    report = convert(export, tmp_path / "theirs.safetensors", "msdiff", form)
    assert set(report["keys"]) == set(export_tensors(export))
    convert(tmp_path / "theirs.safetensors", tmp_path / "back", form, "msdiff")
    assert same_tensors(export_tensors(export), export_tensors(tmp_path / "back"))
    description = json.loads((tmp_path / "back" / "config.json").read_text())
    assert description["model"] == json.loads((export / "config.json").read_text())["model"]
    assert tuple(description["stages"]["boundaries"]) == pytest.approx(PROCESS[form][2], rel=1e-15)


@torch.no_grad()
@pytest.mark.parametrize("form", PROCESS)
def test_converted_networks_compute(tmp_path: Path, make_export: Any, form: str) -> None:
    convert(exported(make_export, form), tmp_path / "theirs.safetensors", "msdiff", form)
    convert(tmp_path / "theirs.safetensors", tmp_path / "ours", form, "msdiff")
    model = load_model(tmp_path / "ours", ema=form == "official-edm")
    expected = randomise(build_model(PROCESS[form][0]))
    t = torch.tensor([1.0, 5.0, 9.0] if form == "official-edm" else [0.2, 0.5, 0.9])
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(model(x, t), expected(x, model.process.network_time(t), torch.tensor([0, 1, 2])))


def test_edm_names(tmp_path: Path, make_export: Any) -> None:
    convert(exported(make_export, "official-edm"), tmp_path / "x.safetensors", "msdiff", "official-edm")
    names = set(load_file(tmp_path / "x.safetensors"))
    expected = (
        "map_layer0.weight", "map_augment.weight", "enc.8x8_conv.weight", "enc.8x8_block1.affine.bias",
        "enc.4x4_down.skip.weight", "enc.4x4_down.conv0.resample_filter", "enc.4x4_block0.qkv.weight",
        "decs.0.4x4_in0.proj.bias", "decs.1.4x4_block2.norm2.weight", "decs.2.8x8_up.conv0.weight",
        "decs.2.8x8_aux_conv.weight",
    )  # fmt: skip
    assert {f"model.{k}" for k in expected} <= names


def test_scoresde_modules_are_numbered_as_they_are_used(tmp_path: Path, make_export: Any) -> None:
    convert(exported(make_export, "official-scoresde"), tmp_path / "x.safetensors", "msdiff", "official-scoresde")
    names = set(load_file(tmp_path / "x.safetensors"))
    # 0, 1 embedding; 2 convolution; 3, 4 blocks; 5 halving; 6 pyramid; 7 block, 8 attention, 9, 10; 11-13 middle
    expected = (
        "0.weight", "2.bias", "4.Conv_1.weight", "5.Conv_2.weight", "6.Conv2d_0.weight", "8.NIN_3.W", "10.NIN_0.b",
        "12.GroupNorm_0.bias", "13.Dense_0.weight",
    )  # fmt: skip
    assert {f"en_modules.{k}" for k in expected} <= names
    assert "en_modules.14.weight" not in names
    # 0-2 blocks, 3 attention, 4 doubling, 5-7 blocks, 8 norm, 9 convolution
    assert {"de_modules.2.3.NIN_0.W", "de_modules.2.4.Conv_2.weight", "de_modules.2.9.weight"} <= names


def test_queries_keys_and_values_channel_by_channel() -> None:
    ours = torch.arange(6.0)[:, None] * torch.ones(2)  # q0 q1 k0 k1 v0 v1
    (theirs,) = InterleavedQKV().to_theirs(ours)
    assert theirs[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(InterleavedQKV().to_ours([theirs]), ours)


def test_matrices_that_are_transposed() -> None:
    parts = [torch.randn(3, 3) for _ in range(3)]
    ours = Transposed().to_ours(parts)
    x = torch.randn(3)
    assert torch.allclose(ours @ x, torch.cat([x @ part for part in parts]))
    assert all(torch.equal(a, b) for a, b in zip(Transposed().to_theirs(ours), parts, strict=True))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_averages_follow_the_parameters(tmp_path: Path, make_export: Any, weights: Any) -> None:
    export = exported(make_export, "official-scoresde")
    convert(export, tmp_path / "x.safetensors", "msdiff", "official-scoresde")
    state = load_file(tmp_path / "x.safetensors")
    model = {"module.sigmas": torch.zeros(5), **{f"module.{k}": v for k, v in state.items()}}
    content = {
        "model": model,
        "ema": {"decay": 0.9, "num_updates": 1, "shadow_params": [v + 1 for v in state.values()]},
    }
    torch.save({**content, "optimizer": {}, "step": 3}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "ours", "official-scoresde", "msdiff", ConvertOptions(weights=weights))
    shift = 1 if weights == "ema" else 0
    found, expected = export_tensors(tmp_path / "ours"), export_tensors(export)
    assert all(torch.equal(found[k], v + shift) for k, v in expected.items())


@pytest.mark.parametrize("change", ["absent", "short"])
def test_averages_that_are_not_there(tmp_path: Path, make_export: Any, change: str) -> None:
    convert(exported(make_export, "official-scoresde"), tmp_path / "x.safetensors", "msdiff", "official-scoresde")
    state = load_file(tmp_path / "x.safetensors")
    content: dict[str, Any] = {"model": state}
    if change == "short":
        content["ema"] = {"shadow_params": list(state.values())[:-1]}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="averaged" if change == "absent" else "shadow_params"):
        convert(tmp_path / "x.pth", tmp_path / "y", "official-scoresde", "msdiff", ConvertOptions(weights="ema"))
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("form", "key", "named"),
    [
        ("official-edm", "model.enc.4x4_aux_residual.weight", "NCSN"),
        ("official-edm", "model.enc.8x8_strange.weight", "strange"),
        ("official-scoresde", "en_modules.99.weight", "en_modules.99"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, make_export: Any, form: str, key: str, named: str) -> None:
    convert(exported(make_export, form), tmp_path / "x.safetensors", "msdiff", form)
    save_file({**load_file(tmp_path / "x.safetensors"), key: torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=named):
        convert(tmp_path / "y.safetensors", tmp_path / "z", form, "msdiff")


def test_another_filter_is_refused(tmp_path: Path, make_export: Any) -> None:
    convert(exported(make_export, "official-edm"), tmp_path / "x.safetensors", "msdiff", "official-edm")
    state = load_file(tmp_path / "x.safetensors")
    save_file({**state, "model.enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 4, 4)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="filter"):
        convert(tmp_path / "y.safetensors", tmp_path / "z", "official-edm", "msdiff")


@pytest.mark.parametrize("form", ["ldm", "diffusers", "official-scoresde"])
def test_formats_without_the_family(tmp_path: Path, make_export: Any, form: str) -> None:
    export = exported(make_export, "official-edm")
    with pytest.raises(CheckpointError, match=r"model\.family"):
        convert(export, tmp_path / "x.safetensors", "msdiff", form)


def test_a_published_checkpoint_changes_decoders_where_its_network_does() -> None:
    """Against the condition of the published forward pass, on the labels 999 t in float32 that its samplers give it."""

    def published(t: np.float32) -> int:
        label = np.float32(999) * t
        stages = [(0, 0.4420), (0.4420, 0.6308), (0.6308, 1)]
        (stage,) = [k for k, (lo, hi) in enumerate(stages) if label > np.float32(lo * 1000) and label <= hi * 1000]
        return stage

    partition = build_partition(StagesConfig(boundaries=PAPER_BOUNDARIES), VPProcess(VPConfig()))
    near = [b + d for b in (0.442, 0.442442, 0.6308, 0.631431) for d in (-1e-4, -1e-6, 1e-6, 1e-4)]
    times = np.float32([*np.random.default_rng(0).uniform(1e-3, 1, 500), *near])
    assert partition.stage_of(times).tolist() == [published(t) for t in times]
