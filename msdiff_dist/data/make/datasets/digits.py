"""scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from msdiff_dist.data.make.datasets.labelled_image import Dataset, LabelledImage, Split, centred, tenth_apart
from msdiff_dist.data.make.shard_writer import DatasetInfo
from msdiff_dist.errors import DataError


def digits(source: Path | None, split: Split, size: int) -> Iterator[LabelledImage]:
    """8x8 handwritten digits, enlarged to three quarters of the image. A fixed tenth of them is the test split."""
    from sklearn.datasets import load_digits

    if source is not None:
        raise DataError("--source", str(source), "has no meaning for digits: they come with scikit-learn", "Remove it.")
    data = load_digits()
    # Pixels are counts from 0 to 16.
    for i in tenth_apart(len(data.target), split):
        small = Image.fromarray((data.images[i] * (255 / 16)).round().astype(np.uint8))
        inner = max(size * 3 // 4, 1)
        label = int(data.target[i])
        image = centred(small.resize((inner, inner), Image.Resampling.BICUBIC), size, "black")
        yield LabelledImage(key=f"{i:05d}", image=image, caption=f"a handwritten digit {label}", label=label)


DIGITS = Dataset(
    DatasetInfo(
        name="digits",
        licence="CC BY 4.0",
        origin="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, in scikit-learn",
        classes=tuple("0123456789"),
    ),
    16,
    digits,
)
