"""`msdiff attach`."""

from __future__ import annotations

from typing import Annotated

import typer


def attach(run: Annotated[str, typer.Argument(help="Run folder, or the name of a run.")]) -> None:
    """Show a run's live progress until it ends. Ctrl-C ends the display, not the run.

    Example: msdiff attach runs/cin
    """
    from msdiff_dist.launch import known_runs, tables

    tables.live(known_runs.find_run(run))
