"""`msdiff sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from msdiff_dist.cli import choices
from msdiff_dist.cli.before_work import checks_first, work_begins
from msdiff_dist.cli.choices import Names


@checks_first
def sample(
    run: Annotated[Path, typer.Argument(help="Run folder, one checkpoint of it, or an export.")],
    out: Annotated[Path, typer.Option(help="Folder for the images: new, or of the same command, to resume it.")],
    num: Annotated[int, typer.Option(min=1, help="Images to make.")] = 64,
    sampler: Annotated[
        str | None,
        typer.Option(
            parser=Names(choices.solvers, checked=False),
            help="Solver. Default: the process's own: ddim, dpm_3s for vp, heun for edm.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Network evaluations an image; heun takes 2 N - 1. Default 50.")
    ] = None,
    nfe: Annotated[
        int | None, typer.Option(min=1, help="Exact number of network evaluations an image, instead of --steps.")
    ] = None,
    end: Annotated[
        float | None, typer.Option(help="Last t or sigma, of a vp or edm process. Default: t_end, sigma_min.")
    ] = None,
    last: Annotated[
        Literal["first_time", "clean"],
        typer.Option(help="Where the last step of ddim and dpmpp_2m ends: use clean for pixels, not latents."),
    ] = "first_time",
    restart: Annotated[
        bool, typer.Option(help="Let dpmpp_2m begin anew at stages where its steps grow longer, or never.")
    ] = True,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Noise of ddim's steps.")] = 0.0,
    churn: Annotated[float, typer.Option(min=0, help="Noise of heun's steps, S_churn.")] = 0.0,
    spacing: Annotated[
        Literal["leading", "trailing", "uniform", "log_snr", "rho"] | None,
        typer.Option(help="Where the steps lie. Default: leading, log_snr for a vp process, rho for edm."),
    ] = None,
    clip: Annotated[bool, typer.Option(help="Keep x0 in [-1, 1]: for pixels, not latents.")] = False,
    class_: Annotated[int | None, typer.Option("--class", help="Only this class. Default: all in turn.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text of the images; several take turns. Default: no caption.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed. An image depends on it and on its own number only.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    part: Annotated[int, typer.Option(min=0, help="Make this part of the images only.")] = 0,
    parts: Annotated[
        int, typer.Option(min=1, help="Number of parts that fill the folder; the last to end draws the grid.")
    ] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Use the last weights instead of their average.")] = False,
) -> None:
    """Make images with a run's newest checkpoint: PNG files 00000.png ... and grid.png.

    The same command on the same folder resumes: it makes the images that are missing.

    Example: msdiff sample runs/quickstart --num 100 --steps 50 --sampler ddim --last clean --out samples
    """
    from msdiff_dist.diffusion.solvers import ChurnConfig, SamplerConfig
    from msdiff_dist.errors import ConfigError
    from msdiff_dist.evaluation.sample_folder import FolderSampling
    from msdiff_dist.evaluation.sampling_job import SamplingJob
    from msdiff_dist.export.weights import open_weights
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.files.work_share import Part

    check_place("--out", out, "folder")
    if nfe is not None and steps is not None:
        raise ConfigError("--nfe", nfe, f"is given beside --steps {steps}", "Give one of the two.")
    if sampler is not None:
        open_weights(run, ema=not raw)  # imports the recipe's extensions, one of which may add the solver
    try:
        config = SamplerConfig(
            name=sampler,
            steps=steps or 50,
            eta=eta,
            spacing=spacing,
            end=end,
            last=last,
            restart=restart,
            clip=clip,
            guidance_scale=guidance,
            churn=ChurnConfig(amount=churn),
        )
    except ConfigError as e:
        raise ConfigError("--sampler" if e.field == "name" else e.field, e.value, e.problem, e.remedy) from None
    job = SamplingJob(
        num=num, seed=seed, sampler=config, class_=class_, prompts=tuple(prompt or ()), batch_size=batch_size
    )
    sampling, share = FolderSampling(run, job, not raw, nfe), Part(part, parts)
    work_begins()
    before, complete = sampling.fill(out, share)
    made = f"{num} images and grid.png in {out}" if complete else f"part {part} of {parts} is done"
    typer.echo(made + (f" ({before} were there already)" if before else ""))
