"""`msdiff classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli.before_work import checks_first, work_begins
from msdiff_dist.cli.choices import NamingCommand

app = typer.Typer(help="Classifiers in whose features `msdiff ablate` compares images.", no_args_is_help=True)


@app.callback()
def _verbs() -> None:
    """Keep `train` a verb: without a callback Typer drops the name of a single command."""


@app.command(cls=NamingCommand)
@checks_first
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe whose labelled images to train on.")],
    out: Annotated[Path, typer.Option(help="New .safetensors file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 128 images; 2000 take a minute or two.")] = 2000,
    seed: Annotated[
        int, typer.Option(help="Seed of first weights, sample order and choice of the held-out tenth.")
    ] = 0,
) -> None:
    """Train a small classifier on a recipe's labelled images, and measure its accuracy on a held-out tenth.

    Example: msdiff classifier train quickstart.yaml --out data/digits.safetensors
    """
    from msdiff_dist.evaluation.feature_classifier import save_classifier, train_classifier
    from msdiff_dist.recipe import load_recipe
    from msdiff_dist.shipped import refuse_existing

    refuse_existing(out)
    data = load_recipe(recipe, overrides or []).data
    work_begins()
    model = train_classifier(data, steps, seed=seed)
    save_classifier(model, out)
    typer.echo(f"{out}: accuracy {model.info.accuracy:.2%} on a held-out tenth, {model.info.features} features")
