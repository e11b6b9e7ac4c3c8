"""`msdiff flops`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def flops(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count parameters and multiply-adds of the encoder and of each stage's decoder. Nothing is allocated.

    GMACs are 1e9 multiply-adds of one forward pass at batch 1; the equivalent weights each stage's encoder + decoder by
    the length of its interval.

    Example: msdiff flops recipes/celebahq256_ldm_3stage.yaml --json
    """
    from msdiff_dist.models.flops import costs
    from msdiff_dist.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    partition = parsed.partition()
    intervals = [partition.interval(k) for k in range(partition.num_stages)]
    span = intervals[-1][1] - intervals[0][0]
    tokens = parsed.data.context_shape[0] if parsed.data.context_shape else 0
    counted = costs(parsed.model, parsed.latent_shape[1:], tokens)
    report = {
        "total_params": counted.total_params,
        "encoder": {"params": counted.encoder.params, "gmacs": counted.encoder.macs / 1e9},
        "decoders": [{"params": d.params, "gmacs": d.macs / 1e9} for d in counted.decoders],
        "equivalent_gmacs": counted.equivalent_macs([(hi - lo) / span for lo, hi in intervals]) / 1e9,
    }
    if as_json:
        typer.echo(json.dumps(report))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("part", "interval", "parameters", "GMAC", "GMAC with encoder", title=parsed.name)
    for column in table.columns[2:]:
        column.justify = "right"
    encoder_macs = counted.encoder.macs
    table.add_row("encoder", "", _millions(counted.encoder.params), f"{encoder_macs / 1e9:.2f}", "")
    for k, (part, (lo, hi)) in enumerate(zip(counted.decoders, intervals, strict=True)):
        name, interval = f"decoder {k}", f"{lo:g} - {hi:g}"
        both = f"{(part.macs + encoder_macs) / 1e9:.2f}"
        table.add_row(name, interval, _millions(part.params), f"{part.macs / 1e9:.2f}", both)
    table.add_section()
    table.add_row("total", "", _millions(counted.total_params), "", f"{report['equivalent_gmacs']:.2f}")
    Console().print(table)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
