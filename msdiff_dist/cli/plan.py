"""`msdiff plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")],
    world_size: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which ranks hold which stages, how well the work is balanced, and the bytes on and between ranks.

    State is parameters, optimizer and EMA; gradients and activations come on top.

    Example: msdiff plan recipes/celebahq256_ldm_3stage.yaml --world-size 64 --json
    """
    from msdiff_dist.distributed.plan_report import plan_report, render
    from msdiff_dist.launch.run_plan import plan_run, plan_warnings, workload
    from msdiff_dist.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    run = plan_run(parsed, world_size)
    report = plan_report(run.placement, workload(parsed, run), plan_warnings(parsed, world_size))
    if as_json:
        typer.echo(json.dumps(report))
        return

    from rich.console import Console

    Console().print(render(report, parsed.name))
