"""The snapshot that a launch takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msdiff_dist
from msdiff_dist.launch.snapshot import next_snapshot, take_snapshot


def test_the_snapshot_is_whole_and_can_be_imported(tmp_path: Path) -> None:
    snapshot = next_snapshot(tmp_path)
    assert snapshot == tmp_path / "launch/001"
    assert not snapshot.parent.exists()
    take_snapshot(snapshot, {"recipe.yaml": "name: x\n"})
    assert next_snapshot(tmp_path) == tmp_path / "launch/002"
    package = Path(msdiff_dist.__file__).parent
    kept = {p.relative_to(snapshot / "code/msdiff_dist") for p in (snapshot / "code/msdiff_dist").rglob("*.py")}
    assert kept == {p.relative_to(package) for p in package.rglob("*.py")}
    assert (snapshot / "recipe.yaml").read_text() == "name: x\n"
    environment = json.loads((snapshot / "environment.json").read_text())
    assert environment["packages"]["submitit"]
    assert environment["python"] == sys.version
    shown = "import msdiff_dist; print(msdiff_dist.__file__)"
    printed = subprocess.check_output([sys.executable, "-P", "-c", shown], env={"PYTHONPATH": str(snapshot / "code")})
    assert Path(printed.decode().strip()).is_relative_to(snapshot)


def test_the_repositorys_state_is_kept(tmp_path: Path) -> None:
    take_snapshot(tmp_path / "launch/001", {})
    state = json.loads((tmp_path / "launch/001/git.json").read_text())
    assert "commit" in state
    assert (tmp_path / "launch/001/git.diff").exists()
