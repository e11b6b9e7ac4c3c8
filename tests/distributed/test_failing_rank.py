"""A rank that fails reports at once, although the other ranks wait for it, and the job ends with its traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.errors import TrainingError
from msdiff_dist.recipe import recipe_from, recipe_mapping
from tests.distributed.tiny_run import ADAM, recipe_of

pytestmark = pytest.mark.distributed

SINK = '''
from msdiff_dist.training.sinks import SINKS


class Bursting:
    """Fails at step 2, on rank 0 alone, when the other rank is already in the reductions of step 3."""

    def __init__(self, context):
        pass

    def write(self, metrics):
        if metrics.step == 2:
            raise RuntimeError("the sink burst")

    def say(self, text):
        pass

    def close(self):
        pass


SINKS.add("bursting", Bursting)
'''


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    (tmp_path / "bursting_sink.py").write_text(SINK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    more = {"extensions": ["bursting_sink"], "metrics": {"sinks": ["bursting"]}, "checkpoint": {"every": 0}}
    return recipe_mapping(recipe_from(recipe_of(ADAM, train__steps=100) | more))


def test_a_local_job_ends_with_the_traceback(recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="rank 0 failed: RuntimeError: the sink burst"):
        run_local(recipe, tmp_path / "run", 2)
    assert "bursting_sink.py" in (tmp_path / "run/logs/rank_0.log").read_text()


def test_ranks_of_another_launcher_end_by_themselves(recipe: dict, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "msdiff_dist.cli.main",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    start = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert "RuntimeError: the sink burst" in ended.stderr
    assert time.monotonic() - start < recipe["train"]["timeout_s"], "nobody waited for the time limit of a collective"
