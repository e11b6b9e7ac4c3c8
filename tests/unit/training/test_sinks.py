from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch.utils.tensorboard  # noqa: F401  here: while its first import takes seconds, lines of a log become due
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msdiff_dist.config import from_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.metrics import StepMetrics
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.sinks import MetricsConfig, Sinks

METRICS = StepMetrics(
    step=1, loss=0.5, loss_per_stage=[0.25, 0.75], samples_per_stage=[4, 4], grad_norm=2.0, lr=1e-3,
    images_seen=8, images_per_second=4.0,
    seconds={"data": 0.1}, balance=1.0, busy_seconds=[1.0, 1.0], slowest_rank=0, memory_bytes=1 << 20, mfu=None,
    eta_seconds=None, petaflops=0.0, damaged=0,
)  # fmt: skip


def context(path: Path, terminal: io.StringIO, total_steps: int = 40) -> SinkContext:
    folder = RunFolder(path / "run")
    folder.path.mkdir(exist_ok=True)
    return SinkContext(folder=folder, first_step=0, total_steps=total_steps, terminal=terminal)


def test_every_sink_takes_every_step(tmp_path: Path) -> None:
    terminal = io.StringIO()
    with Sinks.of_run(MetricsConfig(), context(tmp_path, terminal)) as sinks:
        sinks.say("begins")
        for step in range(1, 41):
            sinks.write(replace(METRICS, step=step, loss=1 / step, eta_seconds=40.0 - step if 1 < step < 40 else None))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1 / step for step in range(1, 41)]
    assert lines[0]["loss_per_stage"] == [0.25, 0.75]
    printed = terminal.getvalue().splitlines()
    assert printed[0] == "begins"
    line = r"step 2/40  loss 0\.5000  4 img/s  ETA 0:00:38"
    assert re.fullmatch(line, printed[1]), "a line for every twentieth of the run"
    assert printed[-1] == "step 40/40  loss 0.0250  4 img/s"
    assert len(printed) == 21
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    names = {"loss", "loss_per_stage/0", "loss_per_stage/1", "seconds/data", "lr", "balance"}
    assert names <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 41))


def test_a_recipe_can_do_without_tensorboard(tmp_path: Path) -> None:
    with Sinks.of_run(MetricsConfig(sinks=()), context(tmp_path, io.StringIO())) as sinks:
        sinks.write(METRICS)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_an_unknown_sink_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.sinks.*tensorbord.*Did you mean 'tensorboard'"):
        from_mapping(MetricsConfig, {"sinks": ["tensorbord"]}, "metrics")
