"""`msdiff cancel`."""

from __future__ import annotations

from typing import Annotated

import typer


def cancel(
    run: Annotated[str, typer.Argument(help="Run folder, or the name of a launched run.")],
    now: Annotated[bool, typer.Option("--now", help="Kill it without saving.")] = False,
) -> None:
    """End a run's job. It saves first; `msdiff launch` on the same folder resumes the run.

    Example: msdiff cancel runs/cin
    """
    from msdiff_dist.launch import known_runs, watch

    folder = known_runs.find_run(run)
    typer.echo(f"{folder}: {watch.cancel(folder, now)}")
