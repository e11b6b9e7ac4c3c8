"""Data sets that need no download, a module each."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.data.make.datasets.digits import DIGITS
from msdiff_dist.data.make.datasets.emoji import EMOJI
from msdiff_dist.data.make.datasets.fashion_mnist import FASHION_MNIST
from msdiff_dist.data.make.datasets.picture import Dataset, Picture, Split
from msdiff_dist.data.make.shard_writer import WrittenDataset, check_output, even_sizes, write_dataset
from msdiff_dist.registry import Table

__all__ = ["DATASETS", "Dataset", "Picture", "Split", "prepare"]

DATASETS: Table[Dataset] = Table("data set", {"digits": DIGITS, "fashion-mnist": FASHION_MNIST, "emoji": EMOJI})


def prepare(
    name: str, out: Path, source: Path | None = None, split: Split = "train", shards: int = 24, size: int | None = None
) -> WrittenDataset:
    """Write a known data set as shards.

    Raises:
        DataError: the source is missing or damaged, or `out` is in use.
    """
    known = DATASETS.choose("DATASET", name)
    check_output(out)
    pictures = list(known.pictures(source, split, size or known.size))
    samples = ((picture.key, picture.fields()) for picture in pictures)
    return write_dataset(out, known.info, samples, even_sizes(len(pictures), shards))
