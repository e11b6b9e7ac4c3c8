"""The cluster every test here runs on, brought up once and taken down at the end, and what they all do with it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from cluster import SlurmCluster, why_not

RECIPE = Path(__file__).parents[2] / "recipes/debug.yaml"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(f"SLURM tests left out: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch, SlurmCluster(folder / "cluster", nodes=2) as cluster:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        yield cluster


@pytest.fixture
def cluster_file(slurm: SlurmCluster, tmp_path: Path) -> Callable[..., str]:
    """Writes a cluster file for this cluster: 2 nodes with 2 (fake) GPUs each, with changes."""

    def write(**changes: Any) -> str:
        fields = {"shared": str(tmp_path), "nodes": 2, "gpus_per_node": 2, "time": "0:10:00", "signal_delay_s": 60}
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump({**fields, **changes}))
        return str(path)

    return write


@pytest.fixture
def msdiff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process: exit status and everything printed."""

    def run(*arguments: object) -> tuple[int, str]:
        from msdiff_dist.cli.main import main

        monkeypatch.setattr(sys, "argv", ["msdiff", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(e.code is not None)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def losses(run: Path) -> dict[int, float]:
    """Loss of every step in a run's metrics, each of which must be there once."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found


def wait_for_step(run: Path, step: int, timeout_s: float = 120) -> int:
    """Until the run has trained `step` steps; returns how many it has."""
    end = time.monotonic() + timeout_s
    while True:
        text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        whole = text.split("\n")[:-1]
        if whole and (now := json.loads(whole[-1])["step"]) >= step:
            return now
        if time.monotonic() > end:
            logs = "".join(p.read_text()[-3000:] for p in sorted((run / "logs").glob("*_0_log.out")))
            raise TimeoutError(f"step {step} not reached in {timeout_s:g} s:\n{logs}")
        time.sleep(0.2)
