"""Commands take runs, checkpoints, snapshots, exports and files in them alike, and say what anything else is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from msdiff_dist.apps.init_recipe import continuation
from msdiff_dist.checkpoint.layout import INDEX, CheckpointIndex, find_checkpoint, step_folder
from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.editing import extract
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.export.export import export
from msdiff_dist.export.weights import open_weights
from msdiff_dist.files.digest import sha256_of
from tests.unit.checkpoint.test_commands import command


def places(run: Path) -> dict[str, Path]:
    """Everything that names the checkpoint of step 5."""
    checkpoint = step_folder(run / "checkpoints", 5)
    return {
        "run": run, "checkpoints": run / "checkpoints", "checkpoint": checkpoint, "index": checkpoint / INDEX,
        "file": checkpoint / "rank_00001.safetensors",
    }  # fmt: skip


NAMES = ["run", "checkpoints", "checkpoint", "index", "file"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def snapshot_of(run: Path) -> Path:
    """A folder of snapshots with one whose averages are of length 0.05."""
    source, folder = step_folder(run / "checkpoints", 5), step_folder(run / "ema_snapshots", 5)
    shutil.copytree(source, folder)
    raw = json.loads((folder / INDEX).read_text())
    for file in raw["files"]:
        held = load_file(folder / file["name"])
        renamed = {k.replace("ema/", "ema_0.05/"): v for k, v in held.items() if k.startswith("ema/")}
        save_file(renamed, folder / file["name"])
        file["keys"] = {k: v.numel() for k, v in renamed.items()}
        file["sha256"] = sha256_of(folder / file["name"])
        file["size"] = (folder / file["name"]).stat().st_size
    (folder / INDEX).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_found_from_everything_that_names_it(run: Path, tmp_path: Path, name: str) -> None:
    path, checkpoint = places(run)[name], places(run)["checkpoint"]
    assert find_checkpoint(path) == checkpoint
    assert json.loads(command("checkpoint", "inspect", path, "--json").stdout)["path"] == str(checkpoint)
    assert "intact" in command("checkpoint", "verify", path).stdout
    assert command("checkpoint", "diff", path, run).exit_code == 0
    assert open_weights(path).description.step == 5
    recipe, _ = continuation(path)
    assert recipe.train.init_from == str(checkpoint)
    export(path, tmp_path / "export")
    convert(path, tmp_path / "converted", "msdiff", "msdiff")
    extract(path, tmp_path / "extracted", 1)
    expected = tensors(tmp_path / "export")
    found = tensors(tmp_path / "converted")
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    one = tensors(tmp_path / "extracted")
    assert torch.equal(one["stages.0.out.2.bias"], expected["stages.1.out.2.bias"])


@pytest.mark.parametrize("file", ["", "config.json", "model.safetensors"])
def test_exports_are_found_from_their_files(run: Path, tmp_path: Path, file: str) -> None:
    export(run, tmp_path / "export")
    path = tmp_path / "export" / file
    report = json.loads(command("checkpoint", "inspect", path, "--json").stdout)
    assert (report["path"], report["step"], report["weights"]) == (str(tmp_path / "export"), 5, "ema")
    of_run = json.loads(command("checkpoint", "inspect", run, "--json").stdout)
    assert report["parts"] == of_run["parts"]
    assert "stages.2" in command("checkpoint", "inspect", path).stdout
    convert(path, tmp_path / "again", "msdiff", "msdiff")
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "export").keys()
    assert continuation(path)[0].train.init_from == str(tmp_path / "export")


def test_weights_that_are_asked_for(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "raw", "msdiff", "msdiff", ConvertOptions(weights="raw"))
    export(run, tmp_path / "expected", ema=False)
    expected = tensors(tmp_path / "expected")
    assert all(torch.equal(v, expected[k]) for k, v in tensors(tmp_path / "raw").items())


def test_snapshots(run: Path, tmp_path: Path) -> None:
    folder = snapshot_of(run)
    for path in (folder, folder / INDEX, folder.parent):
        assert json.loads(command("checkpoint", "inspect", path, "--json").stdout)["kinds"] == ["ema_0.05"]
        for use in (lambda p: convert(p, tmp_path / "out", "msdiff", "msdiff"), continuation, open_weights):
            with pytest.raises(CheckpointError, match=r"lengths 0\.05.*--ema-length 0\.05 --step 5"):
                use(path)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "named", "says"),
    [
        (["00000.tar", "index.json"], "", "is a folder of shards"),
        (["00000.tar"], "00000.tar", "is a shard"),
        (["recipe.yaml"], "recipe.yaml", "is a recipe"),
        (["recipe.yaml", "metrics.jsonl"], "", "no complete checkpoint"),
        (["a/checkpoints/x", "b/checkpoints/x"], "", "is a folder of 2 runs.*a, b"),
        (["model_index.json", "unet/config.json"], "", "[-]-from diffusers"),
        (["latest", "global_step1/mp_rank_00_model_states.pt"], "", "[-]-from deepspeed"),
        (["a.png", "b.png"], "", "is a folder of images"),
        (["a.yaml"], "", "is a folder of recipes"),
        (["notes.txt"], "", "holds no checkpoint, but notes.txt"),
        (["notes.txt"], "notes.txt", "is no checkpoint"),
        (["notes.txt"], "absent", "no such file or folder"),
        ([], "", "is an empty folder"),
    ],
)
def test_other_places_are_named_as_what_they_are(tmp_path: Path, files: list[str], named: str, says: str) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("x")
    for use in (
        lambda p: convert(p, tmp_path / "out", "msdiff", "msdiff"), continuation,
        lambda p: command("checkpoint", "inspect", p),
    ):  # fmt: skip
        try:
            result: Any = use(folder / named)
            error = result.exception
        except CheckpointError as e:
            error = e
        assert isinstance(error, CheckpointError)
        assert re.search(says, str(error)), error


def test_files_of_weights_are_named_by_format(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"is of format ldm.*--from ldm"):
        convert(tmp_path / "x.ckpt", tmp_path / "out", "msdiff", "msdiff")
    with pytest.raises(CheckpointError, match="--from ldm --to msdiff"):
        continuation(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="is a file of weights"):
        find_checkpoint(tmp_path / "x.ckpt")


def test_this_package_s_folders_for_readers_of_others(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "export")
    for path, says in [
        (run, "is a run folder"),
        (places(run)["checkpoint"], "is a checkpoint"),
        (tmp_path / "export", "msdiff"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            convert(path, tmp_path / "out", "ldm", "msdiff")


def test_options_that_a_container_s_content_does_not_use(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--boundaries.*run folder.*--weights can be given"):
        convert(run, tmp_path / "out", "deepspeed", "msdiff", ConvertOptions(boundaries=(1.0,)))
    assert CheckpointIndex.load(places(run)["checkpoint"]).step == 5
