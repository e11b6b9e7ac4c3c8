"""The cluster every test here runs on: brought up once, taken down at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(f"SLURM tests left out: {reason}")
    monkeypatch = pytest.MonkeyPatch()
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=2) as cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield cluster
    monkeypatch.undo()
