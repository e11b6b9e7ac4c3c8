"""Images and labels from the four IDX files that MNIST and its successors consist of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msdiff_dist.data.make.datasets.labelled_image import Split, centred
from msdiff_dist.data.make.idx import read_idx
from msdiff_dist.errors import DataError


def idx_images(folder: Path, split: Split, size: int, remedy: str) -> Iterator[tuple[str, Image.Image, int]]:
    """(key, image, label) in the files' own order; padded with black, or shrunk if `size` is below the images'.

    Args:
        remedy: what to do where a file is missing.
    """
    stem = "train" if split == "train" else "t10k"
    images = _read(folder, f"{stem}-images-idx3-ubyte", 3, remedy)
    labels = _read(folder, f"{stem}-labels-idx1-ubyte", 1, remedy)
    if len(images) != len(labels):
        raise DataError(
            "--source", str(folder), f"has {len(images)} images, {len(labels)} labels", "Install or copy it again."
        )
    if len(labels) and labels.max() > 9:
        problem = f"{stem}-labels-idx1-ubyte has label {labels.max()}, and there are ten classes"
        raise DataError("--source", str(folder), problem, "Install or copy it again.")
    for i, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        image = Image.fromarray(pixels)
        if size < image.width:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        yield f"{i:05d}", centred(image, size, "black"), label


def _read(folder: Path, name: str, dimensions: int, remedy: str) -> NDArray[np.uint8]:
    """The array of an IDX file, gzipped or not, with the expected number of dimensions."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError("--source", str(folder), f"{name}[.gz] not found", remedy)
    try:
        found = read_idx(path)
        if found.ndim != dimensions:
            raise ValueError(f"{found.ndim} dimensions, not {dimensions}")
        return found
    except (OSError, ValueError) as e:
        raise DataError("--source", str(path), f"is corrupt ({e})", "Install or copy it again.") from e
