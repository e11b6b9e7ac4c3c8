"""`msdiff array`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def array(
    command: Annotated[list[str], typer.Argument(help="An msdiff command after `--`, with {part} and {parts} in it.")],
    cluster: Annotated[str, typer.Option(help="Cluster file, or `local`.")],
    folder: Annotated[Path, typer.Option(help="Folder for the logs and the record of parts that are done.")],
    parts: Annotated[int, typer.Option(min=1, help="Number of jobs to split it into.")] = 1,
    time: Annotated[str | None, typer.Option(help="Limit of one start: 24:00:00, or 2-12:00 with days.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return at the end; exit status 1 if a part failed.")] = False,
) -> None:
    """Run an msdiff command as a job array: for each part one rank, with a GPU if the cluster file has any.

    The command is checked before anything is submitted: by its parser, and commands that take long by their own checks,
    of recipes, data and weights.

    A part that is stopped is queued again. The same command on the same folder runs the parts that are not done.

    Example: msdiff array --parts 16 --cluster gpu.yaml --folder /shared/jobs -- sample runs/cin --num 50000
    --part {part} --parts {parts} --out /shared/fid
    """
    from msdiff_dist.bounds import check_between
    from msdiff_dist.cli.before_work import check_command
    from msdiff_dist.cli.main import app  # here, because it imports this module
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.launch import launcher, watch
    from msdiff_dist.launch.cluster import load_cluster

    check_between("--parts", parts, 1, 10**5)
    check_place("--folder", folder, "folder")
    commands = launcher.parts_of(command, parts)
    # The parts differ in their numbers only.
    for words in (commands[0], commands[-1]) if parts > 1 else commands:
        check_command(app, words)
    record = launcher.launch_commands(commands, load_cluster(cluster, {"time": time}), folder, folder.name)
    if record is None:
        typer.echo(f"all {parts} parts are done already")
        return
    typer.echo(f"jobs {', '.join(record.job_ids)}: {record.run}")
    if wait:
        raise typer.Exit(1 if watch.wait_for([folder]) else 0)
