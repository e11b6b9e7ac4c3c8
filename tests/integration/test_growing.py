"""A run that is killed while it grows, resumed by the same command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msdiff_dist.apps.train.costs import petaflops_after
from msdiff_dist.apps.train.plan import plan_phases
from msdiff_dist.recipe import load_recipe
from tests.integration.conftest import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.slow]

AT, STEPS = 3, 5
RECIPE = ["recipes/debug.yaml", "train.precision=fp32", "checkpoint.every=2"]
# Every command is one rank, as torchrun would start it, in a fork: what they import is loaded once. The first dies
# where it would read the grown state.
RANKS = """
import json, os, signal, sys
import msdiff_dist.apps.train.rank
from msdiff_dist.checkpoint import grown
from msdiff_dist.cli.main import main
statuses = []
for command in json.loads(sys.argv[1]):
    if pid := os.fork():
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        continue
    if not statuses:
        grown.GrownReader.__init__ = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    sys.argv = ["msdiff", "train", *command]
    sys.exit(main())
print(json.dumps(statuses))
"""


def test_killed_as_it_grows_it_goes_on_and_grows_no_second_time(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def command(at: int, steps: int = STEPS) -> list[str]:
        return [*RECIPE, f"train.steps={steps}", f"grow.at={at}", "--run-dir", str(run)]

    commands = [command(AT), command(AT - 1), command(AT), command(AT + 1), command(STEPS + 1, STEPS + 2)]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RANKS, json.dumps(commands)],
        cwd=ROOT, env=os.environ | env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-signal.SIGKILL, 2, 0, 2, 2], done.stderr
    refused = re.findall(r"^error (.*?\.) (?:Use|Restore) ", done.stderr, re.MULTILINE)
    assert refused == [
        f"grow.at = {AT - 1}: has passed: the run is at step {AT} and has not grown.",
        f"grow.at = {AT + 1}: has passed: the run grew after step {AT}.",
        f"grow.at = {STEPS + 1}: is to come, but the run is at step {STEPS} and has its stages already.",
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line.get("phase")] == [AT]
    planned = plan_phases(load_recipe(ROOT / RECIPE[0], [*RECIPE[1:], f"train.steps={STEPS}", f"grow.at={AT}"]), 1)
    for line in lines:
        assert line["petaflops"] == pytest.approx(petaflops_after(planned, line["step"]))
