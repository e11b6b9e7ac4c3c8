"""Combine the weights of a DeepSpeed folder in one .safetensors file: any ZeRO level, any number of ranks.

Needs neither deepspeed nor a GPU, and holds one tensor at a time.

Example: python tools/deepspeed_to_safetensors.py checkpoints weights.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from command import run

from msdiff_dist.convert.conversion import convert


def deepspeed_to_safetensors(
    src: Annotated[Path, typer.Argument(help="DeepSpeed folder, or one tag of it.")],
    dst: Annotated[Path, typer.Argument(help="New .safetensors file.")],
) -> None:
    """Combine the weights of a DeepSpeed folder in one file."""
    convert(src, dst, "deepspeed", "safetensors")


if __name__ == "__main__":
    run(deepspeed_to_safetensors)
