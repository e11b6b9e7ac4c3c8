"""`msdiff jobs`, `logs` and `attach` on a run of plain `msdiff train`: while it goes on, and afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from msdiff_dist.cli.main import app

RECIPE = Path(__file__).parents[2] / "recipes/debug.yaml"

pytestmark = pytest.mark.integration


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """`msdiff train` of a run that takes far longer than the test, in `runs/long`, past its third step."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "runs/long"
    arguments = ["train", str(RECIPE), "train.steps=100000", "checkpoint.every=100000", "--run-dir", str(run)]
    command = [sys.executable, "-m", "msdiff_dist.cli.main", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 200
            while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def printed(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def status(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed("jobs", *arguments, "--json"))
    return found


def test_a_run_is_watched_from_outside(
    tmp_path: Path, training: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/long"
    monkeypatch.setenv("PATH", "")  # no squeue
    shown = status()
    assert (shown["run"], shown["job_id"], shown["total_steps"]) == (str(run), "", 100000)
    assert shown["state"] == {"state": "RUNNING", "active": True, "nodes": "", "reason": ""}
    assert shown["step"] >= 3
    assert shown["images_per_second"] > 0
    assert shown["eta_s"] > 0
    assert shown["loss"] > 0
    assert "RUNNING" in printed("jobs", tmp_path / "runs")
    with (run / "logs/rank_0.log").open("a") as log:
        log.write("printed by a library\n")
    assert printed("logs", "long", "--rank", 0).endswith("printed by a library\n")

    command = [sys.executable, "-m", "msdiff_dist.cli.main", "attach", "long"]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True) as attached:
        assert attached.stdout is not None
        first = attached.stdout.readline()
        assert first.startswith("RUNNING  step ")
        assert "img/s  ETA " in first
        training.send_signal(signal.SIGTERM)
        training.communicate(timeout=120)
        last = attached.communicate(timeout=60)[0].splitlines()[-1]
    assert last.startswith("STOPPED  step ")
    ended = status(run)
    assert (ended["state"]["state"], ended["eta_s"]) == ("STOPPED", None)
    assert ended["step"] >= shown["step"]
    assert printed("logs", run, "-f").endswith("printed by a library\n")


def test_the_error_of_a_failed_run_is_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", str(RECIPE), "optimizer.lr=1000", "train.steps=50", "--run-dir", str(run)]
    done = subprocess.run([sys.executable, "-m", "msdiff_dist.cli.main", *command], capture_output=True, text=True)
    assert done.returncode == 1
    state = status(run)["state"]
    assert state["state"] == "FAILED"
    assert state["reason"].startswith("rank 0: TrainingError: ")
