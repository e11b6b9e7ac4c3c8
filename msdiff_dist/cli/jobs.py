"""`msdiff jobs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def jobs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, or folders of runs (a sweep). Default: all runs of this user."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each run.")] = False,
) -> None:
    """List runs, launched or of `msdiff train`: job, state, progress, speed, restarts and loss.

    Without a job, FINISHED is a run that has trained all steps, STOPPED one that saved when it was asked to stop, and
    FAILED one that ended with an error or was killed.

    Example: msdiff jobs /shared/runs/sweep
    """
    from msdiff_dist.launch import known_runs, tables, watch

    statuses = watch.run_statuses(known_runs.runs_in(folders) if folders else known_runs.known_runs())
    if as_json:
        for status in statuses:
            typer.echo(tables.as_json(status))
    else:
        tables.show(statuses)
