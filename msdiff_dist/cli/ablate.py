"""`msdiff ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli.before_work import checks_first, work_begins


@checks_first
def ablate(
    sweep: Annotated[
        Path, typer.Argument(help="Ablation YAML: recipe, variants, budget, seeds, points, levels, score.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of all runs. Default: runs/NAME, after the file.")] = None,
    nproc: Annotated[int, typer.Option(min=1, max=1024, help="Ranks of a run, on this machine.")] = 1,
    part: Annotated[int, typer.Option(min=0, help="Only this share of the runs, from 0.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Shares that the runs are split into.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the runs; train nothing.")
    ] = False,
) -> None:
    """Train variants of a recipe with the same compute and several seeds, score them, and compare quality by compute.

    Scores are the held-out loss and metrics of generated images (fid, kid, ...) in feature spaces. results.json, .csv,
    .md, .html and quality.png have the curves and, with intervals over seeds, the compute that each variant takes to
    the baseline's scores.

    The same command on the same folder skips what is done, takes scores that the file has gained, and resumes the rest.
    Parts may run at the same time:
    msdiff array --parts 9 ... -- ablate SWEEP --out FOLDER --part {part} --parts {parts}

    Example: msdiff ablate fashion_mnist_efficiency.yaml --out runs/efficiency
    """
    from msdiff_dist.apps.ablation.config import load_ablation
    from msdiff_dist.apps.ablation.plan import plan_ablation
    from msdiff_dist.apps.ablation.report import write_report
    from msdiff_dist.apps.ablation.run import run_ablation
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.files.work_share import Part

    share = Part(part, parts)
    (config, places), folder = load_ablation(sweep, overrides or []), out or Path("runs") / sweep.stem
    if not dry_run:
        check_place("--out", folder, "folder")
    plan = plan_ablation(config, places, sweep.parent, folder, nproc)
    work_begins()
    mine = share.share(plan.trials)
    if dry_run:
        for t in mine:
            typer.echo(f"{t.folder}: {t.steps[-1]} steps, {t.petaflops[-1]:.4g} PFLOP, scored after {list(t.steps)}")
        return
    run_ablation(mine, plan.scoring, nproc, lambda: write_report(config, plan.trials, folder))
    typer.echo(write_report(config, plan.trials, folder))
