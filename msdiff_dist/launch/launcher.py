"""`msdiff launch` and `msdiff array`: check everything, take a snapshot, submit, write a record to the run folder."""

from __future__ import annotations

import json
import re
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from omegaconf import OmegaConf
from rich.console import Console

from msdiff_dist.apps.train.branch import Branch, branched
from msdiff_dist.apps.train.found_data import DataFinder
from msdiff_dist.apps.train.phases import first_phase
from msdiff_dist.apps.train.plan import check_run, plan_run
from msdiff_dist.apps.train.prediction import predict
from msdiff_dist.apps.train.warm_start import start_weights
from msdiff_dist.distributed.facts import AskedGpus, refused_gpus
from msdiff_dist.distributed.plan_report import render, size
from msdiff_dist.errors import ConfigError, RunFolderError, collecting, raise_all
from msdiff_dist.launch.cluster import ClusterConfig, one_rank
from msdiff_dist.launch.job import CANCELLED_FILE, CommandJob, TrainJob
from msdiff_dist.launch.known_runs import register_run
from msdiff_dist.launch.plain_run import last_metrics
from msdiff_dist.launch.record import JobRecord, done_file
from msdiff_dist.launch.restarts import Diary
from msdiff_dist.launch.slurm import has_clients
from msdiff_dist.launch.snapshot import next_snapshot, take_snapshot
from msdiff_dist.launch.submit import check_folder, check_job, make_executor, sbatch_text, submit
from msdiff_dist.launch.watch import states
from msdiff_dist.recipe import Recipe, comparable_mapping, load_recipe, recipe_mapping
from msdiff_dist.sweep import load_sweep, run_names
from msdiff_dist.training.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """A recipe, its run folder, and the run that it begins from, if it is a branch."""

    recipe: Recipe
    folder: Path
    branch: Branch | None = None


def runs_of(
    path: Path,
    overrides: Sequence[str],
    folder: Path | None,
    branch: Path | None = None,
    branch_from: int | None = None,
) -> tuple[Path, list[Run], int | None]:
    """The folder of the job, its runs and the limit of parallel runs (None: not given), from a recipe or sweep file.

    Args:
        path: a recipe or a sweep.
        overrides: `key=value` changes to every run's recipe; a sweep's own changes come after them.
        folder: the run folder, or the folder of a sweep's run folders; None: `runs/NAME`.
        branch: a new folder for them, if they are to begin from a checkpoint of the run in `folder`.
        branch_from: the step of that checkpoint; None: the newest.

    Raises:
        ConfigError: naming the file's or the recipe's field.
    """
    sweep = load_sweep(path)
    if sweep is None:
        recipe = load_recipe(path, overrides)
        new, origin = branched(folder or Path("runs") / recipe.name, branch, branch_from)
        return new, [Run(recipe, new, origin)], None
    new, origin = branched(folder or Path("runs") / path.stem, branch, branch_from)
    base, errors, runs = path.parent / sweep.config.recipe, list[ConfigError](), []
    for name, changes in zip(run_names(sweep.config.changes), sweep.overrides(), strict=True):
        with collecting(errors):
            runs.append(Run(load_recipe(base, [*overrides, *changes]), new / name, origin))
    raise_all(errors)
    return new, runs, sweep.config.max_parallel


def check_runs(runs: Sequence[Run], cluster: ClusterConfig) -> None:
    """Check all that can be checked before submission: data, placement, weights, run folders. Writes nothing.

    Raises:
        UserError: naming the field and the remedy.
    """
    _check_parallel(cluster, len(runs))
    _check_gpus(cluster)
    find = DataFinder()
    # In a container, under another Python or on a cluster that this machine is no part of, the ranks may have other
    # versions of the libraries than this command.
    same_software = cluster.container is None and cluster.python == sys.executable and not _elsewhere(cluster)
    device_type = "cuda" if cluster.gpus_per_node else "cpu"
    for run in runs:
        check_run(run.recipe, cluster.world_sizes, find, device_type=device_type if same_software else None)
        _check_elastic(run.recipe, cluster)
        RunFolder(run.folder, comparable_mapping).check(recipe_mapping(run.recipe))
        if run.branch:
            run.branch.check(run.recipe, run.folder)
        else:
            start_weights(first_phase(run.recipe), RunFolder(run.folder, comparable_mapping).checkpoints)
    records = [record for run in runs if (record := JobRecord.load(run.folder))]
    for record in (record for record, state in zip(records, states(records), strict=True) if state.active):
        raise RunFolderError(
            "--run-dir", record.run, f"job {record.job_ids[0]} of this run is still active",
            "Wait for it, `msdiff cancel` it, or name another folder.",
        )  # fmt: skip


def _check_gpus(cluster: ClusterConfig) -> None:
    """Without SLURM the job runs on this machine, whose GPUs can be counted now."""
    here = AskedGpus(cluster.gpus_per_node, "gpus_per_node") if cluster.executor != "slurm" else None
    if error := refused_gpus(here, socket.gethostname()):
        raise error


def _check_elastic(recipe: Recipe, cluster: ClusterConfig) -> None:
    """Refuse a range of nodes whose numbers of ranks give different global batches: it would not be one training."""
    sizes = {recipe.train.batch_size(w) for w in cluster.world_sizes}
    if len(sizes) > 1:
        raise ConfigError(
            "train.micro_batch_size", recipe.train.micro_batch_size,
            f"makes the global batch depend on how many of {cluster.nodes} nodes the job gets",
            "Give train.global_batch_size instead.",
        )  # fmt: skip


def plan_report_of(run: Run, cluster: ClusterConfig, world_size: int) -> dict[str, Any]:
    """The plan on `world_size` ranks, as JSON values; with the `images_per_second` to expect if the run has trained.

    The expected speed is the median of the run's last start, scaled by ranks times balance of this plan over ranks
    times balance of that start's plan.
    """
    on_gpus = cluster.gpus_per_node > 0
    report = predict(run.recipe, world_size, on_gpus=on_gpus, ranks_per_node=cluster.ranks_per_node)
    starts = Diary(run.folder / "launch/starts.jsonl").starts()
    # Steps up to the last start's checkpoint were trained by earlier starts, perhaps on another number of ranks.
    speeds = [
        line["images_per_second"] for line in last_metrics(run.folder) if starts and line["step"] > starts[-1].step
    ]
    if speeds:
        measured, ranks_then = statistics.median(speeds[-100:]), starts[-1].ranks
        plan_then = plan_run(run.recipe, ranks_then, cluster.ranks_per_node)
        speed_up = report["balance"] * world_size / (plan_then.placement.balance(plan_then.cost_K) * ranks_then)
        report["images_per_second"] = measured * speed_up
    return report


def show_plan(run: Run, cluster: ClusterConfig) -> None:
    """Print the plan on the most nodes, and one line for each number of nodes that the job may get."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for world_size in cluster.world_sizes:
        report = plan_report_of(run, cluster, world_size)
        if world_size == cluster.world_sizes[-1]:
            console.print(render(report, run.recipe.name))
        groups = ", ".join(str(len(stage["ranks"])) for stage in report["stages"])
        peak = size(max(rank["peak_bytes"]["total"] for rank in report["ranks"]))
        speed = f", {report['images_per_second']:.3g} img/s expected" if "images_per_second" in report else ""
        nodes = f"{world_size // cluster.ranks_per_node} nodes x {cluster.ranks_per_node} ranks"
        console.print(f"{nodes}: stages on {groups} ranks, balance {report['balance']:.1%}, peak {peak} a rank{speed}")


@dataclass(frozen=True)
class DryRun:
    """What `launch` would submit.

    Attributes:
        sbatch: the exact text for sbatch; None without SLURM.
        note: what was not checked because this machine is no part of the cluster, "" if all was.
    """

    sbatch: str | None
    note: str = ""


def dry_run(runs: Sequence[Run], cluster: ClusterConfig, folder: Path, name: str) -> DryRun:
    """What `launch` would submit, after the same checks. Where there is no SLURM client, those that need none.

    Writes nothing.
    """
    if not _elsewhere(cluster):
        return DryRun(_check(runs, cluster, folder, name))
    check_runs(runs, cluster)
    check_folder(cluster, folder)
    note = (
        "there is no SLURM client (sbatch) on this machine: partition, nodes and limits are not compared with the "
        f"cluster's, nor is {cluster.shared} looked for"
    )
    return DryRun(sbatch_text(_executor(cluster, name, folder), len(runs)), note)


def _elsewhere(cluster: ClusterConfig) -> bool:
    """Whether the jobs are for a cluster that this machine is no part of."""
    return cluster.executor == "slurm" and not has_clients()


def _executor(cluster: ClusterConfig, name: str, folder: Path) -> submitit.Executor:
    return make_executor(cluster, name, folder, next_snapshot(folder) / "code")


def _check(runs: Sequence[Run], cluster: ClusterConfig, folder: Path, name: str) -> str | None:
    """Check all that can be checked before submission; the text for sbatch, None without SLURM. Writes nothing."""
    check_runs(runs, cluster)
    if cluster.executor != "slurm":
        return None
    executor = _executor(cluster, name, folder)
    check_job(cluster, folder, executor, len(runs))
    return sbatch_text(executor, len(runs))


def launch(runs: Sequence[Run], cluster: ClusterConfig, folder: Path, name: str) -> list[JobRecord]:
    """Submit `runs`: one as a job, several as a job array. Nothing is written or submitted if a check fails.

    Args:
        folder: the folder for the job's logs and snapshot: the run folder, or the sweep's.
        name: the job's name.

    Raises:
        UserError: naming the field and the remedy.
    """
    _check(runs, cluster, folder, name)
    snapshot = next_snapshot(folder)
    names = ["recipe.yaml"] if len(runs) == 1 else [f"recipe_{i:03d}.yaml" for i in range(len(runs))]
    texts = [OmegaConf.to_yaml(OmegaConf.create(recipe_mapping(run.recipe))) for run in runs]
    take_snapshot(snapshot, dict(zip(names, texts, strict=True)))
    tasks = []
    for run, recipe in zip(runs, names, strict=True):
        (run.folder / "launch").mkdir(parents=True, exist_ok=True)
        (run.folder / "launch" / CANCELLED_FILE).unlink(missing_ok=True)
        run_dir = str(run.folder.resolve())
        tasks.append(
            TrainJob(
                run_dir=run_dir,
                recipe=str(snapshot / recipe),
                signal_delay_s=cluster.signal_delay_s,
                max_restarts=cluster.max_restarts,
                gpus_per_node=cluster.gpus_per_node,
                branch_of=str(run.branch.old.resolve()) if run.branch else None,
                branch_from=run.branch.step if run.branch else None,
            )
        )
    jobs = submit(make_executor(cluster, name, folder, snapshot / "code"), tasks)
    return [_record(cluster, run.folder, [job]) for run, job in zip(runs, jobs, strict=True)]


def parts_of(command: Sequence[str], parts: int) -> list[list[str]]:
    """A command once for each part, with `{part}` (0, 1, ...), `{part:05d}` (00000, ...) and `{parts}` filled in."""

    # Not str.format: other braces in a command stay as they are, such as shards/{00000..00255}.tar.
    def filled(word: str, part: int) -> str:
        word = re.sub(r"\{part(?::(\d+)d)?\}", lambda m: format(part, f"{m[1]}d" if m[1] else "d"), word)
        return word.replace("{parts}", str(parts))

    return [[filled(word, part) for word in command] for part in range(parts)]


def launch_commands(
    commands: Sequence[Sequence[str]], cluster: ClusterConfig, folder: Path, name: str
) -> JobRecord | None:
    """Submit `msdiff` commands, the parts of one data job, as a job array of one rank each; None if all are done.

    Raises:
        UserError: naming the field and the remedy.
    """
    cluster = one_rank(cluster)
    record = JobRecord.load(folder)
    if record and states([record])[0].active:
        raise RunFolderError("--folder", str(folder), "its jobs are still active", "Wait, or `msdiff cancel` them.")
    snapshot = next_snapshot(folder)
    all_tasks = [
        CommandJob(tuple(c), str(done_file(folder, i).resolve()), cluster.gpus_per_node) for i, c in enumerate(commands)
    ]
    tasks = [task for task in all_tasks if not task.done]
    if not tasks:
        return None
    _check_parallel(cluster, len(tasks))
    _check_gpus(cluster)
    if cluster.executor == "slurm":
        check_job(cluster, folder, make_executor(cluster, name, folder, snapshot / "code"), len(tasks))
    take_snapshot(snapshot, {"commands.json": json.dumps([list(c) for c in commands], indent=1)})
    (folder / "launch" / CANCELLED_FILE).unlink(missing_ok=True)
    jobs = submit(make_executor(cluster, name, folder, snapshot / "code"), tasks)
    return _record(cluster, folder, jobs, len(commands))


def _check_parallel(cluster: ClusterConfig, tasks: int) -> None:
    """Without SLURM nothing queues: refuse more tasks than may run at the same time."""
    if cluster.executor != "slurm" and tasks > cluster.max_parallel:
        raise ConfigError(
            "max_parallel", cluster.max_parallel, f"without SLURM all {tasks} start at once",
            "Use a SLURM cluster, or raise it.",
        )  # fmt: skip


def _record(
    cluster: ClusterConfig, folder: Path, jobs: Sequence[submitit.Job[Any]], parts: int | None = None
) -> JobRecord:
    record = JobRecord(
        run=str(folder.resolve()),
        job_ids=[job.job_id for job in jobs],
        executor=cluster.executor,
        logs=str(jobs[0].paths.folder),
        submitted=time.time(),
        parts=parts,
    )
    record.save()
    register_run(folder)
    return record
