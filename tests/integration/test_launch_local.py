"""`msdiff launch` without SLURM: in the background of this machine, and in the command's own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes/debug.yaml"

pytestmark = pytest.mark.integration


def msdiff(tmp_path: Path, *arguments: object) -> str:
    command = [sys.executable, "-m", "msdiff_dist.cli.main", *map(str, arguments)]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_background_run_is_cancelled_and_resumed(tmp_path: Path) -> None:
    run, cluster = tmp_path / "faces", tmp_path / "cluster.yaml"
    cluster.write_text("{executor: local, tasks_per_node: 2}")
    launch = ("launch", RECIPE, "--cluster", cluster, "--run-dir", run)
    msdiff(tmp_path, *launch, "train.steps=100000", "checkpoint.every=100000")
    end = time.monotonic() + 200
    while len(steps_of(run)) < 3:
        assert time.monotonic() < end, [p.read_text() for p in (run / "logs").glob("*_log.out")]
        time.sleep(0.2)
    assert json.loads(msdiff(tmp_path, "jobs", "--json"))["state"]["state"] == "RUNNING"
    assert "asked to save" in msdiff(tmp_path, "cancel", "faces")
    while json.loads(msdiff(tmp_path, "jobs", "--json"))["state"]["active"]:
        assert time.monotonic() < end
        time.sleep(0.2)
    stopped_at = steps_of(run)[-1]
    assert "CANCELLED" in msdiff(tmp_path, "jobs")

    last = stopped_at + 3
    msdiff(tmp_path, *launch, f"train.steps={last}", "checkpoint.every=100000", "--wait")
    assert steps_of(run) == list(range(1, last + 1))
    assert f"step {last}/{last}" in msdiff(tmp_path, "logs", run, "--rank", 0)


def test_debug_runs_in_this_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    msdiff(tmp_path, "launch", RECIPE, "train.steps=2", "--cluster", "debug", "--run-dir", run, "--wait")
    assert steps_of(run) == [1, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here GPUs are visible")
def test_gpus_that_this_machine_does_not_have_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = ["launch", str(RECIPE), "--cluster", "local", "--gpus-per-node", "2", "--run-dir", str(run)]
    done = subprocess.run([sys.executable, "-m", "msdiff_dist.cli.main", *launch], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpus_per_node = 2" in done.stderr
    assert "shows no GPU" in done.stderr
    assert not run.exists()
