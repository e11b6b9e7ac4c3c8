"""Grow a multi-stage model from a unified one, so that training starts warm.

The encoder is copied, and each decoder is the unified model's: the same where its width and attention are, else by the
channel rule of msdiff_dist/convert/edit/widths.py.

Example: python tools/init_from_unified.py unified grown --boundaries 442,631 --widths 256,192,128
then:    msdiff train recipes/celebahq256_ldm_3stage.yaml train.init_from=grown
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from command import numbers, run

from msdiff_dist.convert.conversion import read, write
from msdiff_dist.convert.edit.stages import grow
from msdiff_dist.convert.options import ConvertOptions, parse_boundaries


def init_from_unified(
    src: Annotated[Path, typer.Argument(help="Unified model.")],
    dst: Annotated[Path, typer.Argument(help="New export folder.")],
    boundaries: Annotated[str, typer.Option(help="Inner stage boundaries, as 442,631.")],
    widths: Annotated[str, typer.Option(help="Each decoder's width, stage 0 first.")],
    attention: Annotated[
        str | None, typer.Option(help="Each decoder's downsampling factors with attention, as 8,4,2:8,4: .")
    ] = None,
    from_format: Annotated[str, typer.Option("--from", help="Format of SRC, as in msdiff convert.")] = "msdiff",
) -> None:
    """Grow a multi-stage model from a unified one."""
    options = ConvertOptions()
    places = attention and [numbers("--attention", part) for part in attention.split(":")]
    grown = grow(
        read(src, from_format, options),
        parse_boundaries(boundaries) or (),
        numbers("--widths", widths),
        places or None,
    )
    write(grown, dst, "msdiff", options, {"path": str(src), "format": from_format})


if __name__ == "__main__":
    run(init_from_unified)
