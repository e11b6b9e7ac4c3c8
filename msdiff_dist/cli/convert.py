"""`msdiff convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from msdiff_dist.cli import choices
from msdiff_dist.cli.choices import Names

READABLE = Names(choices.readable)


class Weights(StrEnum):
    """Which weights to take from a file that has averaged ones too."""

    auto = "auto"
    ema = "ema"
    raw = "raw"


class Prediction(StrEnum):
    """What a network predicts."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


def convert(
    src: Annotated[
        list[Path],
        typer.Argument(
            help="File or folder to convert; or several, which become the stages of one model, stage 0 (nearest the "
            "data, small timesteps) first."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="New folder, or file for LDM's formats (.safetensors or .ckpt).")],
    from_format: Annotated[str, typer.Option("--from", parser=READABLE, help="Format of SRC.")],
    to_format: Annotated[str, typer.Option("--to", parser=Names(choices.writable), help="Format of DST.")],
    weights: Annotated[Weights, typer.Option(help="Averaged or last weights; auto: averaged if there are any.")] = (
        Weights.auto
    ),
    key: Annotated[
        str | None, typer.Option(help="Place of the network in a file that holds several, as state_dict.ema.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="LDM's YAML, which is preferred to assumptions and compared with the tensors.")
    ] = None,
    stage: Annotated[int | None, typer.Option(help="Convert this stage only, as a unified model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Number of attention heads, which no tensor shows.")] = None,
    head_channels: Annotated[int | None, typer.Option(help="Channels of each head, instead of --heads.")] = None,
    norm_groups: Annotated[
        int | None, typer.Option(help="Largest number of groups of a norm, for EDM and score_sde.")
    ] = None,
    boundaries: Annotated[
        str | None, typer.Option(help="Inner stage boundaries in the process's own time, as 442,631.")
    ] = None,
    prediction: Annotated[Prediction | None, typer.Option(help="What the network predicts.")] = None,
    scale_factor: Annotated[float | None, typer.Option(help="Factor on latents.")] = None,
    no_null_class: Annotated[
        bool, typer.Option("--no-null-class", help="The other format's class embedding has no row for dropped classes.")
    ] = False,
    no_model_ema: Annotated[
        bool, typer.Option("--no-model-ema", help="Write LDM's file without the second copy that its samplers read.")
    ] = False,
) -> None:
    """Convert weights between formats without rounding, with a report of every key: conversion_report.json.

    The report is written to the new folder, or beside the new file. Several sources are unified models, which keep
    their whole networks as the stages of one model.

    Example: msdiff convert model.ckpt exported --from ldm --to msdiff

    Example: msdiff convert low_noise high_noise experts --boundaries 875 --from diffusers --to msdiff
    """
    from msdiff_dist.convert.conversion import convert as run
    from msdiff_dist.convert.options import ConvertOptions, parse_boundaries
    from msdiff_dist.files.atomic import check_place

    check_place("DST", dst, "new")
    options = ConvertOptions(
        weights=weights.value,
        config=config,
        stage=stage,
        num_heads=heads,
        head_channels=head_channels,
        norm_groups=norm_groups,
        boundaries=parse_boundaries(boundaries),
        prediction_type=None if prediction is None else prediction.value,
        scale_factor=scale_factor,
        null_class=not no_null_class,
        key=key,
        model_ema=not no_model_ema,
    )
    report = run(src[0] if len(src) == 1 else src, dst, from_format, to_format, options)
    left_out = sum("left_out" in entry for entry in report["keys"].values())
    typer.echo(
        f"{len(report['keys']) - left_out} tensors in {dst}; {left_out} skipped, each with its reason in the report"
    )
    for line in [*report["assumed"], *report["remarks"]]:
        typer.echo(f"note: {line}", err=True)
