"""Fixtures for tests of the whole `msdiff` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from msdiff_dist.cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """Exit status and everything printed, white space folded."""

    status: int
    output: str


Msdiff = Callable[..., Ended]


@pytest.fixture
def msdiff(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Msdiff:
    """Run `msdiff ARGS...` in this process, from the root of the project."""

    def run(*args: str | Path) -> Ended:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["msdiff", *map(str, args)])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as e:
            status = int(e.code or 0)
        out, err = capfd.readouterr()
        return Ended(status, " ".join((out + err).split()))

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the digits data set."""
    from msdiff_dist.data.make.datasets import prepare

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", out, None, "train", 12)
    return out
