"""Fashion-MNIST, from the IDX files that a Debian package installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msdiff_dist.data.make.datasets.labelled_image import Dataset, LabelledImage, Split, centred
from msdiff_dist.data.make.idx import read_idx
from msdiff_dist.data.make.shard_writer import DatasetInfo
from msdiff_dist.errors import DataError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def fashion_mnist(source: Path | None, split: Split, size: int) -> Iterator[LabelledImage]:
    """28x28 clothes from the four IDX files, in their own order; padded, or shrunk if `size` is below 28."""
    folder = source or FASHION_FOLDER
    stem = "train" if split == "train" else "t10k"
    images = _read_fashion(folder, f"{stem}-images-idx3-ubyte", dimensions=3)
    labels = _read_fashion(folder, f"{stem}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise DataError(
            "--source", str(folder), f"has {len(images)} images, {len(labels)} labels", "Install or copy it again."
        )
    for i, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        image = Image.fromarray(pixels)
        if size < image.width:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        caption = FASHION_CLASSES[label].lower().replace("t-shirt", "T-shirt")
        yield LabelledImage(key=f"{i:05d}", image=centred(image, size, "black"), caption=caption, label=label)


def _read_fashion(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """The array of an IDX file, gzipped or not, with the expected number of dimensions."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        remedy = "Install it (`apt-get install dataset-fashion-mnist`) or give its folder with --source."
        raise DataError("--source", str(folder), f"{name}[.gz] not found", remedy)
    try:
        found = read_idx(path)
        if found.ndim != dimensions:
            raise ValueError(f"{found.ndim} dimensions, not {dimensions}")
        return found
    except (OSError, ValueError) as e:
        raise DataError("--source", str(path), f"is corrupt ({e})", "Install or copy it again.") from e


FASHION_MNIST = Dataset(
    DatasetInfo(name="fashion-mnist", licence="MIT", origin="Zalando Research: Fashion-MNIST", classes=FASHION_CLASSES),
    32,
    fashion_mnist,
)
