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

    GMACs are 1e9 multiply-adds of one forward pass at batch 1. A mean weights each stage's encoder + decoder by the
    length of its interval on the paper's clock (t of VP-SDE, or the fraction of all timesteps), which is the paper's
    measure; by how often training draws it; or by the steps of the recipe's preview sampler. Each is also given in
    percent of the unified model that is as wide as the encoder.

    Of a run whose stages change at a step (grow, stages.end) these are of all the recipe's stages, and the mean
    training sample is also given for each phase.

    Example: msdiff flops celebahq256_ldm_3stage.yaml --json
    """
    from msdiff_dist.apps.train.costs import GIGA, cost_report
    from msdiff_dist.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    report = cost_report(parsed)
    if as_json:
        typer.echo(json.dumps(report.fields()))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("part", "interval", "parameters", "GMAC", "GMAC with encoder", "of unified", title=parsed.name)
    for column in table.columns[2:]:
        column.justify = "right"
    counted, partition = report.costs, parsed.partition()
    encoder_macs = counted.encoder.macs
    table.add_row("encoder", "", _millions(counted.encoder.params), f"{encoder_macs / GIGA:.2f}", "", "")
    for k, part in enumerate(counted.decoders):
        interval = "{:g} - {:g}".format(*partition.interval(k))
        both = f"{(part.macs + encoder_macs) / GIGA:.2f}"
        table.add_row(f"decoder {k}", interval, _millions(part.params), f"{part.macs / GIGA:.2f}", both, "")
    table.add_section()
    table.add_row("total", "", _millions(counted.total_params), "", "", "")
    if counted.trained_params < counted.total_params:
        table.add_row("trained", "", _millions(counted.trained_params), "", "", "")
    if report.guide is not None:
        guide = report.guide
        table.add_row("guide: projector", "", _millions(guide.params), f"{guide.projector_macs / GIGA:.2f}", "")
        table.add_row(f"guide: teacher, to step {guide.last_step}", "", "", f"{guide.teacher_macs / GIGA:.2f}", "")
    means = {
        "mean, by interval (the paper's measure)": report.interval_K,
        "mean of a training sample": report.training_K,
        f"mean of {report.evaluations} sampling calls": report.sampling_K,
    }
    for name, shares in means.items():
        ratio = report.of_unified(shares)
        table.add_row(name, "", "", "", f"{report.gmacs(shares):.2f}", "" if ratio is None else f"{ratio:.1%}")
    for phase in report.phases if len(report.phases) > 1 else ():
        name = f"training sample, steps {phase.first}-{phase.last}: {phase.about}"
        ratio = None if report.unified_macs is None else phase.training_macs / report.unified_macs
        macs = f"{phase.training_macs / GIGA:.2f}"
        table.add_row(name, "", "", "", macs, "" if ratio is None else f"{ratio:.1%}")
    if report.unified_macs is not None:
        table.add_row("unified, as wide as the encoder", "", "", "", f"{report.unified_macs / GIGA:.2f}", "100.0%")
    Console().print(table)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
