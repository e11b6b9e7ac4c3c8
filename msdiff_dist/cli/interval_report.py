"""`msdiff interval-report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from msdiff_dist.cli import choices
from msdiff_dist.cli.before_work import checks_first, work_begins
from msdiff_dist.cli.choices import Names


@checks_first
def interval_report(
    run: Annotated[Path, typer.Argument(help="Run folder, one checkpoint of it, or an export.")],
    reference: Annotated[Path, typer.Option(help="Run, checkpoint or export whose network samples everywhere else.")],
    data: Annotated[str, typer.Option(help="Shards of images to compare with.")],
    out: Annotated[Path, typer.Option(help="New folder for intervals.csv, .md and .png.")],
    features: Annotated[
        str,
        typer.Option(help="Feature space, as for evaluate: mobilenet, inception, ..., or a classifier's file."),
    ] = "mobilenet",
    feature_weights: Annotated[Path | None, typer.Option(help="File of the weights of the feature space.")] = None,
    intervals: Annotated[
        str | None, typer.Option(help="Inner edges of the intervals, as 442,631. Default: the run's stages.")
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="Images for each score.")] = 2000,
    sampler: Annotated[
        str | None, typer.Option(parser=Names(choices.solvers, checked=False), help="Solver, as for sample.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the solver.")] = 50,
    last: Annotated[
        Literal["first_time", "clean"],
        typer.Option(help="Where the last step of ddim and dpmpp_2m ends: use clean for pixels, not latents."),
    ] = "first_time",
    restart: Annotated[
        bool, typer.Option(help="Let dpmpp_2m begin anew at stages where its steps grow longer, or never.")
    ] = True,
    clip: Annotated[bool, typer.Option(help="Keep x0 in [-1, 1]: for pixels, not latents.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 250,
) -> None:
    """Sample with RUN inside one interval of time and the reference elsewhere, interval by interval (paper, Figure 2).

    Example: msdiff interval-report runs/multistage --reference runs/unified --data data/digits --out report
    """
    from msdiff_dist.convert.options import parse_boundaries
    from msdiff_dist.diffusion.solvers import SamplerConfig
    from msdiff_dist.distributed.environment import this_device
    from msdiff_dist.errors import ConfigError
    from msdiff_dist.evaluation.feature_spaces import load_feature_space
    from msdiff_dist.evaluation.interval_report import DistanceOfImages, markdown
    from msdiff_dist.evaluation.interval_report import interval_report as report
    from msdiff_dist.evaluation.sampling_job import SamplingJob
    from msdiff_dist.export.weights import open_weights
    from msdiff_dist.files.atomic import check_place

    check_place("--out", out, "new folder")
    try:
        boundaries = parse_boundaries(intervals)
    except ConfigError as e:
        raise ConfigError("--intervals", e.value, e.problem, e.remedy) from None
    open_weights(run)  # imports the recipe's extensions, one of which may add the solver
    try:
        how = SamplerConfig(name=sampler, steps=steps, last=last, restart=restart, clip=clip)
    except ConfigError as e:
        raise ConfigError("--sampler" if e.field == "name" else e.field, e.value, e.problem, e.remedy) from None
    open_weights(reference)
    job = SamplingJob(num=num, seed=seed, sampler=how, batch_size=batch_size)
    distance = DistanceOfImages(load_feature_space(features, feature_weights, this_device()), data, job)
    work_begins()
    typer.echo(markdown(report(run, reference, boundaries, distance, out)))
