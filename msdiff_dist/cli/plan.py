"""`msdiff plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from msdiff_dist.recipe import Recipe


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for. Or give --nodes and --gpus-per-node. Default: here.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes to plan for.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each node.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU to plan for: a name such as h100-80g, or numbers, as above."),
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Run the ranks' engines, and compare what they communicate."),
    ] = False,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not look at the data: they are not here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which ranks hold which stages, how well the work is balanced, and the bytes on and between ranks.

    Without --world-size it plans for this machine: one rank on each GPU, or one on the CPU.

    State is parameters, optimizer and averages; the peak is that of a training step, with gradients, activations and
    buffers. With --nodes it also shows the bytes that pass between nodes, compared with data parallelism with every
    decoder on every rank. With --gpu it says whether the plan fits, what to change if it does not, the largest micro
    batch, and how long a step takes at least. Nothing is computed: no GPU is needed.

    Of a run whose stages change at a step (grow, stages.end.at) all this is of all the recipe's stages; a row for each
    phase shows its ranks, balance and memory, and every phase must fit.

    The shards are looked at as training does at its start: what it would refuse is refused here, status 2. On machines
    that have no data, give --no-data.

    GPUs: a100-40g, a100-80g, b200, h100-80g, h200-141g, l40s, rtx3090, rtx4090, v100-32g; or GiB of memory, bf16
    TFLOP/s and GB/s of memory bandwidth, as memory=24,tflops=165,bandwidth=1000. Numbers after a name replace its own:
    h100-80g,compute_efficiency=0.5.

    With --rehearse it shows instead which collectives the ranks issue in a step, how many and of how many bytes, and
    whether they complete in whatever order the ranks arrive; status 2 says that they may wait for each other for ever.
    The engines of every different rank run here, in their full size, one after another in two processes.

    Example: msdiff plan celebahq256_ldm_3stage.yaml --nodes 8 --gpus-per-node 8 --gpu h100-80g --no-data
    """
    from msdiff_dist.apps.train.prediction import predict
    from msdiff_dist.distributed.environment import this_device
    from msdiff_dist.distributed.gpus import parse_gpu
    from msdiff_dist.distributed.plan_report import render
    from msdiff_dist.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    ranks = _ranks(recipe, world_size, nodes, gpus_per_node)
    on_gpus = bool(gpus_per_node) or this_device().type == "cuda"
    data = None if no_data else _data(parsed, ranks)
    if rehearse:
        _rehearse(parsed, ranks, gpus_per_node, on_gpus, as_json)
        return
    planned_for = None if gpu is None else parse_gpu(gpu)
    report = predict(parsed, ranks, on_gpus=on_gpus, ranks_per_node=gpus_per_node, gpu=planned_for)
    report["data"] = data
    if as_json:
        typer.echo(json.dumps(report))
        return

    from rich.console import Console

    Console().print(render(report, parsed.name))
    typer.echo(_about(data))


def _data(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """What the recipe's shards hold, once they are checked: numbers of sources, shards and samples."""
    from msdiff_dist.apps.train.plan import look_at_data

    sources = look_at_data(recipe, ranks).shards
    shards = [shard for source in sources for shard in source]
    return {
        "kind": recipe.data.kind,
        "sources": len(sources),
        "shards": len(shards),
        "samples": sum(shard.num_samples for shard in shards),
    }


def _about(data: dict[str, Any] | None) -> str:
    if data is None:
        return "data: not looked at (--no-data)"
    if not data["sources"]:
        return "data: random numbers, no shards"
    return f"data: {data['samples']:,} samples in {data['shards']:,} shards; training can read the first"


def _rehearse(recipe: Recipe, ranks: int, ranks_per_node: int | None, on_gpus: bool, as_json: bool) -> None:
    from rich.console import Console

    from msdiff_dist.apps.train.rehearsal import rehearse
    from msdiff_dist.apps.train.rehearsal_report import render

    report = rehearse(recipe, ranks, ranks_per_node, on_gpus)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        Console().print(render(report, recipe.name))
    if not report["orders_agree"]:
        raise typer.Exit(2)


def _ranks(recipe: Path, world_size: int | None, nodes: int | None, gpus_per_node: int | None) -> int:
    from msdiff_dist.errors import ConfigError

    if world_size is None and nodes is None and gpus_per_node is None:
        return _ranks_here(recipe)
    if world_size is None and nodes is not None and gpus_per_node is not None:
        return nodes * gpus_per_node
    if world_size is None or nodes is not None or gpus_per_node is not None:
        remedy = "Give --world-size, or both --nodes and --gpus-per-node."
        raise ConfigError("--world-size", world_size, "does not say how many ranks to plan for", remedy)
    return world_size


def _ranks_here(recipe: Path) -> int:
    """One rank for each GPU of this machine, or the one that `msdiff train` starts without any. Says so."""
    import torch

    gpus = torch.cuda.device_count()
    where = f"this machine's {gpus} GPUs" if gpus > 1 else "this machine's GPU" if gpus else "this machine's CPU"
    command = f"msdiff train {recipe.name}" + (f" --nproc {gpus}" if gpus > 1 else "")
    # Not on standard output, which may be JSON.
    typer.echo(f"planned for {where}, as `{command}` uses it; --world-size plans for other ranks", err=True)
    return max(1, gpus)
