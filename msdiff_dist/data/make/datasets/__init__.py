"""`msdiff data prepare`: data sets that need no download, one module each."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.bounds import check_between
from msdiff_dist.data.image_files import MOST_PIXELS_A_SIDE
from msdiff_dist.data.make.datasets.digits import DIGITS
from msdiff_dist.data.make.datasets.emoji import EMOJI
from msdiff_dist.data.make.datasets.fashion_mnist import FASHION_MNIST
from msdiff_dist.data.make.datasets.labelled_image import Dataset, LabelledImage, Split
from msdiff_dist.data.make.shard_writer import WrittenDataset, check_output, even_sizes, write_dataset
from msdiff_dist.registry import Table
from msdiff_dist.terminal import track

__all__ = ["DATASETS", "Dataset", "LabelledImage", "Split", "prepare"]

DATASETS: Table[Dataset] = Table("data set", {"digits": DIGITS, "fashion-mnist": FASHION_MNIST, "emoji": EMOJI})


def prepare(
    name: str, out: Path, source: Path | None = None, split: Split = "train", shards: int = 24, size: int | None = None
) -> WrittenDataset:
    """Write the data set `name` of `DATASETS` as shards.

    Args:
        source: file or folder that holds the data; None for the usual place.
        size: height and width in pixels; None for the data set's own.

    Raises:
        ConfigError: there is no data set of that name.
        DataError: the source is missing or corrupt, or `out` is in use.
    """
    known = DATASETS.choose("DATASET", name)
    check_between("--size", size, 8, MOST_PIXELS_A_SIDE)
    check_between("--shards", shards, 1, 10**6)
    check_output(out)
    images = list(track(known.images(source, split, size or known.size), "reading", "images"))
    samples = ((image.key, image.fields()) for image in track(images, "writing", "images"))
    return write_dataset(out, known.info, samples, even_sizes(len(images), shards))
