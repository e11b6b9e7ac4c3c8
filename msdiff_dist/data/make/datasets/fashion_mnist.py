"""Fashion-MNIST, from the IDX files that a Debian package installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msdiff_dist.data.make.datasets.idx_folder import idx_images
from msdiff_dist.data.make.datasets.labelled_image import Dataset, LabelledImage, Split
from msdiff_dist.data.make.shard_writer import DatasetInfo

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def fashion_mnist(source: Path | None, split: Split, size: int) -> Iterator[LabelledImage]:
    """28x28 clothes from the four IDX files, in their own order; padded, or shrunk if `size` is below 28."""
    remedy = "Install it (`apt-get install dataset-fashion-mnist`) or give its folder with --source."
    for key, image, label in idx_images(source or FASHION_FOLDER, split, size, remedy):
        caption = FASHION_CLASSES[label].lower().replace("t-shirt", "T-shirt")
        yield LabelledImage(key=key, image=image, caption=caption, label=label)


FASHION_MNIST = Dataset(
    DatasetInfo(name="fashion-mnist", licence="MIT", origin="Zalando Research: Fashion-MNIST", classes=FASHION_CLASSES),
    32,
    fashion_mnist,
)
