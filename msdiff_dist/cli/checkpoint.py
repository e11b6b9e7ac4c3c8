"""`msdiff checkpoint`: inspect, verify and compare checkpoints."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msdiff_dist.cli.choices import NamingCommand

if TYPE_CHECKING:
    from msdiff_dist.checkpoint.load import CheckpointReader

app = typer.Typer(help="Inspect, verify and compare checkpoints.", no_args_is_help=True)

_Any = Annotated[
    Path, typer.Argument(help="Run folder (its newest checkpoint), a checkpoint, a snapshot, or an export.")
]
_Path = Annotated[
    Path,
    typer.Argument(help="Run folder (its newest checkpoint is taken), a checkpoint, a file in one, or a snapshot."),
]
_Step = Annotated[int | None, typer.Option(help="Take the run's checkpoint of this step.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(cls=NamingCommand)
def inspect(path: _Any, step: _Step = None, as_json: _Json = False) -> None:
    """Show what a checkpoint or export holds: step, layout, parameters of encoder and decoders. Reads no weights.

    Example: msdiff checkpoint inspect runs/quickstart
    """
    from rich.console import Console
    from rich.table import Table

    from msdiff_dist.checkpoint.layout import find_checkpoint
    from msdiff_dist.checkpoint.load import CheckpointReader
    from msdiff_dist.export.weights import export_folder

    folder = export_folder(path) if step is None else None
    report = _report(CheckpointReader(find_checkpoint(path, step))) if folder is None else _export_report(folder)
    if as_json:
        typer.echo(json.dumps(report))
        return
    name, step = report["recipe"] or Path(report["path"]).name, report["step"]
    table = Table("part", "tensors", "parameters", title=name if step is None else f"{name}, step {step}")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, (tensors, parameters) in report["parts"].items():
        table.add_row(part, str(tensors), f"{parameters:,}")
    console = Console(soft_wrap=True)
    console.print(table)
    if folder is not None:
        console.print(f"export       {report['path']}", highlight=False)
        console.print(
            f"holds        {report['weights']} weights, {report['bytes'] / 1e6:.1f} MB, format {report['format']}"
        )
        return
    loss = "unknown" if report["loss"] is None else f"{report['loss']:.5f}"
    console.print(f"checkpoint   {report['path']}", highlight=False)
    console.print(f"samples seen {report['samples_seen']:,} ({report['batch_size']} a step), smoothed loss {loss}")
    console.print(
        f"written by   {report['world_size']} ranks, {report['bytes'] / 1e6:.1f} MB, format {report['format']}"
    )
    console.print(f"holds        {', '.join(report['kinds'])}")
    if origin := report["branched_from"]:
        console.print(f"branched     from {origin['run']} at step {origin['step']}", highlight=False)
    for change in report["recipe_changes"]:
        about = f"{change['field']} {change['old']!r} -> {change['new']!r}"
        console.print(f"changed      since step {change['step']}: {about}", highlight=False)


@app.command(cls=NamingCommand)
def verify(path: _Path, step: _Step = None) -> None:
    """Compare every file with its checksum, in all checkpoints and snapshots of a run or in one of them.

    Exit status 2 if one is corrupt.

    Example: msdiff checkpoint verify runs/quickstart
    """
    from msdiff_dist.checkpoint.layout import checkpoints_below, complete_checkpoints, find_checkpoint
    from msdiff_dist.checkpoint.load import CheckpointReader
    from msdiff_dist.checkpoint.power_profile import SNAPSHOTS
    from msdiff_dist.errors import CheckpointError

    errors: list[CheckpointError] = []
    every = [*checkpoints_below(path), *complete_checkpoints(path / SNAPSHOTS)] if step is None else []
    for folder in every or [find_checkpoint(path, step)]:
        try:
            reader = CheckpointReader(folder)
            reader.verify()
            typer.echo(f"{folder}  intact, {sum(f.size for f in reader.index.files) / 1e6:.1f} MB")
        except CheckpointError as e:
            typer.echo(f"{folder}  corrupt")
            errors.append(e)
    if errors:
        raise errors[0]


@app.command(cls=NamingCommand)
def diff(
    a: _Path,
    b: Annotated[Path, typer.Argument(help="The other: run folder or checkpoint.")],
    as_json: _Json = False,
) -> None:
    """Compare two checkpoints: recipe fields, architecture, and values. Exit status 1 if architecture or values differ.

    For the shared encoder and each decoder the table gives the greatest difference of any value, absolute and relative
    to the greatest value of its tensor.

    Example: msdiff checkpoint diff runs/a runs/b/checkpoints/step_00000100
    """
    from rich.console import Console
    from rich.table import Table

    from msdiff_dist.checkpoint.compare import compare
    from msdiff_dist.config import differences
    from msdiff_dist.export.weights import open_checkpoint

    first, second = open_checkpoint(a), open_checkpoint(b)
    fields = [(f"recipe.{f}", x, y) for f, x, y in differences(first.index.recipe, second.index.recipe)]
    fields += [("step", first.index.step, second.index.step)] if first.index.step != second.index.step else []
    shapes = [
        (name, first.index.shapes.get(name), second.index.shapes.get(name))
        for name in sorted({*first.index.shapes} | {*second.index.shapes})
        if first.index.shapes.get(name) != second.index.shapes.get(name)
    ]
    worst: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for d in compare(first, second):
        key = (_part(d.name), d.kind)
        worst[key] = (max(worst[key][0], d.max_abs), max(worst[key][1], d.relative))
    if as_json:
        parts = [{"part": p, "kind": k, "max_abs": x, "max_relative": r} for (p, k), (x, r) in worst.items()]
        typer.echo(json.dumps({"fields": fields, "shapes": shapes, "values": parts}))
    else:
        for name, x, y in [*fields, *shapes]:
            typer.echo(f"{name}: {x!r} | {y!r}")
        table = Table("part", "kind", "greatest difference", "relative")
        for (part, kind), (absolute, relative) in sorted(worst.items()):
            table.add_row(part, kind, f"{absolute:.3g}", f"{relative:.3g}")
        Console().print(table)
    if shapes or any(absolute for absolute, _ in worst.values()):
        raise typer.Exit(1)


def _report(reader: CheckpointReader) -> dict[str, Any]:
    from dataclasses import asdict

    from msdiff_dist.apps.train.branch import Origin
    from msdiff_dist.training.recipe_changes import read_changes

    index, run = reader.index, reader.folder.resolve().parent.parent
    origin = Origin.of(run)
    return {
        "path": str(reader.folder),
        "recipe": index.recipe["name"],
        "step": index.step,
        "batch_size": index.batch_size,
        "samples_seen": index.step * index.batch_size,
        "loss": index.loss,
        "format": index.format,
        "world_size": index.world_size,
        "bytes": sum(f.size for f in index.files),
        "kinds": reader.kinds,
        "parts": _parts(index.shapes),
        "branched_from": asdict(origin) if origin else None,
        # Those that the checkpoint's weights were trained with.
        "recipe_changes": [asdict(change) for change in read_changes(run) if change.step < index.step],
    }


def _export_report(folder: Path) -> dict[str, Any]:
    from msdiff_dist.export.description import FORMAT
    from msdiff_dist.export.weights import MODEL, ExportWeights

    weights = ExportWeights(folder)
    return {
        "path": str(folder),
        "recipe": weights.description.name,
        "step": weights.description.step,
        "weights": weights.description.weights,
        "format": FORMAT,
        "bytes": (folder / MODEL).stat().st_size,
        "parts": _parts(weights.shapes()),
    }


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Numbers of tensors and of parameters in each part of the model."""
    parts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, shape in shapes.items():
        tensors, parameters = parts[_part(name)]
        parts[_part(name)] = (tensors + 1, parameters + math.prod(shape))
    return dict(parts)


def _part(name: str) -> str:
    """`shared`, or `stages.0`: the part of the model that a parameter belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("stages.") else 1])
