"""`msdiff data`: make shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from msdiff_dist.data.shard_writer import WrittenDataset

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Make WebDataset shards to train from.")


@app.command()
def prepare(
    dataset: Annotated[Literal["digits", "fashion-mnist", "emoji"], typer.Argument(help="Which data set.")],
    out: Annotated[Path, typer.Option(help="New or empty folder for the shards.")],
    source: Annotated[
        Path | None, typer.Option(help="Folder of IDX files, or font file, if not in Debian's place.")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 24,
    size: Annotated[int | None, typer.Option(min=8, help="Pixels a side. Default: 16, 32, 64.")] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="Which part of the data set.")] = "train",
) -> None:
    """Write a small real data set as shards, without the network.

    [bold]Example:[/bold] msdiff data prepare fashion-mnist --out data/fashion-mnist
    """
    from msdiff_dist.data.sources import prepare as prepare_dataset

    written = prepare_dataset(dataset, out, source, split, shards, size)
    _report(written)


@app.command()
def pack(
    images_dir: Annotated[Path, typer.Argument(help="Folder of pictures: class sub-folders, or .txt captions beside.")],
    out: Annotated[Path, typer.Option(help="New or empty folder for the shards.")],
    size: Annotated[int | None, typer.Option(min=8, help="Crop to the centre and resize to this many pixels.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1000,
    max_bad: Annotated[int, typer.Option(min=0, help="Unusable pictures to leave out before giving up.")] = 10,
) -> None:
    """Write your own pictures as shards.

    [bold]Example:[/bold] msdiff data pack photos --out data/photos --size 256
    """
    from msdiff_dist.data.folder import pack as pack_folder

    packed = pack_folder(images_dir, out, size, samples_per_shard, max_bad)
    _report(packed.dataset)
    if packed.left_out:
        console = Console(stderr=True)
        console.print(f"[yellow]left out {len(packed.left_out)} unusable pictures:[/yellow]")
        for path, reason in packed.left_out:
            console.print(f"  {path}: {reason}", markup=False, highlight=False)


def _report(written: WrittenDataset) -> None:
    table = Table(show_header=False, title=f"{written.info.name}", title_justify="left")
    table.add_row("samples", f"{written.samples:,}")
    table.add_row("shards", f"{written.shards} ({written.bytes / 1e6:.1f} MB)")
    if written.info.classes:
        named = [f"{written.info.classes[label]} {n:,}" for label, n in written.class_counts.items()]
        rest = f", and {len(named) - 12} more" if len(named) > 12 else ""
        table.add_row("classes", ", ".join(named[:12]) + rest)
    table.add_row("licence", written.info.licence)
    table.add_row("origin", written.info.origin)
    table.add_row("folder", str(written.out))
    Console().print(table)
