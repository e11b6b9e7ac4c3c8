"""`msdiff checkpoint` and `msdiff export`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from msdiff_dist.checkpoint.layout import step_folder
from msdiff_dist.cli.main import app
from msdiff_dist.errors import CheckpointError


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_inspect(run: Path) -> None:
    report = json.loads(command("checkpoint", "inspect", run, "--json").stdout)
    assert (report["step"], report["world_size"], report["samples_seen"]) == (5, 2, 30)
    assert list(report["parts"]) == ["shared", "stages.0", "stages.1", "stages.2"]
    assert report["kinds"] == ["ema", "param"]
    assert "stages.2" in command("checkpoint", "inspect", run, "--step", 3).stdout


def test_verify(run: Path) -> None:
    assert command("checkpoint", "verify", run).stdout.count("intact") == 2
    (step_folder(run / "checkpoints", 3) / "rank_00001.safetensors").unlink()
    result = command("checkpoint", "verify", run)
    assert isinstance(result.exception, CheckpointError)
    assert "rank_00001.safetensors" in str(result.exception)
    assert (result.stdout.count("intact"), result.stdout.count("corrupt")) == (1, 1)
    assert command("checkpoint", "verify", run, "--step", 5).exit_code == 0


def test_diff(run: Path, tmp_path: Path, write_checkpoint: Callable[..., Any]) -> None:
    a, b = (step_folder(run / "checkpoints", step) for step in (3, 5))
    shutil.copytree(a, tmp_path / "copy")
    same = command("checkpoint", "diff", a, tmp_path / "copy", "--json")
    assert same.exit_code == 0
    assert all(v["max_abs"] == 0 for v in json.loads(same.stdout)["values"])
    other = command("checkpoint", "diff", a, b, "--json")
    assert other.exit_code == 1
    report = json.loads(other.stdout)
    assert report["fields"] == [["step", 3, 5]]
    assert len(report["values"]) == 8
    assert all(v["max_abs"] > 1 for v in report["values"])


def test_export(run: Path, tmp_path: Path) -> None:
    assert "model.safetensors" in command("export", run, "--raw", "--step", 3, "--out", tmp_path / "out").stdout
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["weights"], config["step"]) == ("raw", 3)


MEASURE = """
import sys, pathlib, msdiff_dist
from msdiff_dist.export.export import export
from msdiff_dist.export.timed_model import load_model

def growth(action):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    action()
    return status("VmHWM") - before

def status(name):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) / 1024

run, out, small = map(pathlib.Path, sys.argv[1:])
export(small, out / "small")
load_model(out / "small")
print(growth(lambda: export(run, out / "out")), growth(lambda: load_model(out / "out")))
"""


@pytest.mark.slow
def test_memory_is_bounded(run: Path, tmp_path: Path, write_checkpoint: Callable[..., Any]) -> None:
    """Growth of the peak, in MiB: one tensor for export, one model for loading."""
    large = {
        "encoder_channels": 192, "decoder_channels": [192, 64], "channel_mult": [1, 3], "num_res_blocks": 1,
        "attention_downsamples": [2], "num_heads": 2, "num_classes": 3, "in_channels": 2, "out_channels": 2,
    }  # fmt: skip
    values = write_checkpoint(tmp_path / "large", 1, {"model": large, "stages": {"boundaries": [442]}})["ema"]
    whole, biggest = (f(4 * v.numel() for v in values.values()) / 2**20 for f in (sum, max))
    assert whole > 5 * biggest > 50
    arguments = [str(tmp_path / "large"), str(tmp_path), str(run)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    exporting, loading = map(float, done.stdout.split())
    print(f"model {whole:.0f} MiB, biggest tensor {biggest:.0f}, export {exporting:.0f}, loading {loading:.0f}")
    assert exporting < 1.2 * biggest + 16
    assert loading < 1.2 * whole
