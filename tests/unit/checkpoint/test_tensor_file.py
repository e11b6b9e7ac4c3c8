from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from msdiff_dist.checkpoint.tensor_file import CorruptError, TensorReader, TensorWriter, check_content, check_size


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 4), "b/c@7": (5,), "scalar": ()}
    floats = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return floats | {"half": floats["a"].bfloat16(), "whole": torch.arange(3)}


def written(path: Path, tensors: dict[str, torch.Tensor]) -> TensorWriter:
    with TensorWriter(path, tensors, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer


def test_the_library_reads_what_is_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = written(tmp_path / "x", tensors).stored
    content = (tmp_path / "x").read_bytes()
    assert (stored.name, stored.size) == ("x", len(content))
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    assert stored.keys == {"a": 12, "b/c@7": 5, "scalar": 1, "half": 12, "whole": 3}
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_reads_what_the_library_writes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    reader = TensorReader(tmp_path / "x")
    assert reader.like.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert reader.like[name].is_meta
        assert reader.tensor(name).dtype == tensor.dtype
        assert torch.equal(reader.tensor(name), tensor)


@given(st.data())
def test_any_range(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges"
    values = torch.arange(20.0)
    written(path, {"a": values[:8], "b": values[8:]})
    start = data.draw(st.integers(0, 11))
    stop = data.draw(st.integers(start + 1, 12))
    out = torch.empty(stop - start)
    TensorReader(path).read("b", start, out)
    assert torch.equal(out, values[8 + start : 8 + stop])


@pytest.mark.parametrize("size", [0, 5, 30, 200, -1])
def test_cut_short(tmp_path: Path, tensors: dict[str, torch.Tensor], size: int) -> None:
    path = tmp_path / "x"
    stored = written(path, tensors).stored
    content = path.read_bytes()
    path.write_bytes(content[:size])
    for refuses in (lambda: TensorReader(path), lambda: check_size(path, stored), lambda: check_content(path, stored)):
        with pytest.raises(CorruptError, match="is corrupt") as caught:
            refuses()
        assert caught.value.value == str(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x"
    stored = written(path, tensors).stored
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), 7):
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        with pytest.raises(CorruptError, match="sha256 differs"):
            check_content(path, stored)
        content[at] ^= 1 << at % 8


def test_missing_file_and_other_types(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = written(tmp_path / "x", tensors).stored
    with pytest.raises(CorruptError, match="missing"):
        check_content(tmp_path / "y", stored)
    with pytest.raises(CorruptError, match="No such file"):
        TensorReader(tmp_path / "y")
    reader = TensorReader(tmp_path / "x")
    with pytest.raises(CorruptError, match=r"no torch.float32 tensor q"):
        reader.read("q", 0, torch.empty(1))
    with pytest.raises(CorruptError, match=r"no torch.float32 tensor whole"):
        reader.read("whole", 0, torch.empty(1))


def test_an_unfinished_file_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), TensorWriter(tmp_path / "x", {"a": torch.ones(2)}):
        pass
