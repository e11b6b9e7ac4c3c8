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
            "--from", help="Export, checkpoint or run folder whose weights to train further, instead of NAME."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: NAME.yaml in the current folder.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Shards of your images, whose channels and classes the copy of NAME gets."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="With --data: pixels a side, to which images are scaled. Default: as in NAME."),
    ] = None,
) -> None:
    """Write a recipe to edit: a copy of a shipped one, or one that trains an existing model further.

    Files that a shipped recipe names are copied too. Nothing is overwritten. With --data, the copy trains on your
    images, or on latents of them if NAME trains on latents. With --from, the recipe has the model of the export,
    checkpoint or run and starts from its averaged weights. Convert weights of other programs first (`msdiff convert`).

    Example: msdiff init fashion_mnist_3stage --data data/photos --size 64 --out photos.yaml
    """
    from msdiff_dist.apps.init_recipe import init_recipe

    made = init_recipe(name, source, out, data, size)
    for path in made.written:
        typer.echo(path)
    for path in made.kept:
        typer.echo(f"{path} exists and was kept", err=True)
