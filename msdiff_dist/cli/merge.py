"""`msdiff merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli.convert import READABLE


def merge(
    dst: Annotated[Path, typer.Argument(help="New export folder.")],
    models: Annotated[list[Path], typer.Argument(help="Unified models, stage 0 first.")],
    boundaries: Annotated[str, typer.Option(help="Inner stage boundaries, as 442,631.")],
    from_format: Annotated[str, typer.Option("--from", parser=READABLE, help="Format of the models.")] = "msdiff",
) -> None:
    """Combine unified models into one model whose stages they are, the first nearest the data.

    If their encoders are equal bit by bit, these become the shared encoder; else each stage keeps its own.

    Example: msdiff merge merged near middle far --boundaries 442,631
    """
    from msdiff_dist.convert import editing
    from msdiff_dist.convert.options import parse_boundaries
    from msdiff_dist.files.atomic import check_place

    check_place("DST", dst, "new folder")
    report = editing.merge(models, dst, parse_boundaries(boundaries) or (), from_format)
    typer.echo(f"{len(models)} models merged in {dst}, from {len(report['keys'])} tensors")
