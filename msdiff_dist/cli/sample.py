"""`msdiff sample`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class SamplerName(StrEnum):
    """Solvers offered on the command line."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"
    ddpm = "ddpm"


def sample(
    run: Annotated[Path, typer.Argument(help="Run folder, or one checkpoint of it.")],
    out: Annotated[Path, typer.Option(help="New folder for the pictures.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures to make.")] = 64,
    sampler: Annotated[SamplerName, typer.Option(help="Solver.")] = SamplerName.ddim,
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations a picture.")] = 50,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Noise of ddim's steps.")] = 0.0,
    clip: Annotated[bool, typer.Option(help="Keep x0 in [-1, 1]: for pixels, not latents.")] = False,
    class_: Annotated[int | None, typer.Option("--class", help="Only this class; default all in turn.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Pictures depend on it and their number alone.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="The last weights instead of their average.")] = False,
) -> None:
    """Make pictures with a run's newest checkpoint: PNG files 00000.png ... and grid.png.

    Example: msdiff sample runs/quickstart --num 100 --steps 50 --sampler ddim --out samples
    """
    from msdiff_dist.diffusion.sampling import SamplerConfig
    from msdiff_dist.launch.sample import sample_run

    config = SamplerConfig(sampler.value, steps, eta, clip=clip, guidance_scale=guidance)
    sample_run(run, out, num, config, class_, seed, batch_size, ema=not raw)
    typer.echo(f"{num} pictures and grid.png in {out}")
