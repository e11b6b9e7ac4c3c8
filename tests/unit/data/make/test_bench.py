"""Readers that `msdiff data bench` compares."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.latent_blocks import BLOCK_FIELD, pack_block
from msdiff_dist.data.loader import StepLoader, load_index
from msdiff_dist.data.make.bench import _endless, _readers, bench
from msdiff_dist.data.make.shard_writer import encode_image, write_shard
from msdiff_dist.errors import DataError


def write(folder, kind):
    """Two shards of six samples, each of one value; returns the configuration."""
    for shard in range(2):
        values = [10 * (6 * shard + i) for i in range(6)]
        if kind == "image":
            images = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in values]
            content = [(str(value), {"png": encode_image(image)}) for value, image in zip(values, images, strict=True)]
        else:
            latents = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).half()
            content = [("0", {BLOCK_FIELD: pack_block([str(v) for v in values], {"latent.npy": latents})})]
        write_shard(folder / f"{shard}.tar", content)
    shape = {"image_size": 4, "channels": 1} if kind == "image" else {"latent_shape": (1, 4, 4)}
    return DataConfig(shards=str(folder), kind=kind, lanes=2, shuffle=4, **shape)


@pytest.mark.parametrize("kind", ["image", "latent"])
def test_every_reader_reads_the_same_samples(tmp_path, kind):
    config = write(tmp_path, kind)
    index = load_index(config)
    with ExitStack() as stack:
        readers = _readers(config, 12, index, index[0], stack)
        assert {"msdiff", "torch DataLoader", "torch DataLoader, shuffled", "webdataset"} <= set(readers)
        for start in readers.values():
            for batch in itertools.islice(start(), 2):
                x = getattr(batch, "x_nCHW", batch)
                assert x.shape == (12, 1, 4, 4)
                assert sorted(x[:, 0, 0, 0].int().tolist()) == list(range(0, 120, 10))


def test_speeds_are_of_one_worker(tmp_path):
    speeds = bench(write(tmp_path, "latent"), batch_size=4, seconds=0.1)
    assert [speed.reader for speed in speeds][:2] == ["msdiff", "torch DataLoader"]
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar")) / 12
    for speed in speeds:
        assert speed.samples > 0
        assert speed.megabytes == pytest.approx(speed.samples * size / 1e6)
    assert next(StepLoader(write(tmp_path, "latent"), 0, 4)).x_nCHW.dtype == torch.float16
    with pytest.raises(DataError, match="no shards to read"):
        bench(DataConfig(kind="synthetic", latent_shape=(1, 4, 4)), 4, 0.1)


def test_a_reader_that_gives_nothing_ends_the_measurement():
    assert list(itertools.islice(_endless([torch.ones(1), torch.zeros(1)]), 5)) == [1, 0, 1, 0, 1]
    with pytest.raises(DataError, match="no sample"):
        next(_endless([]))
