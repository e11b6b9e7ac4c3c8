"""Files of tensors are read one tensor at a time, written bit by bit, and refused if corrupt or able to run code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msdiff_dist.convert import tensor_sources, writing
from msdiff_dist.convert.tensor_sources import MemorySource, NpzSource, SafetensorsSource, open_source
from msdiff_dist.convert.writing import appearing, write_safetensors, write_state_dict
from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.digest import sha256_of


class Payload:
    """Runs a command when unpickled by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.target}",)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b.half": torch.randn(3, 2).half(),
        "a": torch.randn(4),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "brain": torch.randn(2, 2).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }


def test_safetensors_are_written_bitwise(tmp_path: Path) -> None:
    path, expected = tmp_path / "x.safetensors", tensors()
    digest = write_safetensors(path, MemorySource(expected), {"licence": "mine"})
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())
    assert digest == sha256_of(path)
    source = SafetensorsSource([path])
    assert source.metadata["licence"] == "mine"
    assert source.meta("b.half").dtype == torch.float16
    assert source.meta("b.half").device.type == "meta"


def test_torch_files_are_written_as_state_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "RESIDENT", 0)  # let go of memory at every write
    path, expected = tmp_path / "x.ckpt", tensors() | {"long": torch.randn(300, 100)}
    digest = write_state_dict(path, MemorySource(expected), {"licence": "mine"})
    content = torch.load(path, weights_only=True)
    found = content["state_dict"]
    assert list(found) == list(expected)
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())
    assert content["licence"] == "mine"
    assert digest == sha256_of(path)
    assert path.stat().st_size < 2 * expected["long"].nbytes, "no storage is written twice"
    assert list(tmp_path.iterdir()) == [path]


def test_training_checkpoints_are_searched_for_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2), "note": "x"}, "epoch": 3, "optimizer_states": [{}]}, path)
    source = open_source(path)
    assert source.names() == ["a"]
    assert set(source.left_out) == {"epoch", "optimizer_states", "note"}


def test_files_of_the_old_torch_format(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(open_source(path).read("a"), torch.ones(2))


def test_numpy_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=np.arange(3, dtype=np.float32))
    source = open_source(path)
    assert isinstance(source, NpzSource)
    assert source.read("a").tolist() == [0, 1, 2]


def test_folders_of_parts_need_every_part(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "m-1.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(
        '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match=r"m-2\.safetensors"):
        open_source(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "m-2.safetensors")
    assert sorted(open_source(tmp_path).names()) == ["a", "b"]


def test_pickles_with_code_are_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "evil.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Payload(target)}, path)
    with pytest.raises(CheckpointError, match=r"system.*nothing of it was run"):
        open_source(path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.npz"])
def test_files_cut_short_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = {"a": torch.randn(1000)}
    if name.endswith("ckpt"):
        torch.save({"state_dict": content}, path)
    elif name.endswith("npz"):
        np.savez(path, a=content["a"].numpy())
    else:
        save_file(content, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=name):
        open_source(path)


@pytest.mark.parametrize("name", ["absent.ckpt", "notes.txt"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=name.split(".")[1]):
        open_source(tmp_path / name)


def test_results_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with appearing(tmp_path / "result") as aside:
            aside.mkdir()
            (aside / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with appearing(tmp_path / "result") as aside:
        aside.mkdir()
    assert (tmp_path / "result").is_dir()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"), appearing(tmp_path / "old"):
        pass


def test_tensors_outlive_the_mapping_that_they_were_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_sources, "RESIDENT", 0)
    expected = {str(i): torch.randn(100) for i in range(5)}
    torch.save({"state_dict": expected}, tmp_path / "x.ckpt")
    source = open_source(tmp_path / "x.ckpt")
    found = {name: source.read(name) for name in source.names()}
    assert all(torch.equal(found[k], v) for k, v in expected.items())
