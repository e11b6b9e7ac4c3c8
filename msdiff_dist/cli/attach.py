"""`msdiff attach`."""

from __future__ import annotations

from typing import Annotated

import typer


def attach(run: Annotated[str, typer.Argument(help="Run folder, or the name of a launched run.")]) -> None:
    """Show a run's live progress until it ends. Ctrl-C ends the display, not the run.

    Example: msdiff attach runs/cin
    """
    from msdiff_dist.launch import tables, watch

    tables.live(watch.find_run(run))
