"""tools/loss_compare.py on folders that were trained, and at commits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/loss_compare.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_folder(path: Path, losses: list[float], **changed: Any) -> Path:
    path.mkdir()
    lines = [
        {"step": n, "loss": v, "loss_per_stage": [v, 2 * v], "grad_norm": 3 * v, "seconds": {}} | changed
        for n, v in enumerate(losses, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_run_folders(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", [1.0, 0.5, 0.25])
    near = run_folder(tmp_path / "near", [1.0, 0.5 * (1 + 1e-6), 0.25])
    far = run_folder(tmp_path / "far", [1.0, 0.5, 0.25 * (1 + 1e-3)])
    same = compare(a, run_folder(tmp_path / "same", [1.0, 0.5, 0.25]), "--equal")
    assert (same.returncode, same.stdout.count("equal in every bit")) == (0, 3)
    assert compare(a, near).returncode == 0
    unequal = compare(a, near, "--equal")
    assert unequal.returncode == 1
    assert unequal.stdout.count("largest relative difference 1e-06, different from step 2 on") == 3
    assert compare(a, far).returncode == 1
    assert compare(a, far, "--rtol", "0.01").returncode == 0
    longer = compare(a, run_folder(tmp_path / "longer", [1.0, 0.5, 0.25, 0.2]), "--equal")
    assert longer.returncode == 1
    assert "steps in B alone: 1, from 4 on" in longer.stdout
    stages = compare(a, run_folder(tmp_path / "stages", [1.0, 0.5, 0.25], loss_per_stage=[1.0]))
    assert stages.returncode == 1
    assert "loss_per_stage  largest relative difference inf" in stages.stdout


def test_bad_input(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", [1.0])
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = run_folder(tmp_path / "torn", [1.0])
    (torn / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for b, words in (
        (empty, "holds no metrics.jsonl"),
        ("no-such-commit", "neither a run folder nor a commit"),
        (torn, "line 1 of metrics.jsonl is not the record of a step"),
    ):
        refused = compare(a, b)
        assert refused.returncode == 2
        assert f"error B = {str(b)!r}: " in refused.stderr
        assert words in refused.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_commits() -> None:
    alike = compare("HEAD", "HEAD", "--steps", 2, "--equal")
    assert alike.returncode == 0, alike.stderr
    assert alike.stdout.count("equal in every bit") == 3
    assert "2 steps, 1 to 2" in alike.stdout
