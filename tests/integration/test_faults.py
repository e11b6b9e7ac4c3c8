"""The command when ranks are killed, stopped or signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from msdiff_dist.checkpoint.layout import complete_checkpoints, step_of
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An endless run of two ranks in `tmp_path / "run"` that has done some steps; nothing of it is left afterwards."""
    run = tmp_path / "run"
    settings = ["train.steps=1000000", "checkpoint.every=5", "train.timeout_s=8"]
    command = [sys.executable, "-m", "msdiff_dist.cli.main", "train", "recipes/debug.yaml", *settings]
    command += ["--nproc", "2", "--run-dir", str(run)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not complete_checkpoints(run / "checkpoints"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    for pid in rank_processes(run):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def rank_processes(run: Path) -> list[int]:
    """Ranks of the run, by their output, in rank order."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            output = os.readlink(entry / "fd/2") if entry.name.isdigit() else ""
        except OSError:
            continue
        if output.startswith(f"{run}/logs/rank_"):
            found[output] = int(entry.name)
    return [found[output] for output in sorted(found)]


def fork_server_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(training: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(rank_processes(tmp_path / "run")[1], signal.SIGSTOP)
    _, message = training.communicate(timeout=120)
    assert training.returncode == 1
    assert "rank 1: no sign of life for" in message
    assert not rank_processes(tmp_path / "run")


def test_sigusr2_saves_and_ends_well(training: subprocess.Popen[str], tmp_path: Path) -> None:
    training.send_signal(signal.SIGUSR2)
    _, message = training.communicate(timeout=120)
    assert training.returncode == 0
    assert "stopped by a signal, saved" in message
    steps = (tmp_path / "run/metrics.jsonl").read_text().count("\n")
    assert step_of(complete_checkpoints(tmp_path / "run/checkpoints")[-1]) == steps


def test_a_signal_to_every_process_saves_and_ends_well(training: subprocess.Popen[str], tmp_path: Path) -> None:
    ranks = rank_processes(tmp_path / "run")
    for pid in {*map(fork_server_of, ranks), *ranks}:
        os.kill(pid, signal.SIGTERM)
    training.terminate()
    _, message = training.communicate(timeout=120)
    assert training.returncode == 0, message
    assert "stopped by a signal, saved" in message
    steps = (tmp_path / "run/metrics.jsonl").read_text().count("\n")
    assert step_of(complete_checkpoints(tmp_path / "run/checkpoints")[-1]) == steps


def test_ranks_without_their_supervisor_save_and_end(training: subprocess.Popen[str], tmp_path: Path) -> None:
    training.kill()
    training.communicate(timeout=120)  # the ranks hold the other end
    deadline = time.monotonic() + 60
    while rank_processes(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    steps = (tmp_path / "run/metrics.jsonl").read_text().count("\n")
    assert step_of(complete_checkpoints(tmp_path / "run/checkpoints")[-1]) == steps


@pytest.mark.slow
def test_short_campaign(tmp_path: Path) -> None:
    command = [sys.executable, "tools/fault_campaign.py", str(tmp_path / "campaign"), "--kills", "4", "--steps", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every step recorded once, greatest relative difference 0" in done.stdout
