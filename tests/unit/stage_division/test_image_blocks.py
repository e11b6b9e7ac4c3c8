"""A data set is the same whether it is shards, a folder of images or an IDX file."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.data.make.shard_writer import encode_image, write_shard
from msdiff_dist.errors import DataError
from msdiff_dist.stage_division.image_blocks import DataBlocks, image_sources, shard_sources


def random_images(n: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side), dtype=np.uint8)


def whole(blocks: DataBlocks) -> np.ndarray:
    found = list(blocks)
    assert [first for first, _ in found] == np.cumsum([0, *(len(rows) for _, rows in found[:-1])]).tolist()
    return np.concatenate([rows for _, rows in found])


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_folder_and_shards_hold_the_same_samples(tmp_path: Path) -> None:
    images = random_images(45)
    (tmp_path / "plain").write_bytes(idx(images))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(images)))
    folder = tmp_path / "folder"
    for i, image in enumerate(images):
        (folder / "ab"[i >= 30]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[i >= 30] / f"{i:03d}.png")
    shards = tmp_path / "shards"
    shards.mkdir()
    for s in range(3):
        samples = ((f"{i:03d}", {"png": encode_image(Image.fromarray(images[i]))}) for i in range(15 * s, 15 * s + 15))
        write_shard(shards / f"{s}.tar", samples)
    for sources in (
        *map(image_sources, (tmp_path / "plain", tmp_path / "packed.gz", folder)),
        shard_sources(str(shards)),
    ):
        blocks = DataBlocks(sources)
        assert blocks.count == 45
        for _ in range(2):
            assert np.array_equal(whole(blocks), images.reshape(45, -1))


def test_latents_keep_their_values(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(7, 3, 4, 4)).astype(np.float16)

    def npy(array: np.ndarray) -> bytes:
        np.save(file := io.BytesIO(), array)
        return file.getvalue()

    write_shard(tmp_path / "0.tar", ((f"{i}", {"latent.npy": npy(x)}) for i, x in enumerate(latents)))
    assert np.array_equal(whole(DataBlocks(shard_sources(str(tmp_path / "0.tar")))), latents.reshape(7, -1))


def test_ranks_share_the_sources(tmp_path: Path) -> None:
    images = random_images(5000, 2)
    (tmp_path / "data").write_bytes(idx(images))
    sources = image_sources(tmp_path / "data")
    found = [block for rank in range(2) for block in DataBlocks(sources, rank, 2)]
    joined = np.concatenate([rows for _, rows in sorted(found, key=lambda block: block[0])])
    assert np.array_equal(joined, images.reshape(5000, -1))
    with pytest.raises(DataError, match="3 pieces, too few for 4 ranks"):
        DataBlocks(sources, 0, 4)


def test_unusable_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        image_sources(tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        image_sources(tmp_path / "missing")
    (tmp_path / "text").write_text("hello, this is no IDX file")
    with pytest.raises(DataError, match="not readable"):
        image_sources(tmp_path / "text")
    folder = tmp_path / "sizes"
    folder.mkdir()
    for side in (4, 5):
        Image.fromarray(random_images(1, side)[0]).save(folder / f"{side}.png")
    with pytest.raises(DataError, match="different numbers of values"):
        list(DataBlocks(image_sources(folder)))
    (folder / "4.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"4\.png"):
        list(DataBlocks(image_sources(folder)))
    write_shard(tmp_path / "0.tar", [("a", {"txt": b"a caption"})])
    with pytest.raises(DataError, match="neither an image nor a latent"):
        list(DataBlocks(shard_sources(str(tmp_path / "0.tar"))))
