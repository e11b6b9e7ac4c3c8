"""The cluster on which every test here runs, brought up once and taken down at the end, and fixtures that use it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(f"SLURM tests skipped: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch, SlurmCluster(folder / "cluster", nodes=2) as cluster:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        yield cluster


@pytest.fixture
def cluster_file(slurm: SlurmCluster, tmp_path: Path) -> Callable[..., str]:
    """Writes a cluster file for this cluster: 2 ranks on each of 2 nodes, with changes. Its GPUs are fake."""

    def write(**changes: Any) -> str:
        fields = {"shared": str(tmp_path), "nodes": 2, "tasks_per_node": 2, "time": "0:10:00", "signal_delay_s": 60}
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
