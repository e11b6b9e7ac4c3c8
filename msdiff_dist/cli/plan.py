"""`msdiff plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for. Or give --nodes and --gpus-per-node.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes to plan for.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each node.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which ranks hold which stages, how well the work is balanced, and the bytes on and between ranks.

    State is parameters, optimizer and EMA; gradients and activations come on top. With --nodes it also shows the bytes
    that pass between nodes, compared with data parallelism with every decoder on every rank.

    Example: msdiff plan celebahq256_ldm_3stage.yaml --world-size 64 --json
    """
    from msdiff_dist.apps.train.plan import plan_run, plan_warnings, workload
    from msdiff_dist.distributed.environment import this_device
    from msdiff_dist.distributed.plan_report import plan_report, render
    from msdiff_dist.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    ranks = _ranks(world_size, nodes, gpus_per_node)
    run = plan_run(parsed, ranks, gpus_per_node)
    on_gpus = bool(gpus_per_node) or this_device().type == "cuda"
    report = plan_report(run.placement, workload(parsed, run, on_gpus), plan_warnings(parsed, ranks), gpus_per_node)
    if as_json:
        typer.echo(json.dumps(report))
        return

    from rich.console import Console

    Console().print(render(report, parsed.name))


def _ranks(world_size: int | None, nodes: int | None, gpus_per_node: int | None) -> int:
    from msdiff_dist.errors import ConfigError

    if world_size is None and nodes is not None and gpus_per_node is not None:
        return nodes * gpus_per_node
    if world_size is None or nodes is not None or gpus_per_node is not None:
        remedy = "Give --world-size, or both --nodes and --gpus-per-node."
        raise ConfigError("--world-size", world_size, "does not say how many ranks to plan for", remedy)
    return world_size
