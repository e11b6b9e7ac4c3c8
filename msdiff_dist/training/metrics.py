"""What a run tells while it runs: metrics.jsonl, TensorBoard and a progress bar. Rank 0 only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from msdiff_dist.training.run_folder import RunFolder


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    step: optimizer steps done, counted from 1. loss: the objective over the global batch. loss_per_stage: mean over
    each stage's samples, before importance weights. grad_norm: global, before clipping. seconds: wall time of the step
    on rank 0 by part; `checkpoint`: how long training stood still for a checkpoint before this step. balance: mean over
    max of the ranks' busy time. petaflops: 1e15 floating-point operations of all steps so far, forward and backward.
    damaged: shards and samples left out since the command was given, each counted once.
    """

    step: int
    loss: float
    loss_per_stage: list[float]
    grad_norm: float
    lr: float
    images_seen: int
    images_per_second: float
    seconds: dict[str, float]
    balance: float
    petaflops: float
    damaged: int = 0


class MetricsWriter:
    """Writes every step's metrics to the run folder and shows progress on the terminal."""

    def __init__(self, folder: RunFolder, first_step: int, total_steps: int, terminal: IO[str]) -> None:
        self._file = folder.metrics_file.open("a", buffering=1)
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)
        self._terminal = terminal.isatty()
        self._total = total_steps
        self._console = Console(file=terminal, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} img/s  ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, loss=float("nan"), rate=0.0)

    def __enter__(self) -> MetricsWriter:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
        self._board.close()
        self._file.close()

    def say(self, text: str) -> None:
        """One line for the reader, above the bar."""
        self._console.print(text, highlight=False)

    def write(self, m: StepMetrics) -> None:
        """Record one step."""
        self._file.write(json.dumps(asdict(m)) + "\n")
        scalars = {"loss": m.loss, "grad_norm": m.grad_norm, "lr": m.lr, "images_per_second": m.images_per_second}
        scalars |= {f"loss_stage/{k}": v for k, v in enumerate(m.loss_per_stage)}
        scalars |= {f"seconds/{k}": v for k, v in m.seconds.items()} | {"balance": m.balance}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, m.step)
        self._bar.update(self._task, completed=m.step, loss=m.loss, rate=m.images_per_second)
        if not self._terminal and (m.step % max(1, self._total // 20) == 0 or m.step == self._total):
            self.say(f"step {m.step}/{self._total}  loss {m.loss:.4f}  {m.images_per_second:.0f} img/s")
