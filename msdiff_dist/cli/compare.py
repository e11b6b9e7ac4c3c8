"""`msdiff compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_MARKS = {"best": " *", "noise": " ~", "": ""}


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run or export folders that `msdiff evaluate` evaluated.")],
) -> None:
    """Show the evaluations of runs side by side: the best of each metric, and what differs from it only within noise.

    Scores are in one table if they have the same features, number of images and reference.

    Example: msdiff compare runs/a runs/b
    """
    from msdiff_dist.apps.evaluation.compare import compare as compare_runs

    console = Console()
    for found in compare_runs(runs):
        table = Table("run", *found.metrics, title=found.title)
        for name, values in found.rows:
            cells = [
                f"{(v := values[m]).value:.4g} ± {v.high - v.value:.2g}{_MARKS[v.mark]}" if m in values else ""
                for m in found.metrics
            ]
            table.add_row(name, *cells)
        console.print(table)
    typer.echo("* best, ~ differs from the best only within both 95 % intervals")
