"""`msdiff extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli.convert import READABLE


def extract(
    src: Annotated[Path, typer.Argument(help="Multi-stage model.")],
    dst: Annotated[Path, typer.Argument(help="New export folder.")],
    stage: Annotated[int, typer.Option(help="Number of the stage, 0 nearest the data.")],
    from_format: Annotated[
        str, typer.Option("--from", parser=READABLE, help="Format of SRC, as in msdiff convert.")
    ] = "msdiff",
) -> None:
    """Take one stage of a multi-stage model, with its encoder, as a unified model.

    Example: msdiff extract exported one --stage 2
    """
    from msdiff_dist.convert import editing
    from msdiff_dist.files.atomic import check_place

    check_place("DST", dst, "new folder")
    editing.extract(src, dst, stage, from_format)
    typer.echo(f"stage {stage} of {src} extracted to {dst}")
