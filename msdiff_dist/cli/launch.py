"""`msdiff launch`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer


def launch(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML, or a sweep YAML.")],
    cluster: Annotated[str, typer.Option(help="Cluster file, or `local` or `debug`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    nodes: Annotated[
        str | None, typer.Option(help="Nodes, or a range such as 2-4: start on as many as are free.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs (and ranks) on each node.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one start: 24:00:00, or 2-12:00 with days.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME, after the recipe.")] = None,
    branch: Annotated[
        Path | None,
        typer.Option(help="A new run folder: begin there from the newest checkpoint of --run-dir."),
    ] = None,
    branch_from: Annotated[int | None, typer.Option(min=0, help="Branch from the checkpoint of this step.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show plan and sbatch text; submit nothing.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when the job has ended; exit status 1 if it failed.")
    ] = False,
) -> None:
    """Train a recipe as a cluster job that resumes by itself after time limits, pre-emption and node failures.

    --dry-run needs no cluster: where SLURM's commands are missing, all is checked that does not need them.

    Example: msdiff launch cin256_ldm_3stage.yaml --cluster gpu.yaml --nodes 4 --run-dir /shared/runs/cin
    """
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.launch import launcher, watch
    from msdiff_dist.launch.cluster import load_cluster

    given = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time": time}
    asked = load_cluster(cluster, given)
    folder, runs, parallel = launcher.runs_of(recipe, overrides or [], run_dir, branch, branch_from)
    asked = dataclasses.replace(asked, max_parallel=parallel or asked.max_parallel)
    if dry_run:
        dry = launcher.dry_run(runs, asked, folder, folder.name)
        launcher.show_plan(runs[0], asked)
        typer.echo(dry.sbatch if dry.sbatch is not None else f"the {asked.executor} executor has no sbatch text")
        if dry.note:
            typer.echo(f"note: {dry.note}", err=True)
        return
    check_place("--run-dir", folder, "folder")
    records = launcher.launch(runs, asked, folder, folder.name)
    for record in records:
        typer.echo(f"job {', '.join(record.job_ids)}: {record.run}")
    if wait:
        unfinished = watch.wait_for([Path(record.run) for record in records])
        for status in unfinished:
            reached = f"{status.state.state} at step {status.step or 0} of {status.total_steps}"
            typer.echo(f"not finished: {status.run}, {reached}; see `msdiff logs {status.run}`", err=True)
        raise typer.Exit(1 if unfinished else 0)
