"""The charts of a report as plain data: columns of numbers, and which chart draws which of them.

templates/report.js draws them with BokehJS. A column is a list in which null is a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from msdiff_dist.apps.report.run_data import MOST_POINTS, RunData, items, number

Column = list[float | None]
AXES = {"step": "step", "images": "images_seen", "pflop": "petaflops"}
"""Columns that a chart over training can have as its horizontal axis, with their keys in metrics.jsonl."""
PHASES = ("data", "routing", "compute", "optimizer", "checkpoint", "validation", "preview")


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart: columns `x` (None: the chosen axis) and `y` of a source; colours and dashes are numbers.

    style: line, dots (a line with its points), area (between columns `base` and `y`) or band (the same, faint, around a
        line of the same label).
    """

    source: str
    y: str
    label: str
    colour: int
    dash: int = 0
    style: str = "line"
    x: str | None = None
    base: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart; charts without series are not shown. `x_label` is that of charts not over training."""

    section: str
    title: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    log: bool = False
    x_label: str | None = None
    note: str = ""


@dataclass
class Charts:
    """Columns by source, and the charts that draw them."""

    sources: dict[str, dict[str, Column]] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """As JSON values."""
        return {"sources": self.sources, "charts": [asdict(chart) for chart in self.charts]}

    def of(self, section: str) -> list[tuple[int, Chart]]:
        """The charts of a section, with their numbers."""
        return [(i, chart) for i, chart in enumerate(self.charts) if chart.section == section]


def charts_of(runs: Sequence[RunData]) -> Charts:
    """All charts of the runs that have something to draw."""
    made, many = Charts(), len(runs) > 1
    for r, run in enumerate(runs):
        made.sources[f"run{r}"] = _training(run)
        made.sources[f"held{r}"] = _held_out(run)
        made.sources[f"bins{r}"] = _bins(run)
    for chart in [
        *_losses(runs, many),
        *_noise_bins(runs, made, many),
        _over("speed", "Throughput", "images/s", runs, "images_per_second"),
        *(_phases(r, run, many) for r, run in enumerate(runs)),
        _over("speed", "Balance: mean over maximum of the ranks' busy time", "balance", runs, "balance"),
        *_ranks(runs),
        _over("speed", "Model FLOP/s utilization", "MFU", runs, "mfu"),
        _over("optimizer", "Learning rate", "learning rate", runs, "lr"),
        _over("optimizer", "Gradient norm, before clipping", "gradient norm", runs, "grad_norm", log=True),
    ]:
        drawn = [s for s in chart.series if any(v is not None for v in made.sources[s.source].get(s.y, []))]
        if drawn:
            made.charts.append(Chart(**{**vars(chart), "series": drawn}))
    return made


def _training(run: RunData) -> dict[str, Column]:
    """Columns over the steps of a run; many steps are averaged, in groups of equal size."""
    lines = run.steps
    columns: dict[str, Column] = {name: _column(lines, key) for name, key in AXES.items()}
    for key in ("loss", "images_per_second", "balance", "mfu", "lr", "grad_norm"):
        columns[key] = _column(lines, key)
    for k in range(run.num_stages):
        columns[f"stage{k}"] = _column(lines, "loss_per_stage", k)
    top = np.zeros(len(lines))
    for phase in PHASES:
        seconds = _column(lines, "seconds", phase)
        if any(seconds):
            columns[f"below_{phase}"] = list(top.tolist())
            top = top + np.array([v or 0.0 for v in seconds])
            columns[f"seconds_{phase}"] = list(top.tolist())
    columns |= _of_ranks(lines)
    # A mean of ranks' numbers is the number of no rank.
    thinned = {
        name: column[:: _group(column)] if name == "slowest" else _averaged(column) for name, column in columns.items()
    }
    return {name: [_short(v) for v in column] for name, column in thinned.items()}


def _of_ranks(lines: Sequence[dict[str, Any]]) -> dict[str, Column]:
    """The slowest rank, its time and the mean, and the fullest memory, where the metrics have them for each rank."""
    columns: dict[str, Column] = {name: [] for name in ("slowest", "busy_most", "busy_mean", "memory")}
    for line in lines:
        busy = _numbers(line.get("busy_seconds"))
        columns["slowest"].append(float(np.argmax(busy)) if busy else None)
        columns["busy_most"].append(max(busy) if busy else None)
        columns["busy_mean"].append(sum(busy) / len(busy) if busy else None)
        memory = _numbers(line.get("memory_bytes"))
        columns["memory"].append(max(memory) / 2**30 if memory else None)
    return {name: column for name, column in columns.items() if any(v is not None for v in column)}


def _numbers(value: Any) -> list[float]:
    """The finite numbers of a list, or of a mapping's values, or a single one."""
    values = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    return [found for v in values if (found := number([v], 0)) is not None]


def _held_out(run: RunData) -> dict[str, Column]:
    lines = run.validations
    columns = {name: _column(lines, key) for name, key in AXES.items()}
    columns["loss"] = _column(lines, "validation", "loss")
    columns["raw"] = _column(lines, "validation", "raw", "loss")
    for k in range(run.num_stages):
        columns[f"stage{k}"] = _column(lines, "validation", "loss_per_stage", k)
    return {name: [_short(v) for v in column] for name, column in columns.items()}


def _chosen(run: RunData) -> list[dict[str, Any]]:
    """Up to four held-out losses, first and last among them."""
    lines = [line for line in run.validations if items(line, "validation", "loss_per_bin")]
    return [lines[i] for i in sorted({round(j * (len(lines) - 1) / 3) for j in range(4)})] if lines else []


def _bins(run: RunData) -> dict[str, Column]:
    lines = _chosen(run)
    count = max((len(items(line, "validation", "loss_per_bin")) for line in lines), default=0)
    columns: dict[str, Column] = {"bin": [float(b + 1) for b in range(count)]}
    for line in lines:
        columns[f"at{line['step']}"] = [_short(number(line, "validation", "loss_per_bin", b)) for b in range(count)]
    return columns


def _losses(runs: Sequence[RunData], many: bool) -> Iterable[Chart]:
    everything = []
    for r, run in enumerate(runs):
        prefix = f"{run.name}: " if many else ""
        everything += [
            Series(source=f"run{r}", y="loss", label=f"{prefix}training", colour=r),
            Series(
                source=f"held{r}", y="loss", label=f"{prefix}held out, averaged weights", colour=r if many else 1,
                dash=1, style="dots",
            ),
        ]  # fmt: skip
        if not many:
            everything.append(
                Series(source=f"held{r}", y="raw", label="held out, last weights", colour=2, dash=2, style="dots")
            )
    yield Chart(section="loss", title="Loss", y_label="loss", series=everything, log=True)
    stages = max((run.num_stages for run in runs), default=0)
    for source, name in (("run", "Loss"), ("held", "Held-out loss")):
        if not many:
            lines = [
                Series(source=f"{source}0", y=f"stage{k}", label=f"stage {k}", colour=k, style=_style(source))
                for k in range(stages)
            ]
            yield Chart(section="loss", title=f"{name} per stage", y_label="loss", series=lines, log=True)
        for k in range(stages if many else 0):
            lines = [
                Series(source=f"{source}{r}", y=f"stage{k}", label=run.name, colour=r, style=_style(source))
                for r, run in enumerate(runs)
            ]
            yield Chart(section="loss", title=f"{name} of stage {k}", y_label="loss", series=lines, log=True)


def _style(source: str) -> str:
    return "dots" if source == "held" else "line"


def _noise_bins(runs: Sequence[RunData], made: Charts, many: bool) -> Iterable[Chart]:
    """Held-out loss by noise: of one run through training, of several runs at their ends."""
    series = []
    for r, run in enumerate(runs):
        lines = _chosen(run)[-1:] if many else _chosen(run)
        for i, line in enumerate(lines):
            label = f"{run.name}, step {line['step']}" if many else f"step {line['step']}"
            series.append(
                Series(
                    source=f"bins{r}",
                    x="bin",
                    y=f"at{line['step']}",
                    label=label,
                    colour=r if many else i,
                    style="dots",
                )
            )
    yield Chart(
        section="loss", title="Held-out loss by noise", y_label="loss", series=series, log=True,
        x_label="bin of noise, from the data to pure noise",
    )  # fmt: skip


def _phases(r: int, run: RunData, many: bool) -> Chart:
    """Where the seconds of a step go, on rank 0, on top of each other."""
    series = [
        Series(
            source=f"run{r}", y=f"seconds_{phase}", base=f"below_{phase}", label=phase, colour=i, style="area"
        )
        for i, phase in enumerate(PHASES)
    ]  # fmt: skip
    title = "Time of a step by phase, on rank 0" + (f": {run.name}" if many else "")
    return Chart(section="speed", title=title, y_label="seconds", series=series)


def _ranks(runs: Sequence[RunData]) -> Iterable[Chart]:
    def lines(column: str, label: Callable[[RunData], str], dash: int = 0) -> list[Series]:
        return [Series(source=f"run{r}", y=column, label=label(run), colour=r, dash=dash) for r, run in enumerate(runs)]

    busy = lines("busy_most", lambda run: f"{run.name}, slowest rank") + lines(
        "busy_mean", lambda run: f"{run.name}, mean", 1
    )
    yield Chart(section="speed", title="Busy time of the ranks in a step", y_label="seconds", series=busy)
    yield Chart(
        section="speed", title="Slowest rank", y_label="rank", series=lines("slowest", lambda run: run.name),
        note="Where one rank is the slowest most of the time, its device or its share is at fault.",
    )  # fmt: skip
    yield Chart(
        section="speed", title="Memory of the fullest rank", y_label="GiB", series=lines("memory", lambda run: run.name)
    )


def _over(section: str, title: str, y_label: str, runs: Sequence[RunData], column: str, log: bool = False) -> Chart:
    """A column of metrics.jsonl, a line for each run."""
    lines = [Series(source=f"run{r}", y=column, label=run.name, colour=r) for r, run in enumerate(runs)]
    return Chart(section=section, title=title, y_label=y_label, series=lines, log=log)


def _column(lines: Sequence[dict[str, Any]], *keys: str | int) -> Column:
    return [number(line, *keys) for line in lines]


def _averaged(column: Column) -> Column:
    """Means of groups of equal size, without the gaps in them; None where all is a gap."""
    size = _group(column)
    if size == 1:
        return column
    groups = [[v for v in column[i : i + size] if v is not None] for i in range(0, len(column), size)]
    return [sum(group) / len(group) if group else None for group in groups]


def _group(column: Column) -> int:
    return -(-len(column) // MOST_POINTS) or 1


def _short(value: float | None) -> float | None:
    """Six digits are more than a screen shows."""
    return None if value is None else float(f"{value:.6g}")
