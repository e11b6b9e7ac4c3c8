"""Take one stage of a multi-stage model, with its encoder, as a unified model.

Example: python tools/extract_stage.py exported one --stage 2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from command import run

from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.options import ConvertOptions


def extract_stage(
    src: Annotated[Path, typer.Argument(help="Multi-stage model.")],
    dst: Annotated[Path, typer.Argument(help="New export folder.")],
    stage: Annotated[int, typer.Option(help="Its number, 0 nearest the data.")],
    from_format: Annotated[str, typer.Option("--from", help="Format of SRC, as in msdiff convert.")] = "msdiff",
) -> None:
    """Take one stage as a unified model."""
    convert(src, dst, from_format, "msdiff", ConvertOptions(stage=stage))


if __name__ == "__main__":
    run(extract_stage)
