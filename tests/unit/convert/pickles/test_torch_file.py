"""Files of `torch.save` and `pickle.dump` are read as torch reads them, from a mapping, and refused if they lie."""

from __future__ import annotations

import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msdiff_dist.convert.pickles.torch_file import TorchFile
from msdiff_dist.convert.pickles.values import PickleError, Shell, tensor_of

FORMS: dict[str, dict[str, Any]] = {
    "zip-2": {}, "zip-5": {"pickle_protocol": 5}, "legacy-2": {"_use_new_zipfile_serialization": False},
    "legacy-4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}  # fmt: skip
BARE = ["bare-0", "bare-2", "bare-5"]


def save(path: Path, content: Any, form: str) -> Path:
    if form in FORMS:
        torch.save(content, path, **FORMS[form])
    else:
        with path.open("wb") as file:
            pickle.dump(content, file, protocol=int(form[-1]))
    return path


def tensors() -> dict[str, Any]:
    base = torch.arange(24.0)
    return {
        "whole": base, "view": base.view(4, 6)[1:3, ::2], "transposed": base.view(4, 6).t(),
        "half": torch.randn(3).half(),
        "brain": torch.randn(5, 2).bfloat16(), "long": torch.arange(3), "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(5), "empty": torch.zeros(0, 3), "parameter": nn.Parameter(torch.randn(2, 2)),
        "expanded": torch.ones(1, 3).expand(4, 3), "complex": torch.randn(2, dtype=torch.complex64),
        "unsigned": torch.arange(3).to(torch.uint16), "byte": torch.arange(3).byte(),
    }  # fmt: skip


@pytest.mark.parametrize("form", [*FORMS, *BARE])
def test_tensors_are_bitwise_those_that_were_saved(tmp_path: Path, form: str) -> None:
    expected = tensors()
    found = TorchFile(save(tmp_path / "x.pt", {"inner": [expected]}, form)).content["inner"][0]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor.detach()), name


@pytest.mark.parametrize("form", [*FORMS, *BARE])
def test_what_trainers_store_beside(tmp_path: Path, form: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    content = {
        "state_dict": model.state_dict(), "whole": model, "optimizer": optimizer.state_dict(), "object": optimizer,
        "lr_schedulers": [scheduler.state_dict(), scheduler], "rng": torch.get_rng_state(), "size": torch.Size([2]),
        "device": torch.device("cuda:1"), "dtype": torch.bfloat16,
    }  # fmt: skip
    found = TorchFile(save(tmp_path / "x.pt", content, form)).content
    assert all(torch.equal(found["state_dict"][k], v) for k, v in model.state_dict().items())
    moments = found["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])
    assert isinstance(found["whole"], Shell)
    assert torch.equal(found["whole"].fields["_modules"]["0"].fields["_parameters"]["bias"], model[0].bias)  # type: ignore[arg-type]
    assert torch.equal(found["rng"], content["rng"])


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    for form in FORMS:
        path = save(tmp_path / f"{form}.pt", {"a": torch.zeros(1000)}, form)
        file = TorchFile(path)
        file.content["a"][0] = 7  # in private memory
        file.free_pages()
        assert file.content["a"][0] == 0, "read again from the file"
        assert TorchFile(path).content["a"][0] == 0, "the file is as it was"


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes | None) -> Path:
    """The archive with some members changed, or removed (None); `data/0` is written data__0."""
    out = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            content = members.get(name.split("/", 1)[1].replace("/", "__").replace(".", "_"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return out


def test_archives_that_lie(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.zeros(1000)}, "zip-2")
    for made, match in [
        (lambda: rewritten(path, data__0=b"short"), "holds 5 of 4000 bytes"),
        (lambda: rewritten(path, data__0=None), "data/0 is missing"),
        (lambda: rewritten(path, data_pkl=None), "without data.pkl"),
        (lambda: rewritten(path, byteorder=b"big"), "big-endian"),
        (lambda: rewritten(path, zipfile.ZIP_DEFLATED), "compressed by another program"),
    ]:
        with pytest.raises(PickleError, match=match):
            TorchFile(made())
    assert torch.equal(TorchFile(rewritten(path)).content["a"], torch.zeros(1000))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95, 0.999])
def test_files_cut_short(tmp_path: Path, form: str, keep: float) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.randn(1000)}, form)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(PickleError):
        TorchFile(path)


def forged(shape: bytes, stride: bytes, offset: bytes = b"K\x00", numel: bytes = b"K\x04") -> bytes:
    """data.pkl of one tensor, with these opcodes for its shape, stride, offset and storage's length."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + numel + b"tQ"
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
        + storage + offset + shape + stride + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x10"  # 2 ** 44


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (forged(HUGE + b"\x85", b"K\x01\x85"), "stored in 16 bytes"),
        (forged(HUGE + b"\x85", b"K\x00\x85"), "stored in 16 bytes"),
        (forged(b"K\x02\x85", b"K\x01\x85", offset=HUGE), "stored in 16 bytes"),
        (forged(b"K\x02\x85", HUGE + b"\x85"), "RuntimeError"),
        (forged(b"K\x02K\x02\x86", b"K\x02\x85"), "stored in 16 bytes"),
        (forged(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "no size"),
        (forged(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "no size"),
        (forged(b"K\x02\x85", b"K\x01\x85", numel=HUGE), "holds 16 of"),
        (forged(b"K\x02", b"K\x01"), "no shape"),
        (b"\x80\x02(X\x06\x00\x00\x00moduleK\x01K\x02K\x03K\x04tQ.", "no storage"),
        (b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.", "no storage"),
    ],
)
def test_tensors_larger_than_their_storages(tmp_path: Path, pickled: bytes, match: str) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.arange(4.0)}, "zip-2")
    with pytest.raises(PickleError, match=match):
        TorchFile(rewritten(path, data_pkl=pickled))
    good = TorchFile(rewritten(path, data_pkl=forged(b"K\x02\x85", b"K\x02\x85"))).content["a"]
    assert good.tolist() == [0, 2]


def test_files_inside_files_end(tmp_path: Path) -> None:
    def around(inner: bytes) -> bytes:
        return b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."

    (tmp_path / "one.pkl").write_bytes(around(b"K\x07."))
    assert TorchFile(tmp_path / "one.pkl").content == 7
    (tmp_path / "two.pkl").write_bytes(around(around(b"K\x07.")))
    assert isinstance(TorchFile(tmp_path / "two.pkl").content, Shell)


def test_other_files_are_called_by_name(tmp_path: Path) -> None:
    script = tmp_path / "script.pt"
    torch.jit.script(nn.Linear(2, 2)).save(script)
    with pytest.raises(PickleError, match="TorchScript"):
        TorchFile(script)
    old = tmp_path / "old.pt"
    with tarfile.open(old, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(PickleError, match="tar archive"):
        TorchFile(old)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(PickleError, match="empty"):
        TorchFile(tmp_path / "empty.pt")
    assert tensor_of("text") is None
