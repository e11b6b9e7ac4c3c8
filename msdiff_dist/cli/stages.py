"""`msdiff stages`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from msdiff_dist.cli import choices
from msdiff_dist.cli.before_work import checks_first, work_begins
from msdiff_dist.cli.choices import Names, NamingCommand

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Divide time into stages.")


@app.command(cls=NamingCommand)
@checks_first
def cluster(
    fields: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the process, such as beta_max=10.")
    ] = None,
    method: Annotated[
        Literal["timestep", "snr", "gradient", "optimal-denoiser"], typer.Option(help="By what times are compared.")
    ] = "optimal-denoiser",
    process: Annotated[
        str | None,
        typer.Option(
            parser=Names(choices.processes, checked=False), help="Diffusion process. Default: vp, or the recipe's."
        ),
    ] = None,
    stages: Annotated[int, typer.Option(min=1, help="Number of stages.")] = 3,
    data: Annotated[str | None, typer.Option(help="Shards of images or latents: folder, braces or glob.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images, or IDX file, instead of --data.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder whose gradients are compared.")] = None,
    value_range: Annotated[Literal["01", "11"], typer.Option(help="Range of pixels, [0, 1] or [-1, 1].")] = "01",
    eta: Annotated[float, typer.Option(help="Largest difference at which entries count as alike.")] = 2 / 256,
    alpha: Annotated[
        float, typer.Option(help="Mean similarity that the first and the last of three stages must keep.")
    ] = 0.9,
    samples: Annotated[int, typer.Option(help="Noisy samples to denoise.")] = 2000,
    last_limit: Annotated[
        Literal["at-1", "at-t"],
        typer.Option(
            help="Where eps*_1 is taken: at x_t, as in the paper's scripts, which gave its boundaries; or at x_1, as "
            "in its text (Eq. 5), which puts the last boundary later."
        ),
    ] = "at-t",
    min_length: Annotated[
        float, typer.Option(help="Least length of a stage, as a fraction of time. The paper's scripts: 1/(2 K).")
    ] = 0.0,
    max_length: Annotated[
        float, typer.Option(help="Greatest length of a stage, as a fraction of time. The paper's scripts: 3/(2 K).")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the drawn samples, noises and times.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the similarity curves or matrix, as .png or .pdf.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the boundaries into this recipe.")] = None,
) -> None:
    """Find stage boundaries by timestep, signal-to-noise ratio, gradients, or the data's optimal denoiser.

    Example: msdiff stages cluster --method optimal-denoiser --process vp --stages 3 --data data/fashion-mnist --json
    """
    from msdiff_dist.apps.divide_stages import ClusterRequest, check_request
    from msdiff_dist.apps.divide_stages import cluster as find_boundaries
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.stage_division.intervals import Lengths
    from msdiff_dist.stage_division.methods import DenoiserOptions

    for option, file in (("--plot", plot), ("--write", write)):
        if file is not None:
            check_place(option, file, "file")
    options = DenoiserOptions(
        eta=eta, alpha=alpha, samples=samples, value_range=value_range, last_limit=last_limit, seed=seed
    )
    command = "msdiff " + shlex.join(sys.argv[1:])
    request = ClusterRequest(
        method=method,
        stages=stages,
        process=process,
        fields=fields or [],
        data=data,
        images=images,
        run=run,
        options=options,
        lengths=Lengths(min=min_length, max=max_length),
        plot=plot,
        write=write,
        command=command,
    )
    check_request(request)
    work_begins()
    division = find_boundaries(request)
    if division is None:
        return
    unit = division.process.unit
    if as_json:
        found = {
            "method": method,
            "process": division.process_name,
            "stages": stages,
            "unit": unit,
            "boundaries": division.boundaries,
        }
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{method}, {stages} stages: {unit} = {division.boundaries}")
    if division.found_by:
        typer.echo(f"({division.found_by})")


@app.command(cls=NamingCommand)
@checks_first
def design(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML to start from; its stages are replaced.")],
    budget: Annotated[float, typer.Option(help="Training compute of the run to come, in PFLOP.")],
    out: Annotated[Path, typer.Option(help="New recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key=value.")] = None,
    probes: Annotated[Path | None, typer.Option(help="Folder of the probe runs. Default: OUT without .yaml.")] = None,
    probe_share: Annotated[float, typer.Option(help="Compute of all probes, as a share of the budget.")] = 0.05,
    max_stages: Annotated[int, typer.Option(min=1, max=10, help="Most stages to consider; three are the paper's.")] = 3,
    equal_decoders: Annotated[
        bool, typer.Option("--equal-decoders", help="All decoders as wide as the encoder: two probes, not five.")
    ] = False,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks of the run to come.")] = 1,
    nproc: Annotated[int, typer.Option(min=1, max=1024, help="Ranks of a probe, on this machine.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot that explains the choice, as .png, .pdf or .svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Choose number, boundaries, decoder widths and shares of stages for a compute budget, by measuring.

    Five short runs measure how the held-out loss of each noise interval falls with samples, width, depth and a decoder
    of its own. The same command goes on where it was stopped.

    Example: msdiff stages design fashion_mnist_3stage.yaml --budget 2 --world-size 4 --out designed.yaml --plot why.png
    """
    from msdiff_dist.apps.design.run import DesignRequest, check_design, markdown
    from msdiff_dist.apps.design.run import design as find_design
    from msdiff_dist.apps.design.run import plot as draw
    from msdiff_dist.apps.divide_stages import check_plot
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.recipe import load_recipe

    for option, file in (("--out", out), ("--plot", plot)):
        if file is not None:
            check_place(option, file, "file")
    check_plot(plot)
    request = DesignRequest(
        recipe=load_recipe(recipe, overrides or []),
        source=str(recipe),
        petaflops=budget,
        probe_share=probe_share,
        most_stages=max_stages,
        equal_decoders=equal_decoders,
        world_size=world_size,
        nproc=nproc,
        out=out,
        probes=probes or out.with_suffix(""),
    )
    planned = check_design(request)
    work_begins()
    found = find_design(request, planned)
    if plot is not None:
        draw(found, plot)
    typer.echo(json.dumps(found.fields() | {"recipe": str(out)}) if as_json else markdown(found))
