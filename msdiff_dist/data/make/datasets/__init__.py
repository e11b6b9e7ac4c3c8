"""`msdiff data prepare`: data sets from packages, one module each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from msdiff_dist.bounds import check_between
from msdiff_dist.data.image_files import MOST_PIXELS_A_SIDE
from msdiff_dist.data.make.datasets.class_folders import CLIPART, STAMPS
from msdiff_dist.data.make.datasets.digits import DIGITS
from msdiff_dist.data.make.datasets.emoji import EMOJI
from msdiff_dist.data.make.datasets.fashion_mnist import FASHION_MNIST
from msdiff_dist.data.make.datasets.icons import ICONS
from msdiff_dist.data.make.datasets.labelled_image import Collection, Dataset, LabelledImage, Split
from msdiff_dist.data.make.datasets.mnist import MNIST
from msdiff_dist.data.make.datasets.openmoji import OPENMOJI
from msdiff_dist.data.make.shard_writer import WrittenDataset, check_output, even_sizes, write_dataset
from msdiff_dist.errors import ConfigError
from msdiff_dist.registry import Table
from msdiff_dist.terminal import track

__all__ = ["DATASETS", "Collection", "Dataset", "LabelledImage", "Split", "prepare"]

DATASETS: Table[Dataset] = Table(
    "data set",
    {
        "digits": DIGITS,
        "mnist": MNIST,
        "fashion-mnist": FASHION_MNIST,
        "emoji": EMOJI,
        "openmoji": OPENMOJI,
        "icons": ICONS,
        "clipart": CLIPART,
        "stamps": STAMPS,
    },
)


def prepare(
    name: str,
    out: Path,
    source: Path | None = None,
    split: Split = "train",
    shards: int = 24,
    size: int | None = None,
    **options: Any,
) -> WrittenDataset:
    """Write the data set `name` of `DATASETS` as shards.

    Args:
        source: file or folder that holds the data; None for the usual place.
        size: height and width in pixels; None for the data set's own.
        options: those of `Dataset.options`; None is not given.

    Raises:
        ConfigError: there is no data set of that name, or it has no such option.
        DataError: the source is missing or corrupt, or `out` is in use.
    """
    known = DATASETS.choose("DATASET", name)
    check_between("--size", size, 8, MOST_PIXELS_A_SIDE)
    check_between("--shards", shards, 1, 10**6)
    given = {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - set(known.options):
        raise ConfigError(f"--{option}", given[option], f"has no meaning for {name}", "Remove it.")
    check_output(out)
    collection = known.collect(source, split, size, given)
    # As PNG files they are a fraction of the pixels, and their number, which the shards share, is known only then.
    samples = [(image.key, image.fields()) for image in track(collection.images, "drawing", "images", collection.most)]
    written = write_dataset(out, collection.info, track(samples, "writing", "images"), even_sizes(len(samples), shards))
    return replace(written, left_out=tuple(collection.left_out))
