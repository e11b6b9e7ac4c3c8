"""`msdiff grow`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli.convert import READABLE


def grow(
    src: Annotated[Path, typer.Argument(help="Unified model.")],
    dst: Annotated[Path, typer.Argument(help="New export folder.")],
    boundaries: Annotated[str, typer.Option(help="Inner stage boundaries, as 442,631.")],
    widths: Annotated[str, typer.Option(help="Each decoder's width, stage 0 first.")],
    attention: Annotated[
        str | None, typer.Option(help="Each decoder's downsampling factors with attention, as 8,4,2:8,4: .")
    ] = None,
    from_format: Annotated[
        str, typer.Option("--from", parser=READABLE, help="Format of SRC, as in msdiff convert.")
    ] = "msdiff",
) -> None:
    """Grow a multi-stage model from a unified one, to start training from it: msdiff init --from DST.

    The encoder is copied. Each decoder is the unified model's: unchanged where width and attention are the same, else
    with channels repeated or removed.

    Example: msdiff grow unified grown --boundaries 442,631 --widths 256,192,128
    """
    from msdiff_dist.convert import editing
    from msdiff_dist.convert.options import parse_boundaries, parse_numbers
    from msdiff_dist.files.atomic import check_place

    check_place("DST", dst, "new folder")
    places = attention and [parse_numbers("--attention", part) for part in attention.split(":")]
    inner, each = parse_boundaries(boundaries) or (), parse_numbers("--widths", widths)
    report = editing.grow(src, dst, inner, each, places or None, from_format)
    typer.echo(f"{src} grown to {len(each)} stages in {dst}, from {len(report['keys'])} tensors")
