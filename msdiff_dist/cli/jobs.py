"""`msdiff jobs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def jobs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or folders of runs (a sweep). Default: all launched runs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each run.")] = False,
) -> None:
    """List launched runs: job, state, progress, speed, restarts and loss.

    Example: msdiff jobs /shared/runs/sweep
    """
    from msdiff_dist.launch import tables, watch

    statuses = watch.run_statuses(watch.runs_in(folders) if folders else watch.known_runs())
    if as_json:
        for status in statuses:
            typer.echo(tables.as_json(status))
    else:
        tables.show(statuses)
