"""`msdiff evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from msdiff_dist.cli import choices
from msdiff_dist.cli.choices import Names

if TYPE_CHECKING:
    from msdiff_dist.apps.evaluation.evaluate import Evaluation


def evaluate(
    subject: Annotated[Path, typer.Argument(help="Run, checkpoint, export, or folder of images.")],
    metrics: Annotated[
        str, typer.Option(help="Metrics, joined by commas: fid, kid, prdc, is, mind, clip, loss.")
    ] = "fid,kid",
    features: Annotated[
        str,
        typer.Option(help="Feature space: mobilenet, efficientnet, inception, dinov2, clip, or a classifier's file."),
    ] = "mobilenet",
    feature_weights: Annotated[Path | None, typer.Option(help="File of the weights of the feature space.")] = None,
    clip_model: Annotated[str, typer.Option(help="open_clip model of --features clip.")] = "ViT-L-14",
    reference: Annotated[
        str | None,
        typer.Option(
            help="Shards, folder of images, or .npz file to compare with. Default: the run's training images."
        ),
    ] = None,
    num: Annotated[int, typer.Option(min=2, max=10**7, help="Images to sample.")] = 10_000,
    sampler: Annotated[
        str | None,
        typer.Option(parser=Names(choices.solvers, checked=False), help="Solver. Default: the process's own."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the solver.")] = 50,
    last: Annotated[
        Literal["first_time", "clean"],
        typer.Option(help="Where the last step of ddim and dpmpp_2m ends: use clean for pixels, not latents."),
    ] = "first_time",
    restart: Annotated[
        bool, typer.Option(help="Let dpmpp_2m begin anew at stages where its steps grow longer, or never.")
    ] = True,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Noise of ddim's steps.")] = 0.0,
    clip_x0: Annotated[bool, typer.Option("--clip", help="Keep x0 in [-1, 1]: for pixels, not latents.")] = False,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images sampled at once.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Use the last weights instead of their average.")] = False,
    samples: Annotated[
        Path | None, typer.Option(help="Folder for the images. Default: one under the run's `evaluations`.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, max=1024, help="Processes that sample, on this machine.")] = 1,
    part: Annotated[int, typer.Option(min=0, help="Sample this part of the images only.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Number of parts; the last to end computes the scores.")] = 1,
    held_out: Annotated[
        str | None, typer.Option(help="Shards for the metric loss. Default: what the run held out (`validation`).")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Evaluate each new checkpoint of a run that is trained, to its last step.")
    ] = False,
    write_statistics: Annotated[
        Path | None, typer.Option(help="Write the reference's mu and sigma to this .npz file, as EDM and ADM read it.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the evaluation to this file as JSON.")] = None,
) -> None:
    """Score a model's images, or a folder's, against reference images in a named feature space.

    The same command resumes: images that are there are not sampled again, and features of the reference are kept. The
    result is added to the run's evaluations.jsonl; `msdiff compare` shows those of several runs.

    With --follow it waits for the checkpoints of a run that is being trained, and keeps each until it is evaluated.

    Example: msdiff evaluate runs/quickstart --metrics fid,kid --num 1000 --last clean
    """
    from msdiff_dist.apps.evaluation.evaluate import EvaluationRequest
    from msdiff_dist.apps.evaluation.evaluate import evaluate as evaluate_subject
    from msdiff_dist.apps.evaluation.follow import follow as follow_run
    from msdiff_dist.diffusion.solvers import SamplerConfig
    from msdiff_dist.evaluation.sampling_job import SamplingJob
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.files.work_share import Part

    for option, file in (("--json", json_file), ("--write-statistics", write_statistics)):
        if file is not None:
            check_place(option, file, "file")
    if samples is not None:
        check_place("--samples", samples, "folder")
    config = SamplerConfig(
        name=sampler, steps=steps, last=last, restart=restart, eta=eta, clip=clip_x0, guidance_scale=guidance
    )
    request = EvaluationRequest(
        subject=subject,
        job=SamplingJob(num=num, seed=seed, sampler=config, batch_size=batch_size),
        metrics=tuple(name.strip() for name in metrics.split(",")),
        features=features,
        feature_weights=feature_weights,
        clip_model=clip_model,
        reference=reference,
        ema=not raw,
        samples=samples,
        nproc=nproc,
        part=Part(part, parts),
        held_out=held_out,
        statistics=write_statistics,
    )
    if follow:
        follow_run(request, lambda found: _show(found, json_file), lambda line: typer.echo(line, err=True))
        return
    found = evaluate_subject(request)
    if found is None:
        typer.echo(f"part {part} of {parts} is done")
        return
    _show(found, json_file)


def _show(found: Evaluation, json_file: Path | None) -> None:
    from msdiff_dist.files.atomic import WriteError, atomic_write, writing

    if "step" in found.record:
        typer.echo(f"step {found.record['step']}")
    table = Table("metric", "value", "95 % interval")
    for name, score in found.scores.items():
        table.add_row(name, f"{score.value:.5g}", f"{score.low:.5g} to {score.high:.5g}")
    Console().print(table)
    if about := found.record.get("features"):
        typer.echo(f"{found.record['num']} images, features {about['name']} ({about['digest']})")
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    if found.file is not None:
        typer.echo(f"added to {found.file}")
    if json_file is not None:
        with writing("--json", json_file, WriteError):
            atomic_write(json_file, json.dumps(found.record, indent=1) + "\n")
