"""`msdiff init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    name: Annotated[str | None, typer.Argument(help="A file that `msdiff recipes` lists.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Export, checkpoint or run folder whose weights to train further, instead of NAME; or the folder of a "
            "Stable Diffusion, as diffusers has it.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: NAME.yaml in the current folder.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Shards of your images, with captions for a Stable Diffusion. The recipe is made to fit."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels a side, to which images are scaled. Default: as in NAME, or as the U-Net has."
        ),
    ] = None,
    boundaries: Annotated[
        str | None,
        typer.Option(help="Inner stage boundaries of a Stable Diffusion. Default: 442,631; one stage: ''."),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(help="Width of each of its decoders, stage 0 first, as 320,256,192. Default: all as the U-Net's."),
    ] = None,
) -> None:
    """Write a recipe to edit: a copy of a shipped one, or one that trains an existing model further.

    Files that a shipped recipe names are copied too. Nothing is overwritten. With --data, the copy trains on your
    images, or on latents of them if NAME trains on latents.

    With --from, the recipe has the model of the export, checkpoint or run and starts from its averaged weights. That of
    a Stable Diffusion (1 or 2: unet, vae, text_encoder, tokenizer, scheduler) is grown to stages, and its weights are
    written beside the recipe. Convert other programs' weights first (`msdiff convert`).

    Example: msdiff init fashion_mnist_3stage --data data/photos --size 64 --out photos.yaml
    """
    from msdiff_dist.apps.finetuning_recipe import InitChoices
    from msdiff_dist.apps.init_recipe import init_recipe
    from msdiff_dist.convert.options import parse_boundaries, parse_numbers

    choices = InitChoices(
        data=data,
        size=size,
        boundaries=() if boundaries == "" else parse_boundaries(boundaries),
        widths=None if widths is None else parse_numbers("--widths", widths),
    )
    made = init_recipe(name, source, out, choices)
    for path in made.written:
        typer.echo(path)
    for path in made.kept:
        typer.echo(f"{path} exists and was kept", err=True)
