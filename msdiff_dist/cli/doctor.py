"""`msdiff doctor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where run folders are to lie; their disk is examined.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Examine this machine: versions that fit together, GPUs, driver, limits, disks, SLURM, network.

    Each line is ok, a warning or a problem, with what to do about it. Exit status 2 if there is a problem. On a cluster
    run it on a compute node too: srun msdiff doctor.

    Example: msdiff doctor runs --json
    """
    from msdiff_dist.apps.doctor.examine import as_mapping, examine, render

    findings = examine(folder)
    report = as_mapping(findings)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        from rich.console import Console

        Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(render(findings))
    if report["status"] == "problem":
        raise typer.Exit(2)
