"""Reading the metrics of runs while they run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes/debug.yaml"

Msdiff = Callable[..., tuple[int, str]]
ClusterFile = Callable[..., str]


def losses(run: Path) -> dict[int, float]:
    """Loss of every step in a run's metrics, each of which must be there once."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found


def wait_for_step(run: Path, step: int, timeout_s: float = 180) -> int:
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
