"""Conversions from end to end: reports, metadata, options, and results that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from msdiff_dist import load_model
from msdiff_dist.cli.main import app
from msdiff_dist.convert.conversion import convert, read
from msdiff_dist.convert.formats import FORMATS
from msdiff_dist.convert.options import FLAGS, ConvertOptions, parse_boundaries
from msdiff_dist.diffusion.config import DiffusionConfig, StageObjective, StagesConfig
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models import build_model
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.song.config import SongConfig
from tests.unit.convert.convert_helpers import files_below, inputs, randomise

STAGED = LDMConfig(
    encoder_channels=32, decoder_channels=(64, 32, 32), channel_mult=(1, 2), num_res_blocks=1,
    attention_downsamples=(2,), decoder_attention=((2,), (), ()), num_head_channels=32,
)  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_reports_account_for_every_key(tmp_path: Path, make_export: Any) -> None:
    export = make_export(STAGED)
    report = convert(export, tmp_path / "theirs.safetensors", "msdiff", "official-ldm")
    assert json.loads((tmp_path / "conversion_report.json").read_text()) == json.loads(json.dumps(report))
    source, result = load_file(export / "model.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert set(report["keys"]) == set(source)
    targets = [k for entry in report["keys"].values() for k in entry["to"]]
    assert sorted([*targets, *report["added"]]) == sorted(result)
    assert report["source"]["sha256"] == {"model.safetensors": digest(export / "model.safetensors")}
    assert report["result"]["sha256"] == {"theirs.safetensors": digest(tmp_path / "theirs.safetensors")}


def test_metadata_say_where_weights_come_from(tmp_path: Path, make_export: Any) -> None:
    export = make_export(STAGED)
    state = load_file(export / "model.safetensors")
    save_file(state, export / "model.safetensors", {"license": "CC0", "source_format": "old"})
    convert(export, tmp_path / "x.safetensors", "msdiff", "official-ldm")
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["license"] == "CC0"
    assert metadata["source_format"] == "msdiff"
    assert json.loads(metadata["source_sha256"]) == {"model.safetensors": digest(export / "model.safetensors")}


def test_licences_go_along(tmp_path: Path, make_export: Any) -> None:
    export = make_export(STAGED)
    (export / "LICENSE.txt").write_text("free")
    convert(export, tmp_path / "theirs", "msdiff", "diffusers")
    (tmp_path / "theirs" / "README.md").write_text("license: free")
    convert(tmp_path / "theirs", tmp_path / "ours", "diffusers", "msdiff")
    assert (tmp_path / "ours" / "LICENSE.txt").read_text() == "free"
    assert (tmp_path / "ours" / "SOURCE_README.md").read_text() == "license: free"


@torch.no_grad()
def test_converted_models_are_loaded(tmp_path: Path, make_export: Any) -> None:
    convert(make_export(STAGED), tmp_path / "x.ckpt", "msdiff", "official-ldm")
    convert(tmp_path / "x.ckpt", tmp_path / "ours", "official-ldm", "msdiff")
    model, expected = load_model(tmp_path / "ours"), randomise(build_model(STAGED))
    x, t, _ = inputs(STAGED, batch=3)
    assert torch.equal(model(x, t), expected(x, t, torch.tensor([0, 1, 2])))
    whole = load_file(tmp_path / "ours/model.safetensors")
    parts = [load_file(tmp_path / f"ours/{part}.safetensors") for part in ("shared", "stage_0", "stage_1", "stage_2")]
    assert sorted(k for part in parts for k in part) == sorted(whole)
    assert all(torch.equal(v, whole[k]) for part in parts for k, v in part.items())


def test_the_command(tmp_path: Path, make_export: Any) -> None:
    export, out = make_export(STAGED), tmp_path / "one.ckpt"
    command = ["convert", str(export), str(out), "--from", "msdiff", "--to", "ldm", "--stage", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "skipped" in result.output
    assert out.exists()
    assert (tmp_path / "conversion_report.json").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stage": 3}, "--stage"),
        ({"num_heads": 2, "head_channels": 2}, "--heads"),
    ],
)
def test_options_that_contradict(tmp_path: Path, make_export: Any, options: dict[str, int], named: str) -> None:
    export = make_export(STAGED)
    with pytest.raises(ConfigError, match=named):
        convert(export, tmp_path / "out", "msdiff", "msdiff", ConvertOptions(**options))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("from_format", "to_format", "options", "named"),
    [
        ("ldm", "msdiff", {"norm_groups": 8}, r"--norm-groups = 8: .* from ldm to msdiff.*--config, --heads"),
        (
            "msdiff",
            "ldm",
            {"num_heads": 2},
            r"--heads = 2.*Remove it; --weights, --no-null-class, --no-model-ema, --stage can",
        ),
        ("ldm", "msdiff", {"boundaries": (442.0,)}, "--boundaries"),
        ("official-edm", "msdiff", {"null_class": False}, "--no-null-class = True"),
        ("official-scoresde", "msdiff", {"config": Path("x.yaml")}, "--config"),
        ("msdiff", "diffusers", {"prediction_type": "sample"}, "--prediction = 'sample'"),
        ("deepspeed", "safetensors", {"stage": 1}, r"--stage = 1.*Remove it\.$"),
    ],
)
def test_options_that_the_formats_do_not_use(
    tmp_path: Path, from_format: str, to_format: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        convert(tmp_path / "absent", tmp_path / "out", from_format, to_format, ConvertOptions(**options))


def test_every_option_has_its_flag() -> None:
    assert {*FLAGS, "stage"} == {f.name for f in fields(ConvertOptions)}
    shown = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200"}).output
    assert all(flag in shown for flag in FLAGS.values())


class Recording(ConvertOptions):
    """Options that remember which of them were looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in FLAGS:
            super().__getattribute__("__dict__").setdefault("looked_at", set()).add(name)
        return super().__getattribute__(name)


def recorded(use: Callable[[ConvertOptions], Any]) -> set[str]:
    """The options that `use` looks at."""
    options = Recording()
    options.__dict__["looked_at"] = set()  # building them looked at some
    use(options)
    return set(options.__dict__["looked_at"])


SONG: dict[str, Any] = {
    "encoder_channels": 16, "decoder_channels": (16, 16, 16), "channel_mult": (1, 2), "num_res_blocks": 1,
    "attention_downsamples": (2,), "norm_groups": 16,
}  # fmt: skip


@pytest.mark.parametrize("form", ["ldm", "official-ldm", "msdiff", "diffusers", "official-edm", "official-scoresde"])
def test_formats_use_the_options_that_they_name(tmp_path: Path, make_export: Any, form: str) -> None:
    config, process = {
        "ldm": (replace(STAGED, decoder_channels=(32,), decoder_attention=None), "discrete"),
        "official-edm": (SongConfig(**SONG, family="ddpmpp"), "edm"),
        "official-scoresde": (SongConfig(**SONG, family="ncsnpp_vp"), "vp"),
    }.get(form, (STAGED, "discrete"))
    weights = read(make_export(config, diffusion=DiffusionConfig(process=process)), "msdiff", ConvertOptions())
    out, known = tmp_path / ("out" if form in ("msdiff", "diffusers") else "out.safetensors"), FORMATS[form]
    reader, writer = known.read, known.write
    assert reader is not None
    assert writer is not None
    assert recorded(lambda options: writer(weights, out, options, {})) == set(known.write_options)
    assert recorded(lambda options: reader(out, options)) == set(known.read_options)


def test_boundaries_on_the_command_line() -> None:
    assert parse_boundaries("442,631") == (442, 631)
    assert parse_boundaries(None) is None
    with pytest.raises(ConfigError, match="--boundaries"):
        parse_boundaries("442;631")


@pytest.mark.parametrize(("form", "named"), [("ldmm", "Did you mean 'ldm'"), ("safetensors", "--from deepspeed")])
def test_formats_that_are_none(tmp_path: Path, make_export: Any, form: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        convert(make_export(STAGED), tmp_path / "out", "msdiff", form)


def test_existing_results_stay(tmp_path: Path, make_export: Any) -> None:
    export = make_export(STAGED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    before = files_below(tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(export, tmp_path / "out", "msdiff", "diffusers")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("corruption", "named"),
    [("truncated", r"model\.safetensors"), ("key", "surplus"), ("shape", r"stages\.0\.out\.2\.bias")],
)
def test_corrupt_exports_are_named(tmp_path: Path, make_export: Any, corruption: str, named: str) -> None:
    path = make_export(STAGED) / "model.safetensors"
    state = load_file(path)
    if corruption == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif corruption == "key":
        save_file({**state, "shared.surplus": torch.zeros(1)}, path)
    else:
        save_file({**state, "stages.0.out.2.bias": torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match=named):
        convert(path.parent, tmp_path / "out", "msdiff", "diffusers")
    assert not (tmp_path / "out").exists()


EVEN = replace(STAGED, decoder_attention=None)


def test_predictions_that_differ_by_stage_are_not_lost(tmp_path: Path, make_export: Any) -> None:
    stages = StagesConfig(
        boundaries=(442.0, 631.0),
        objectives=(StageObjective(prediction_type="v_prediction"), StageObjective(), StageObjective()),
    )
    source = make_export(EVEN, stages=stages)
    for form in ("official-ldm", "diffusers"):
        with pytest.raises(CheckpointError, match=r"stages.objectives = .*v_prediction.*--stage"):
            convert(source, tmp_path / form, "msdiff", form)
    convert(source, tmp_path / "same", "msdiff", "msdiff")
    assert open_weights(tmp_path / "same").description.stages == stages
    convert(source, tmp_path / "one", "msdiff", "diffusers", ConvertOptions(stage=0))
    scheduler = json.loads((tmp_path / "one/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    alike = (StageObjective(prediction_type="sample"),) * 3
    source = make_export(EVEN, "alike", stages=replace(stages, objectives=alike))
    convert(source, tmp_path / "alike_diffusers", "msdiff", "diffusers")
    scheduler = json.loads((tmp_path / "alike_diffusers/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "sample"
