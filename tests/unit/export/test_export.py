"""Exports hold the checkpoint's weights, and `load_model` gives the model that was trained."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import msdiff_dist
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.export import export
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models.multistage_unet import MultistageUNet

Write = Callable[..., Any]


def inputs(process_time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    n = len(process_time)
    return torch.randn(n, 2, 8, 8, generator=generator), process_time, torch.arange(n) % 4


@pytest.mark.parametrize("ema", [True, False])
def test_files_hold_the_checkpoint(tmp_path: Path, ema: bool, write_checkpoint: Write) -> None:
    write_checkpoint(tmp_path / "run", 3)
    values = write_checkpoint(tmp_path / "run", 5)["ema" if ema else "param"]
    files = export(tmp_path / "run", tmp_path / "out", ema=ema)
    stages = [f"stage_{k}.safetensors" for k in range(3)]
    assert [f.name for f in files] == ["config.json", "model.safetensors", "shared.safetensors", *stages]
    whole = load_file(tmp_path / "out/model.safetensors")
    assert whole.keys() == values.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in values.items())
    parts = {f: load_file(tmp_path / "out" / f) for f in ["shared.safetensors", *stages]}
    assert {k: v.shape for part in parts.values() for k, v in part.items()} == {k: v.shape for k, v in whole.items()}
    assert all(torch.equal(whole[k], v) for part in parts.values() for k, v in part.items())
    assert all(k.startswith("stages.2.") for k in parts["stage_2.safetensors"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["weights"], config["step"], config["sample_size"]) == ("ema" if ema else "raw", 5, 8)


def test_load_model_is_the_model(tmp_path: Path, write_checkpoint: Write, model: MultistageUNet) -> None:
    """Times in the process's own variable choose the stage of each sample."""
    values = write_checkpoint(tmp_path / "run", 5)["ema"]
    export(tmp_path / "run", tmp_path / "out")
    loaded = msdiff_dist.load_model(tmp_path / "out")
    assert not loaded.training
    model.load_state_dict(values)
    x, t, label = inputs(torch.tensor([0, 441, 442, 630, 631, 999, 3]))
    stage = torch.tensor([0, 0, 1, 1, 2, 2, 0])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, label=label), model(x, t.float(), stage, None, label))
        from_run = msdiff_dist.load_model(str(tmp_path / "run"))
        assert torch.equal(loaded(x, t, label=label), from_run(x, t, label=label))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("error::ResourceWarning")
def test_load_model_closes_the_files(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    for path in (run, tmp_path / "out"):
        msdiff_dist.load_model(path)
    gc.collect()


def test_times_of_edm_are_sigmas(tmp_path: Path, write_checkpoint: Write, model: MultistageUNet) -> None:
    changes = {"diffusion": {"process": "edm"}, "stages": {"boundaries": [0.3, 2.0]}}
    values = write_checkpoint(tmp_path / "run", 1, changes)["param"]
    export(tmp_path / "run", tmp_path / "out", ema=False)
    loaded = msdiff_dist.load_model(tmp_path / "out", ema=False)
    model.load_state_dict(values)
    x, sigma, label = inputs(torch.tensor([0.01, 80.0, 0.3, 1.0]))
    with torch.no_grad():
        output = model(x, sigma.log() / 4, torch.tensor([0, 2, 1, 1]), None, label)
        torch.testing.assert_close(loaded(x, sigma, label=label), output)


def test_which_weights(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "ema")
    with pytest.raises(CheckpointError, match="msdiff export --raw"):
        open_weights(tmp_path / "ema", ema=False)
    export(run, tmp_path / "raw", step=3, ema=False)
    with pytest.warns(UserWarning, match="last weights"):
        assert open_weights(tmp_path / "raw").description.step == 3


def test_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="It has: 3, 5"):
        export(run, tmp_path / "out", step=4)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        export(run, run)
    with pytest.raises(CheckpointError, match=r"--ema-length.*holds no ema_snapshots.*Train with ema\.power"):
        export(run, tmp_path / "out", ema_length=0.07)
    with pytest.raises(CheckpointError, match=r"--ema-length.*0\.3.*must lie in \(0, 0\.2887\)"):
        export(run, tmp_path / "out", ema_length=0.3)
    with pytest.raises(CheckpointError, match=r"--ema-length.*--raw"):
        export(run, tmp_path / "out", ema=False, ema_length=0.07)
    path = run / "checkpoints/step_00000005/rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00001.*sha256.*newest intact checkpoint is .*step_00000003"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_bytes(content[:500])
    with pytest.raises(CheckpointError, match=r"has 500 bytes.*newest intact checkpoint is .*step_00000003"):
        msdiff_dist.load_model(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "model.safetensors").unlink(), "No such file"),
        (lambda out: (out / "config.json").write_text("{"), "no JSON"),
        (lambda out: (out / "config.json").write_text('{"format": 9}'), "format 9, newer than"),
        (lambda out: (out / "config.json").write_text("{}"), "is no export folder"),
        (lambda out: (out / "shared.safetensors").replace(out / "model.safetensors"), "parameters are missing"),
    ],
)
def test_corrupt_exports_name_the_file(run: Path, tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    export(run, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message) as caught:
        msdiff_dist.load_model(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)


def test_needs_no_deepspeed(run: Path, tmp_path: Path) -> None:
    code = """
import sys, pathlib, msdiff_dist
from msdiff_dist.export.export import export
run, out = map(pathlib.Path, sys.argv[1:])
export(run, out)
msdiff_dist.load_model(out)
print('deepspeed' in sys.modules, 'webdataset' in sys.modules)
"""
    command = [sys.executable, "-c", code, str(run), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
