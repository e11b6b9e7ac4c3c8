"""`msdiff check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def check(
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="What to check. Default: the GPU, if there is one.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="Small sizes: a minute on two CPU cores. Always so on a CPU.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this group of checks; may be given several times.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for everything found, as JSON.")] = None,
) -> None:
    """Try this machine: operators, networks, resuming, layouts, a failing rank, speed and memory.

    Results are compared with float64 on the CPU, with runs that were not interrupted and with `msdiff plan`. It takes
    about ten minutes on one GPU. Exit status 2 if something is a problem.

    Example: msdiff check --device cuda --json check.json
    """
    import torch
    from rich.console import Console

    from msdiff_dist.apps.check.findings import Finding
    from msdiff_dist.apps.check.run import run_check
    from msdiff_dist.distributed.environment import this_device
    from msdiff_dist.files.atomic import WriteError, atomic_write, check_place, writing

    if json_file is not None:
        check_place("--json", json_file, "file")
    console = Console(soft_wrap=True)
    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}

    def show(finding: Finding) -> None:
        console.print(f"{finding.status:8}", style=colours[finding.status], end="")
        console.print(f"{finding.group:11}{finding.name}: {finding.found}", markup=False, highlight=False)

    chosen = torch.device(device) if device else this_device()
    report = run_check(chosen, small or chosen.type == "cpu", only or (), show)
    total = sum(report.seconds.values())
    console.print(f"{report.status}: {len(report.findings)} findings on {report.device['name']} in {total:.0f} s")
    if json_file is not None:
        with writing("--json", json_file, WriteError):
            atomic_write(json_file, json.dumps(report.fields(), indent=1))
    if report.status == "problem":
        raise typer.Exit(2)
