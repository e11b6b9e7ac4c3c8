"""`msdiff export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli.before_work import checks_first, work_begins


@checks_first
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or one checkpoint of it.")],
    out: Annotated[Path, typer.Option(help="New folder for the weights.")],
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint (or snapshot of averages). Default: the newest.")
    ] = None,
    ema_length: Annotated[
        float | None,
        typer.Option(help="Export the average of this relative length, such as 0.07, of a run with ema.power."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema/--raw", help="Export the averaged weights, or the last ones.")] = True,
) -> None:
    """Write a run's weights as safetensors, whole and by stage, with a config.json that rebuilds the model.

    Reads one parameter at a time; needs no GPU. `msdiff_dist.load_model` opens the result, and so does `msdiff sample`.

    Example: msdiff export runs/quickstart --out exported
    """
    from msdiff_dist.checkpoint.layout import find_checkpoint
    from msdiff_dist.export.export import export as run_export
    from msdiff_dist.files.atomic import check_place

    check_place("--out", out, "new folder")
    if ema_length is None:
        find_checkpoint(run, step)
    work_begins()
    for file in run_export(run, out, step, ema, ema_length):
        typer.echo(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
