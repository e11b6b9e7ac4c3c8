"""The `msdiff` command on real images: training, resuming, ranks that die, sampling."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.checkpoint.layout import complete_checkpoints, step_of
from tests.integration.conftest import ROOT, Msdiff

pytestmark = pytest.mark.integration


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _quickstart(digits: Path, steps: int) -> list[str]:
    small = ["model.encoder_channels=16", "model.decoder_channels=[24,16,8]", "train.precision=fp32"]
    more = ["checkpoint.every=4", "preview.every=6", "preview.num=10", "preview.sampler.steps=4"]
    return ["recipes/quickstart.yaml", f"data.shards={digits}", f"train.steps={steps}", *small, *more]


def test_digits_from_shards_to_images(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    whole, parts, out = tmp_path / "whole", tmp_path / "parts", tmp_path / "out"
    averages = ["ema.power.snapshot_every=2", "checkpoint.keep_last=1"]
    assert msdiff("train", *_quickstart(digits, 6), *averages, "--nproc", 3, "--run-dir", whole).status == 0
    lines = _metrics(whole)
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    keys = {"loss", "loss_per_stage", "grad_norm", "lr", "images_seen", "images_per_second", "seconds", "balance"}
    assert keys <= set(lines[0])
    assert {"data", "routing", "compute", "optimizer"} <= set(lines[0]["seconds"])
    assert lines[-1]["images_seen"] == 6 * 72
    assert all(0 < m["balance"] <= 1 for m in lines)
    assert all(len(m["busy_seconds"]) == 3 for m in lines)
    assert all(m["busy_seconds"][m["slowest_rank"]] == max(m["busy_seconds"]) for m in lines)
    assert all(m["memory_bytes"] > 1 << 27 for m in lines), "torch alone takes more"
    assert [m["eta_seconds"] is None for m in lines] == [True, False, False, False, False, True]
    assert [m["mfu"] for m in lines] == [None] * 6
    assert (whole / "samples/step_00000006.png").exists()
    assert list((whole / "tensorboard").iterdir())
    written = (whole / "report.html").read_text()
    assert "could not be shown" not in written
    assert [f"stage {k}<small>" in written for k in range(4)] == [True, True, True, False]  # the strip of a small model
    assert len(complete_checkpoints(whole / "checkpoints")) == 1
    assert [step_of(p) for p in complete_checkpoints(whole / "ema_snapshots")] == [2, 4, 6]
    made = msdiff("export", whole, "--ema-length", 0.07, "--step", 4, "--out", out / "export")
    assert made.status == 0, made.output
    assert json.loads((out / "export/config.json").read_text())["ema_length"] == 0.07

    # Other ranks, workers and accumulation: the same training.
    other = ["data.workers=1", "train.gradient_accumulation_steps=2", "preview.every=0"]
    assert msdiff("train", *_quickstart(digits, 6), *other, "--nproc", 2, "--run-dir", parts).status == 0
    assert [m["loss"] for m in _metrics(parts)] == pytest.approx([m["loss"] for m in lines], rel=1e-5)

    for sampler in ("ddim", "dpmpp_2m", "ddpm"):
        made = msdiff("sample", whole, "--num", 3, "--steps", 4, "--sampler", sampler, "--out", out / sampler)
        assert made.status == 0, made.output
        images = [np.asarray(Image.open(out / sampler / f"{i:05d}.png")) for i in range(3)]
        assert all(p.shape == (16, 16) and p.dtype == np.uint8 for p in images)
        assert (out / sampler / "grid.png").exists()

    # Four steps of dpmpp_2m begin anew once, at timestep 251; ddim never does.
    no_restart = ["--num", 3, "--steps", 4, "--no-restart"]
    assert msdiff("sample", whole, *no_restart, "--sampler", "dpmpp_2m", "--out", out / "straight").status == 0
    with_and_without = [np.asarray(Image.open(out / d / "00000.png")) for d in ("dpmpp_2m", "straight")]
    assert not np.array_equal(*with_and_without)
    refused = msdiff("sample", whole, *no_restart, "--out", out / "ddim_straight")
    assert refused.status == 2
    assert "restart" in refused.output

    # Images depend on seed and number alone, not on the batch they are made in; a class can be chosen.
    again_dir = out / "again"
    assert msdiff("sample", whole, "--num", 3, "--steps", 4, "--batch-size", 2, "--out", again_dir).status == 0
    for i in range(3):
        a, b = (np.asarray(Image.open(out / d / f"{i:05d}.png")).astype(int) for d in ("ddim", "again"))
        assert np.abs(a - b).max() <= 1
    chosen = ["--class", 3, "--guidance", 2.0, "--num", 2, "--steps", 3, "--out", out / "threes"]
    assert msdiff("sample", whole, *chosen).status == 0
    assert msdiff("sample", whole, "--class", 10, "--out", out / "none").status == 2


def test_sampling_that_is_killed_resumes_to_the_same_images(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    run, whole, cut = tmp_path / "run", tmp_path / "whole", tmp_path / "cut"
    assert msdiff("train", *_quickstart(digits, 2), "preview.every=0", "--run-dir", run).status == 0
    options = ["--steps", "3", "--num", "60", "--batch-size", "3", "--eta", "1"]
    assert msdiff("sample", run, *options, "--out", whole).status == 0
    expected = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    assert len(expected) == 62

    command = [sys.executable, "-m", "msdiff_dist.cli.main", "sample", str(run), *options, "--out", str(cut)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(cut.glob("[0-9]*.png"))) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    there = {path.name: path.read_bytes() for path in cut.glob("[0-9]*.png")}
    assert 10 <= len(there) < 60
    assert there.items() <= expected.items()
    (cut / "00004.png").unlink()  # one of a batch

    for other, named in ((["--seed", "1"], "seed was 0, now 1"), (["--steps", "4"], "sampler.steps was 3, now 4")):
        refused = msdiff("sample", run, *options, *other, "--out", cut)
        assert refused.status == 2
        assert named in refused.output
    (cut / "mine.txt").touch()
    assert "mine.txt" in msdiff("sample", run, *options, "--out", cut).output
    (cut / "mine.txt").unlink()

    again = msdiff("sample", run, *options, "--out", cut)
    assert again.status == 0, again.output
    assert f"({len(there) - 1} were there already)" in again.output
    assert {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()} == expected
    assert msdiff("sample", run, *options, "--out", run).status == 2


def _start(run: Path, *args: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "msdiff_dist.cli.main",
        "train",
        "recipes/debug.yaml",
        "--run-dir",
        str(run),
        *args,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes that have a rank's log open as their output."""
    found = []
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit():
            try:
                target = os.readlink(proc / "fd/2")
            except OSError:
                continue
            if f"{process.args[6]}/logs/rank_" in target:  # type: ignore[index]
                found.append(int(proc.name))
    return sorted(found)


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_run_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = ["train.steps=100000", "checkpoint.every=2", "--nproc", "2"]
    process = _start(run, *long)
    _wait_for_step(run, 4, process)

    second = _start(run, *long)
    assert second.wait(60) == 2, "two runs in one folder"
    assert "in use" in second.stderr.read()  # type: ignore[union-attr]

    victims = _ranks_of(process)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank " in message
    assert "SIGKILL" in message

    process = _start(run, *long)
    before = len(_metrics(run))
    _wait_for_step(run, before + 1, process)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped by a signal, saved" in message
    steps = [m["step"] for m in _metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{steps[-1]:08d}"
