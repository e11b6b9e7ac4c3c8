"""Runs on the terminal: the table of `msdiff jobs` and the live view of `msdiff attach`."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from msdiff_dist.errors import RunFolderError
from msdiff_dist.launch.plain_run import last_metrics
from msdiff_dist.launch.watch import RunStatus, run_statuses
from msdiff_dist.terminal import Lines, duration

_COLUMNS = ("run", "job", "state", "nodes", "step", "img/s", "ETA", "restarts", "loss")


def show(statuses: Sequence[RunStatus]) -> None:
    """Print a table with one line for each run."""
    console = Console()
    if not statuses:
        console.print("no runs; `msdiff train` and `msdiff launch` start them")
        return
    if not console.is_terminal:  # rich would assume 80 columns and cut the cells of a pipe or log
        console = Console(width=200)
    console.print(_table(statuses))


def _table(statuses: Sequence[RunStatus]) -> Table:
    common = os.path.commonpath([os.path.dirname(status.run) for status in statuses])
    table = Table(*_COLUMNS, box=None, pad_edge=False, title=None, caption=f"in {common}", caption_justify="left")
    for s in statuses:
        step = f"{s.step or 0}/{s.total_steps}" if s.total_steps is not None else ""
        table.add_row(
            os.path.relpath(s.run, common),
            s.job_id,
            _state(s),
            s.state.nodes,
            step,
            f"{s.images_per_second:.0f}" if s.images_per_second is not None else "",
            duration(s.eta_s) if s.eta_s is not None else "",
            str(s.restarts) if s.restarts is not None else "",
            f"{s.loss:.4f}" if s.loss is not None else "",
        )
    return table


def as_json(status: RunStatus) -> str:
    """The status as one line of JSON."""
    return json.dumps(dataclasses.asdict(status))


def live(run: Path) -> None:
    """Show a run's status and last steps until it has ended: every second or two on a terminal, else as lines.

    Raises:
        RunFolderError: no run has begun in `run`.
    """
    if not run_statuses([run]):
        raise RunFolderError("RUN", str(run), "no run has begun there", "See `msdiff jobs`.")
    console = Console()
    if not console.is_terminal:
        _lines(run)
        return
    with Live(console=console, auto_refresh=False) as view:
        while True:
            statuses = run_statuses([run])
            view.update(_live_view(run, statuses), refresh=True)
            if not statuses[0].state.active:
                return
            time.sleep(2 if statuses[0].step is None else 1)


def _lines(run: Path) -> None:
    """Print a line now and then while the run goes on, and one at its end."""
    lines, shown = Lines(), None
    while True:
        (status,) = run_statuses([run])
        if not status.state.active or (status.step != shown and lines.due()):
            print(_line(status), flush=True)
            shown = status.step
        if not status.state.active:
            return
        time.sleep(1)


def _line(status: RunStatus) -> str:
    words = [_state(status)]
    if status.total_steps is not None:
        words.append(f"step {status.step or 0}/{status.total_steps}")
    if status.loss is not None:
        words.append(f"loss {status.loss:.4f}")
    if status.images_per_second is not None:
        words.append(f"{status.images_per_second:.0f} img/s")
    if status.eta_s is not None:
        words.append(f"ETA {duration(status.eta_s)}")
    return "  ".join(words)


def _state(status: RunStatus) -> str:
    state = status.state
    return f"{state.state} ({state.reason})" if state.reason else state.state


def _live_view(run: Path, statuses: Sequence[RunStatus]) -> Table:
    view = Table.grid()
    view.add_row(_table(statuses))
    steps = Table("step", "loss", "loss of each stage", "grad norm", "lr", "img/s", box=None, pad_edge=False)
    for m in last_metrics(run)[-8:]:
        stages = " ".join("-" if loss is None else f"{loss:.4f}" for loss in m["loss_per_stage"])
        norm, lr = f"{m['grad_norm']:.3g}", f"{m['lr']:.3g}"
        steps.add_row(str(m["step"]), f"{m['loss']:.4f}", stages, norm, lr, f"{m['images_per_second']:.0f}")
    view.add_row(steps)
    return view
