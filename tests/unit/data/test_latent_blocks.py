"""Latents packed in blocks: content, checksums, and the same steps as from single samples."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.index import read_index, resolve_shards
from msdiff_dist.data.latent_blocks import BLOCK_FIELD, BlockError, block_keys, check_block, pack_block, read_block
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make.shard_writer import write_shard
from msdiff_dist.data.tar_members import TarError, sample_keys, samples
from msdiff_dist.errors import DataError

N = 5


def tensors_of(dtype=torch.float16, first=0):
    number = torch.arange(first, first + N)
    values = number.view(N, 1, 1, 1).expand(N, 2, 3, 3)
    return {
        "latent.npy": values.to(dtype),
        "latent_flip.npy": -values.to(dtype),
        "context.npy": values[:, 0, :2].to(dtype),
        "context_mask.npy": torch.ones(N, 2, dtype=torch.bool),
        "cls": number % 3,
    }


def keys_of(first=0):
    return [f"ä{first + i}" for i in range(N)]


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32])
def shards(request, tmp_path):
    """Two shards of three blocks of N samples, numbered on."""
    for shard in range(2):
        firsts = [N * (3 * shard + b) for b in range(3)]
        blocks = [
            pack_block(keys_of(f), tensors_of(request.param, f), [f"no {f + i}" for i in range(N)]) for f in firsts
        ]
        write_shard(tmp_path / f"{shard}.tar", ((f"{b:06d}", {BLOCK_FIELD: block}) for b, block in enumerate(blocks)))
    return tmp_path


def config_of(folder, **fields):
    known = {"kind": "latent", "latent_shape": (2, 3, 3), "num_classes": 3, "lanes": 2, "shuffle": 4}
    return DataConfig(shards=str(folder), **{**known, **fields})


def test_samples_of_a_block_are_those_packed():
    tensors = tensors_of()
    read = read_block(pack_block(keys_of(), tensors, ["a", "b", "c", "d", "ß"]), "url")
    assert read["__key__"].tolist() == keys_of()
    assert [text.decode() for text in read["txt"]] == ["a", "b", "c", "d", "ß"]
    assert set(read["__url__"]) == {"url"}
    for name, tensor in tensors.items():
        assert np.array_equal(read[name], tensor.numpy())
    assert "txt" not in read_block(pack_block(keys_of(), tensors), "url")
    last = ', \\"ä4\\"'.encode()
    with pytest.raises(BlockError, match=r"has 5 of .* for 4 samples"):
        read_block(pack_block(keys_of(), tensors).replace(last, b" " * len(last)), "url")


def test_shards_of_blocks_are_read_sample_by_sample(shards):
    expected = keys_of() + keys_of(N) + keys_of(2 * N)
    assert list(sample_keys(str(shards / "0.tar"))) == expected
    assert [s["__key__"] for s in samples(str(shards / "0.tar"))] == expected
    assert [s.num_samples for s in read_index(resolve_shards(str(shards)))] == [3 * N, 3 * N]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_loader_hands_on_any_type_as_any_other(shards, dtype):
    config = config_of(shards, latent_dtype=dtype, context_shape=(2, 3), captions=True)
    steps = list(itertools.islice(StepLoader(config, 0, 6), 10))
    assert sorted(key for step in steps[:5] for key in step.keys) == sorted(f"ä{i}" for i in range(6 * N))
    for step in steps:
        numbers = torch.tensor([int(key[1:]) for key in step.keys])
        assert step.x_nCHW.dtype == step.context_nTC.dtype == getattr(torch, dtype)
        assert torch.equal(step.x_nCHW.float(), numbers.view(-1, 1, 1, 1).expand(-1, 2, 3, 3).float())
        assert torch.equal(step.context_nTC.float(), numbers.view(-1, 1, 1).expand(-1, 2, 3).float())
        assert torch.equal(step.label_n, numbers % 3)
        assert step.captions == [f"no {n}" for n in numbers.tolist()]


def test_packed_and_single_samples_give_the_same_steps(tmp_path):
    """Also blocks of another type than those before, and where a label is out of range."""
    rng = np.random.default_rng(0)
    latents = torch.from_numpy(rng.standard_normal((60, 2, 3, 3), dtype=np.float32)).half()
    labels = torch.arange(60) % 3
    labels[17] = 9
    singles, packed = [], []
    for first, size in ((0, 20), (20, 1), (21, 15), (36, 24)):
        rows = slice(first, first + size)
        tensors = {"latent.npy": latents[rows].to(torch.float32 if size == 15 else torch.float16), "cls": labels[rows]}
        packed.append((f"b{first}", {BLOCK_FIELD: pack_block([f"{i:03d}" for i in range(60)[rows]], tensors)}))
        for i in range(60)[rows]:
            stream = io.BytesIO()
            np.save(stream, latents[i].numpy())
            singles.append((f"{i:03d}", {"latent.npy": stream.getvalue(), "cls": str(int(labels[i])).encode()}))
    for name, content in (("singles", singles), ("packed", packed)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", content)
    for shuffle, start in ((1, 0), (7, 3), (25, 11), (100, 1)):
        configs = [config_of(tmp_path / n, lanes=1, shuffle=shuffle, max_bad=1) for n in ("singles", "packed")]
        a, b = ([*itertools.islice(StepLoader(c, 0, 13, start_batch=start), 12)] for c in configs)
        assert [step.keys for step in a] == [step.keys for step in b]
        for single, row in zip(a, b, strict=True):
            assert torch.equal(single.x_nCHW, row.x_nCHW)
            assert torch.equal(single.label_n, row.label_n)
        assert sum(len(step.corruption) for step in b) == 1


def test_flip_takes_the_stored_mirrored_latent_for_half_of_the_samples(shards):
    config = config_of(shards, flip=True)
    whole = [step for step, _ in zip(StepLoader(config, 0, 30), range(20), strict=False)]
    flipped = torch.cat([step.x_nCHW[:, 0, 0, 0] < 0 for step in whole])
    assert 0.4 < flipped.float().mean() < 0.6
    late = next(StepLoader(config, 0, 30, start_batch=7))
    assert torch.equal(late.x_nCHW, whole[7].x_nCHW)
    blocks = [("0", {BLOCK_FIELD: pack_block(keys_of(), {"latent.npy": tensors_of()["latent.npy"]})})]
    write_shard(shards / "0.tar", blocks)
    (shards / "1.tar").unlink()
    with pytest.raises(DataError, match=r"data\.flip = True.*latent_flip\.npy"):
        list(itertools.islice(StepLoader(config_of(shards, flip=True, num_classes=None), 0, 30), 3))


def test_moments_are_sampled_anew_at_every_visit(tmp_path):
    mean, log_variance = torch.full((N, 2, 4, 4), 3.0), torch.full((N, 2, 4, 4), -4.0)
    block = pack_block(keys_of(), {"latent.npy": torch.cat([mean, log_variance], dim=1).bfloat16()})
    write_shard(tmp_path / "0.tar", [("0", {BLOCK_FIELD: block})])
    config = config_of(tmp_path, latent_shape=(2, 4, 4), latent_moments=True, num_classes=None, latent_dtype="float32")
    x = torch.cat([step.x_nCHW for step, _ in zip(StepLoader(config, 0, N), range(40), strict=False)])
    assert x.mean().item() == pytest.approx(3, abs=0.01)
    assert x.std().item() == pytest.approx(np.exp(-2), rel=0.05)


def test_a_changed_bit_is_found_in_its_sample():
    block = pack_block(keys_of(), tensors_of(), ["some", "words", "more", "words", "end"])
    keys, tensors = check_block(block)
    assert keys == keys_of()
    assert set(tensors) == set(tensors_of())
    for harmed, row in ((block.replace(b"more", b"mare"), 2), (block.replace("ä3".encode(), "ä7".encode()), 3)):
        with pytest.raises(BlockError, match="not what was written") as caught:
            check_block(harmed)
        assert caught.value.row == row
    at = block.index(tensors_of()["latent.npy"].numpy().tobytes()) + 4 * 36 + 3  # in the fifth sample
    with pytest.raises(BlockError) as caught:
        check_block(block[:at] + bytes([block[at] ^ 64]) + block[at + 1 :])
    assert caught.value.row == 4


@pytest.mark.parametrize("harmed", [b"", b"abc", b"\xff" * 50, b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_not_a_block_is_an_error(tmp_path, harmed):
    for read in (block_keys, check_block, lambda content: read_block(content, "")):
        with pytest.raises(BlockError, match="is not a block"):
            read(harmed)
    write_shard(tmp_path / "0.tar", [("000000", {BLOCK_FIELD: harmed})])
    for read_all in (samples, sample_keys):
        with pytest.raises(TarError, match="block 000000 is not a block"):
            list(read_all(str(tmp_path / "0.tar")))
    block = pack_block(keys_of(), tensors_of())
    with pytest.raises(BlockError):
        check_block(block[:-10])


def test_blocks_whose_columns_do_not_fit():
    keys = {"__key__": json.dumps(keys_of())}
    with pytest.raises(BlockError, match="has no checksums"):
        check_block(save({"latent.npy": torch.zeros(N, 1, 1, 1)}, keys))
    for length in (N - 1, N + 1):
        tensors = {"latent.npy": torch.zeros(length, 1, 1, 1), "crc32": torch.zeros(N, dtype=torch.int64)}
        with pytest.raises(BlockError, match=rf"has {length} of latent\.npy for {N} samples"):
            check_block(save(tensors, keys))


def test_a_block_without_samples():
    empty = {"latent.npy": torch.zeros(0, 1, 1, 1), "crc32": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(BlockError, match="holds no samples"):
        check_block(save(empty, {"__key__": "[]"}))
