"""What commands print to standard error in a log file: progress with rate and time left, nothing of other libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"

pytestmark = pytest.mark.integration


def stderr_of(*arguments: object) -> list[str]:
    """The lines of standard error, of a command under which Python shows every warning."""
    command = [sys.executable, "-W", "default", "-m", "msdiff_dist.cli.main", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "MSDIFF_QUIET")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_training_and_conversion_print_our_lines_only(tmp_path: Path) -> None:
    steps = ["train.steps=2", "train.precision=fp32", "data.workers=0"]
    lines = stderr_of("train", RECIPES / "debug.yaml", *steps, "--run-dir", tmp_path / "run")
    ours = [r"debug: .* parameters in fp32.*", r"step 1/2  loss .* img/s", r"step 2/2  loss .* img/s"]
    ours += [r"trained 2 steps .*", r"report: .*/run/report\.html"]
    assert len(lines) == len(ours), lines
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(ours, lines, strict=True)), lines
    assert stderr_of("export", tmp_path / "run", "--out", tmp_path / "export") == []
    converted = ["--from", "msdiff", "--to", "diffusers", "--stage", 0]
    notes = stderr_of("convert", tmp_path / "export", tmp_path / "folder", *converted)
    assert all(line.startswith("note: ") for line in notes), notes


@pytest.mark.slow
def test_long_work_prints_lines_with_rate_and_time_left(digits: Path) -> None:
    shards = [f"data.shards={digits}", "data.lanes=12", "data.workers=1"]
    lines = stderr_of("data", "bench", RECIPES / "quickstart.yaml", *shards, "--seconds", 0.4, "--batch-size", 64)
    assert len(lines) >= 2, "a line is due after two seconds"
    assert all(re.fullmatch(r"measuring \d+/\d+ turns  [\d.]+ turns/s  ETA \d:\d\d:\d\d", line) for line in lines[:-1])
    assert re.fullmatch(r"measuring (\d+)/\1 turns  [\d.]+ turns/s  in \d:\d\d:\d\d", lines[-1])
