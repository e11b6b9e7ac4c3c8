"""What `msdiff data check --recipe` finds: samples on which training would stop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.check import check_folder, check_for_training
from msdiff_dist.data.make.shard_writer import write_index, write_shard
from msdiff_dist.errors import DataError


def png(size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(stream, "png")
    return stream.getvalue()


def shards(folder: Path, odd: dict[str, bytes]) -> Path:
    """Eight samples with image, class and caption, the sixth of which has the fields `odd` instead."""
    whole = {"png": png(), "cls": b"1", "txt": b"a cat"}
    samples = [(f"{i}", odd if i == 5 else whole) for i in range(8)]
    folder.mkdir()
    write_index(folder, "test", {"0.tar": write_shard(folder / "0.tar", samples)})
    return folder


CONFIG = DataConfig(shards="elsewhere", image_size=8, num_classes=3, captions=True)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"cls": b"1", "txt": b"x"}, "field 'png' of sample '5' is missing"),
        ({"png": png(), "txt": b"x"}, "field 'cls' of sample '5' is missing"),
        ({"png": png(), "cls": b"1"}, "field 'txt' of sample '5' is missing"),
        ({"png": png(), "cls": b"cat", "txt": b"x"}, "sample '5'.*class 'cat'"),
        ({"png": png(), "cls": b"1.5", "txt": b"x"}, "sample '5'.*class '1.5'"),
        ({"png": png(), "cls": b"3", "txt": b"x"}, "sample '5'.*class '3'"),
        ({"png": png(9), "cls": b"1", "txt": b"x"}, "sample '5'.*9x9 pixels"),
        ({"png": png()[:40], "cls": b"1", "txt": b"x"}, "sample '5'.*not a readable image"),
    ],
)
def test_a_sample_that_training_would_refuse_is_found(odd: dict[str, bytes], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{words}.*training would refuse 1 of 8 samples"):
        check_for_training(shards(tmp_path / "data", odd), CONFIG)


def test_samples_that_training_takes(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", {"png": png(), "cls": b"2", "txt": b""})
    assert check_folder(folder) == 8
    assert check_for_training(folder, CONFIG) == ["1 of 8 captions are empty"]
    assert check_for_training(folder, DataConfig(shards="elsewhere", image_size=8)) == []
