"""`msdiff logs`."""

from __future__ import annotations

from typing import Annotated

import typer


def logs(
    run: Annotated[str, typer.Argument(help="Run folder, or the name of a run.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Only this rank.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines as they are written (rank 0's unless --rank).")
    ] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=1, help="Only the last lines of each log.")] = None,
) -> None:
    """Print the logs of a run's ranks, rank 0's first.

    Example: msdiff logs runs/cin --rank 3 -f
    """
    from msdiff_dist.launch import known_runs, run_logs

    folder = known_runs.find_run(run)
    for text in run_logs.log_texts(folder, rank, lines, follow):
        typer.echo(text, nl=False)
