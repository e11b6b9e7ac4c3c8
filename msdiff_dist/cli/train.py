"""`msdiff train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 1,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME, after the recipe.")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Train a few steps of a small form of the recipe, without data.")
    ] = False,
) -> None:
    """Train a recipe. The same command on the same run folder resumes the run.

    Precision and threads fit the machine where the recipe does not give them; the first line says which precision.

    Under torchrun or srun (RANK and WORLD_SIZE set) this process is one rank. Without them --nproc starts the ranks.

    Example: msdiff train quickstart.yaml train.steps=300 --nproc 4 --run-dir runs/digits
    """
    from msdiff_dist.apps.train.plan import check_run
    from msdiff_dist.apps.train.warm_start import start_weights
    from msdiff_dist.distributed.environment import is_rank_process, this_device
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.launch.known_runs import register_run
    from msdiff_dist.recipe import load_recipe, recipe_mapping
    from msdiff_dist.training.run_folder import RunFolder

    parsed = load_recipe(recipe, overrides or [])
    if smoke:
        from msdiff_dist.apps.train.smoke import smoke as in_small

        parsed = in_small(parsed)
    folder = run_dir or Path("runs") / parsed.name
    if os.environ.get("RANK", "0") == "0":
        check_place("--run-dir", folder, "folder")
    start_weights(parsed, RunFolder(folder).checkpoints)
    if os.environ.get("RANK", "0") == "0":
        register_run(folder)
    if is_rank_process():
        from msdiff_dist.apps.train.rank import run_rank

        outcome: str = run_rank(parsed, folder)
    else:
        found = check_run(parsed, [nproc], device_type=this_device().type)
        RunFolder(folder).check(recipe_mapping(parsed))
        from msdiff_dist.apps.train.local import run_local

        outcome = run_local(recipe_mapping(parsed), folder, nproc, found)
    if outcome == "preempted":
        typer.echo(f"stopped by a signal, saved in {folder}; the same command resumes the run", err=True)
