"""Put unified models together as the stages of one, the first nearest the data.

Where their encoders are the same, bit by bit, they become the one shared encoder; else each stage keeps its own.

Example: python tools/merge_stages.py merged near middle far --boundaries 442,631
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from command import run

from msdiff_dist.convert.conversion import read, write
from msdiff_dist.convert.edit.stages import merge
from msdiff_dist.convert.options import ConvertOptions, parse_boundaries


def merge_stages(
    dst: Annotated[Path, typer.Argument(help="New export folder.")],
    models: Annotated[list[Path], typer.Argument(help="Unified models, stage 0 first.")],
    boundaries: Annotated[str, typer.Option(help="Inner stage boundaries, as 442,631.")],
    from_format: Annotated[str, typer.Option("--from", help="Format of the models.")] = "msdiff",
) -> None:
    """Put unified models together as the stages of one."""
    options = ConvertOptions()
    merged = merge([read(path, from_format, options) for path in models], parse_boundaries(boundaries) or ())
    write(merged, dst, "msdiff", options, {"path": [str(p) for p in models], "format": from_format})


if __name__ == "__main__":
    run(merge_stages)
