"""`msdiff doctor` on this machine as it is, and with faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
EVERYWHERE = {
    "Python", "packages", "compilers", "driver", "GPUs", "cores", "memory", "shared memory", "open files", "SLURM",
    "network", "InfiniBand", "run folders", "temporary files", "file locks", "clock",
}  # fmt: skip
"""Names of checks that find something on any machine without GPUs."""


def doctor(
    *arguments: str, environment: dict[str, str] | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command in a shell of its own, after the line `before`."""
    command = f'{before}\nexec "$0" -m msdiff_dist.cli.main doctor "$@"'
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run([bash, "-c", command, sys.executable, *arguments], capture_output=True, text=True, env=env)


def report(ended: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[str, dict[str, str | None]]]:
    """The whole report, and its checks by name. The exit status has to be that of the report."""
    whole = json.loads(ended.stdout)
    assert set(whole) == {"status", "checks", "versions"}
    for check in whole["checks"]:
        assert set(check) == {"name", "status", "found", "cure"}
        assert check["status"] in ("ok", "warning", "problem")
        assert (check["cure"] is None) == (check["status"] == "ok")
    gravest = max((c["status"] for c in whole["checks"]), key=["ok", "warning", "problem"].index)
    assert whole["status"] == gravest
    assert ended.returncode == (2 if gravest == "problem" else 0), ended.stderr
    return whole, {check["name"]: check for check in whole["checks"]}


def test_this_machine(tmp_path: Path) -> None:
    ended = doctor(str(tmp_path), "--json", environment={"MSDIFF_UNRELATED": "1"})
    whole, checks = report(ended)
    assert set(checks) >= EVERYWHERE - ({"GPUs"} if "GPU 0" in checks else set())
    assert ended.stderr == ""
    for name in ("Python", "packages", "imports", "file locks", "run folders"):
        assert checks[name]["status"] == "ok", checks[name]
    import torch

    assert whole["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert list(tmp_path.iterdir()) == []


def test_one_machine_with_several_faults(tmp_path: Path) -> None:
    """A broken package, few descriptors, a variable that names nothing, and a path without SLURM."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers/__init__.py").write_text("raise RuntimeError('torn')")
    (tmp_path / "bin").mkdir()
    faults = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "PATH": str(tmp_path / "bin"),
        "NCCL_SOCKET_IFNAME": "ethereal",
        "OMP_NUM_THREADS": "4096",
    }
    whole, checks = report(doctor("--json", environment=faults, before="ulimit -n 64"))
    assert whole["status"] == "problem"
    assert checks["import xformers"]["status"] == "problem"
    assert checks["import xformers"]["found"] == "RuntimeError: torn"
    assert "import torch" not in checks
    assert checks["open files"]["status"] == "problem"
    assert "64" in str(checks["open files"]["found"])
    assert checks["SLURM"]["found"] == "no client commands: `msdiff launch` runs with --cluster local only"
    assert checks["compilers"]["status"] == "warning"
    assert checks["NCCL_SOCKET_IFNAME"]["status"] == "problem"
    assert "OMP_NUM_THREADS is 4096" in str(checks["cores"]["found"])


def test_a_library_that_ends_the_process_when_imported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("import os; os.abort()")
    ended = doctor(environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    output = " ".join(ended.stdout.split())
    assert "problem import xformers" in output  # the first that imports torch
    assert "the process ended with status -6" in output


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    ended = doctor(str(tmp_path / "nowhere"))
    assert ended.returncode == 2
    output = " ".join(ended.stdout.split())
    assert f"problem run folders {tmp_path}/nowhere cannot be written: No such file or directory" in output
    assert "problem file locks" in output
