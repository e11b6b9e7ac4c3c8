"""Data sets that `msdiff data prepare` knows."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.data.make.datasets.digits import digits
from msdiff_dist.data.make.datasets.emoji import EMOJI_FONT, emoji
from msdiff_dist.data.make.datasets.fashion_mnist import FASHION_CLASSES
from msdiff_dist.errors import DataError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion(folder, n=20, packed=True):
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
    for stem in ("train", "t10k"):
        for name, array in ((f"{stem}-images-idx3-ubyte", pixels), (f"{stem}-labels-idx1-ubyte", labels)):
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return pixels, labels


def read_all(out, size, channels, classes, n):
    config = DataConfig(
        shards=str(out), image_size=size, channels=channels, num_classes=classes, captions=True, lanes=1, shuffle=0
    )
    return next(StepLoader(config, 0, n))


def test_digits_are_enlarged_and_centred(tmp_path):
    written = prepare("digits", tmp_path / "out", shards=4)
    assert (written.samples, written.shards, set(written.class_counts)) == (1618, 4, set(range(10)))
    step = read_all(tmp_path / "out", 16, 1, 10, 1618)
    images = step.x_nCHW[:, 0]
    assert (images.amax(dim=(1, 2)) > 240).float().mean() > 0.95
    border = images.clone()
    border[:, 2:14, 2:14] = 0
    assert border.max() == 0
    assert step.captions == [f"a handwritten digit {label}" for label in step.label_n.tolist()]


def test_splits_are_disjoint_and_together_everything():
    train, test = ({p.key for p in digits(None, split, 16)} for split in ("train", "test"))
    assert (len(train), len(test), len(train | test)) == (1618, 179, 1797)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_padded_and_nothing_else(tmp_path, packed):
    pixels, labels = write_fashion(tmp_path / "idx", packed=packed)
    prepare("fashion-mnist", tmp_path / "out", tmp_path / "idx", shards=3)
    step = read_all(tmp_path / "out", 32, 1, 10, 20)
    at = [int(key) for key in step.keys]
    assert sorted(at) == list(range(20))
    assert (step.x_nCHW[:, 0, 2:30, 2:30].numpy() == pixels[at]).all()
    assert step.x_nCHW.sum() == pixels.sum()
    assert step.label_n.tolist() == labels[at].tolist()
    assert step.captions[at.index(0)] == "T-shirt/top"
    assert step.captions[at.index(9)] == "ankle boot"


def test_fashion_mnist_can_be_shrunk(tmp_path):
    write_fashion(tmp_path / "idx")
    prepare("fashion-mnist", tmp_path / "out", tmp_path / "idx", split="test", shards=1, size=14)
    assert read_all(tmp_path / "out", 14, 1, len(FASHION_CLASSES), 5).x_nCHW.shape == (5, 1, 14, 14)


@pytest.mark.skipif(not EMOJI_FONT.is_file(), reason="fonts-noto-color-emoji is not installed")
def test_emoji_are_coloured_on_white_and_named(tmp_path):
    images = {p.caption: np.asarray(p.image) for p in [*emoji(None, "train", 64), *emoji(None, "test", 64)]}
    assert len(images) > 1300
    apple = images["red apple"].astype(int)
    assert apple.shape == (64, 64, 3)
    assert (apple[:2] > 250).all()
    assert apple[32, 32, 0] > apple[32, 32, 1] + 80
    assert all(image.std() > 5 for image in images.values())


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("fashion-mnist", "nowhere", ["--source", "nowhere", "train-images-idx3-ubyte", "dataset-fashion-mnist"]),
        ("emoji", "nowhere.ttf", ["--source", "nowhere.ttf", "fonts-noto-color-emoji"]),
        ("digits", "nowhere", ["--source", "scikit-learn"]),
    ],
)
def test_a_missing_source_names_path_and_remedy(tmp_path, name, source, words):
    with pytest.raises(DataError) as caught:
        prepare(name, tmp_path / "out", tmp_path / source)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "corruption", [b"", b"short", gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde", mtime=0), gzip.compress(b"xx", mtime=0)]
)
def test_corrupt_idx_files_are_named(tmp_path, corruption):
    write_fashion(tmp_path / "idx")
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").write_bytes(corruption)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz.*corrupt"):
        prepare("fashion-mnist", tmp_path / "out", tmp_path / "idx")


def test_a_file_that_is_not_the_font_is_named(tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"x\.ttf.*is not Noto Color Emoji"):
        prepare("emoji", tmp_path / "out", tmp_path / "x.ttf")


def test_every_sample_has_its_json(tmp_path):
    write_fashion(tmp_path / "idx", n=3)
    prepare("fashion-mnist", tmp_path / "out", tmp_path / "idx", shards=1)
    from msdiff_dist.data.tar_members import samples

    about = [json.loads(s["json"]) for s in samples(str(tmp_path / "out" / "00000.tar"))]
    assert about[1] == {"key": "00001", "caption": "trouser", "width": 32, "height": 32, "label": 1}
