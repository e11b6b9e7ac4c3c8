"""`msdiff train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli.before_work import checks_first, only_checking, work_begins


@checks_first
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    nproc: Annotated[int, typer.Option(min=1, max=1024, help="Ranks to start on this machine.")] = 1,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME, after the recipe.")] = None,
    branch: Annotated[
        Path | None,
        typer.Option(help="A new run folder: begin there from the newest checkpoint of --run-dir."),
    ] = None,
    branch_from: Annotated[int | None, typer.Option(min=0, help="Branch from the checkpoint of this step.")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Train a few steps of a small form of the recipe, without data.")
    ] = False,
) -> None:
    """Train a recipe. The same command on the same run folder resumes the run.

    Precision and threads fit the machine where the recipe does not give them; the first line says which precision.

    Under torchrun or srun (RANK and WORLD_SIZE set) this process is one rank. Without them --nproc starts the ranks.

    --branch begins a new run from a checkpoint of another one, with a changed recipe. The same command resumes it.

    Example: msdiff train quickstart.yaml train.steps=300 --nproc 4 --run-dir runs/digits
    """
    from msdiff_dist.apps.train.branch import branched
    from msdiff_dist.apps.train.phases import first_phase
    from msdiff_dist.apps.train.plan import check_run
    from msdiff_dist.apps.train.warm_start import start_weights
    from msdiff_dist.distributed.environment import is_rank_process, this_device
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.launch.known_runs import register_run
    from msdiff_dist.recipe import comparable_mapping, load_recipe, recipe_mapping
    from msdiff_dist.training.run_folder import RunFolder

    parsed = load_recipe(recipe, overrides or [])
    if smoke:
        from msdiff_dist.apps.train.smoke import smoke as in_small

        parsed = in_small(parsed)
    old = run_dir or Path("runs") / parsed.name
    folder, origin = branched(old, branch, branch_from)
    if os.environ.get("RANK", "0") == "0":
        check_place("--branch" if origin else "--run-dir", folder, "folder")
    if origin:
        origin.check(parsed, folder)
    else:
        start_weights(first_phase(parsed), RunFolder(folder).checkpoints)
    if is_rank_process():
        if os.environ["RANK"] == "0":
            register_run(folder)
        from msdiff_dist.apps.train.rank import run_rank

        outcome: str = run_rank(parsed, folder, branch=origin)
    else:
        found = check_run(parsed, [nproc], device_type=None if only_checking() else this_device().type)
        RunFolder(folder, comparable_mapping).check(recipe_mapping(parsed))
        work_begins()
        register_run(folder)
        from msdiff_dist.apps.train.local import run_local

        outcome = run_local(recipe_mapping(parsed), folder, nproc, found, origin)
    if outcome == "preempted":
        typer.echo(f"stopped by a signal, saved in {folder}; the same command resumes the run", err=True)
