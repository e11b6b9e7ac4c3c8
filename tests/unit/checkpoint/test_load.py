from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msdiff_dist.checkpoint.load import CheckpointReader, check_architecture
from msdiff_dist.checkpoint.tensor_file import CorruptError
from msdiff_dist.errors import CheckpointError

NAME = "stages.1.out.0.weight"


def test_whole_tensors_across_ranks(tmp_path: Path, write_checkpoint: Callable[..., Any]) -> None:
    values = write_checkpoint(tmp_path, 3)
    reader = CheckpointReader(tmp_path / "checkpoints/step_00000003")
    assert reader.kinds == ["ema", "param"]
    for kind, tensors in values.items():
        assert reader.names() == sorted(tensors)
        assert all(torch.equal(reader.tensor(kind, name), tensor) for name, tensor in tensors.items())
    decoder = reader.module_state("ema", "stages.1.")
    assert torch.equal(decoder["out.0.weight"], values["ema"][NAME])
    assert all(name.startswith("stages.1.") for name in reader.names("stages.1."))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.data())
def test_any_range(run: Path, data: st.DataObject) -> None:
    reader = CheckpointReader(run / "checkpoints/step_00000003")
    name = data.draw(st.sampled_from(reader.names()))
    flat = reader.tensor("param", name).flatten()
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    assert torch.equal(reader.read_range("param", name, start, stop - start), flat[start:stop])


def test_what_is_not_there(run: Path) -> None:
    reader = CheckpointReader(run / "checkpoints/step_00000003")
    with pytest.raises(CorruptError, match="holds 0 of 8 elements of exp_avg of"):
        reader.tensor("exp_avg", NAME)


def test_verify_divides_the_files_between_ranks(run: Path) -> None:
    folder = run / "checkpoints/step_00000003"
    path = folder / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    reader = CheckpointReader(folder)
    reader.verify(part=0, parts=2)
    for part, parts in ((1, 2), (0, 1)):
        with pytest.raises(CorruptError, match="sha256") as caught:
            reader.verify(part, parts)
        assert caught.value.value == str(path)


def test_other_architecture(run: Path) -> None:
    reader = CheckpointReader(run / "checkpoints/step_00000003")
    shapes = dict(reader.index.shapes)
    check_architecture(reader, shapes)
    for changed in (shapes | {NAME: (9,)}, {k: v for k, v in shapes.items() if k != NAME}, shapes | {"a.new": (1,)}):
        with pytest.raises(CheckpointError, match="another architecture: 1 parameters differ"):
            check_architecture(reader, changed)
