"""`msdiff check` in its small form, as on any machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # its parts have quick tests: tests/unit/apps/test_check.py


def test_this_cpu_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "msdiff_dist.cli.main", "check", "--device", "cpu", "--small"]
    ended = subprocess.run(
        [*command, "--json", str(tmp_path / "check.json")], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["status"] == "ok"
    assert {f["group"] for f in report["findings"]} == {
        "operators", "families", "resuming", "layouts", "failure", "throughput",
    }  # fmt: skip
    figures = {f["name"]: f["figures"] for f in report["findings"] if f["group"] == "throughput"}
    (diffusers,) = (figures[name] for name in figures if name.endswith("diffusers"))
    assert diffusers["images_per_second"] > 0
    assert diffusers["macs"] > 0
