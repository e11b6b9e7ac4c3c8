"""Tensor sources: named tensors, read one at a time, from safetensors, numpy and torch files and folders of them."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from msdiff_dist.checkpoint.tensor_file import TensorReader
from msdiff_dist.checkpoint.what_is import what_is
from msdiff_dist.convert.networks import (
    Network,
    Taken,
    Wanted,
    beside,
    chosen,
    left_out,
    mappings_in,
    networks_in,
    taken,
)
from msdiff_dist.convert.pickles.torch_file import TorchFile
from msdiff_dist.convert.pickles.values import HarmError, PickleError, Shell, tensor_of
from msdiff_dist.data.foreign import what_it_is
from msdiff_dist.data.npy import read_npy_header
from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.json_text import read_mapping

RESIDENT = 1 << 26
"""Bytes of mapped files that may stay in memory before their pages are freed."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
"""Suffixes of files that `torch.save` or `pickle.dump` wrote."""
_USUAL = ("model", "pytorch_model", "diffusion_pytorch_model")  # names of weights beside states of a training
_HOLDERS = ("state_dict", "model", "module", "")  # places of weights where no network is recognised


class TensorSource(ABC):
    """Named tensors, each read when it is asked for."""

    files: tuple[Path, ...] = ()
    """The files that the tensors come from."""
    metadata: Mapping[str, str] = {}
    """Metadata in the headers of the files."""
    left_out: Mapping[str, str] = {}
    """Content of the files that is no weights: its name, and what it is."""
    taken: Taken | None = None
    """Which of the file's networks these tensors are; None where no network was recognised."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every name, in the file's order."""

    @abstractmethod
    def meta(self, key: str) -> Tensor:
        """The tensor's type and shape, on the meta device."""

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU. It may be mapped from the file, so it must not be changed."""

    def __contains__(self, key: str) -> bool:
        return key in self.names()


class MemorySource(TensorSource):
    """Tensors that are in memory, or mapped from a file."""

    def __init__(
        self, tensors: Mapping[str, Tensor], files: Iterable[Path] = (), left_out: Mapping[str, str] | None = None
    ) -> None:
        self._tensors, self.files, self.left_out = tensors, tuple(files), left_out or {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def meta(self, key: str) -> Tensor:
        return self._tensors[key].to("meta")

    def read(self, key: str) -> Tensor:
        return self._tensors[key]


class SafetensorsSource(TensorSource):
    """One or several .safetensors files, read one tensor at a time."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files = tuple(paths)
        self._readers: dict[str, TensorReader] = {}
        self.metadata = {}
        for path in self.files:
            reader = TensorReader(path)
            self.metadata |= reader.metadata
            for key in reader.like:
                if key in self._readers:
                    raise CheckpointError(
                        str(path), key, f"is also in {self._readers[key].path.name}", "Keep one of the two files."
                    )
                self._readers[key] = reader

    def names(self) -> list[str]:
        return list(self._readers)

    def meta(self, key: str) -> Tensor:
        return self._readers[key].like[key]

    def read(self, key: str) -> Tensor:
        return self._readers[key].tensor(key)


class NpzSource(TensorSource):
    """Arrays of a numpy .npz archive, read one at a time.

    Raises:
        CheckpointError: the archive is corrupt, or holds Python objects.
    """

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        file = path.open("rb")
        weakref.finalize(self, file.close)  # numpy closes what it opens itself, but not when the archive is corrupt
        try:
            self._archive = np.load(file, allow_pickle=False)
            if not isinstance(self._archive, NpzFile):
                raise ValueError("it holds one array")
            self._meta = {key: _npy_meta(self._archive, key) for key in self._archive.files}
        except Exception as e:  # of the archive, its compression, or a header that is Python source
            raise _corrupt(path, e) from None

    def names(self) -> list[str]:
        return list(self._meta)

    def meta(self, key: str) -> Tensor:
        return self._meta[key]

    def read(self, key: str) -> Tensor:
        try:
            array = self._archive[key]
        except Exception as e:  # of the compression, a checksum, or a length
            raise _corrupt(self.files[0], e) from None
        return torch.from_numpy(array)


def _npy_meta(archive: NpzFile, key: str) -> Tensor:
    """An array's type and shape by its header alone: a small file may unpack to any size."""
    files = archive.zip
    assert files is not None, "the archive is open"
    name = key if key in files.namelist() else f"{key}.npy"
    with files.open(name) as stream:
        shape, dtype = read_npy_header(stream)
    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device="meta")


class TorchSource(TensorSource):
    """The weights of a torch checkpoint or pickle, mapped from its file.

    Pages that were read stay in memory as long as their mapping, so they are freed after every `RESIDENT` bytes.

    Raises:
        CheckpointError: the file is corrupt, holds no weights, or several networks of which none is named.
    """

    def __init__(self, path: Path, wanted: Wanted | None = None) -> None:
        wanted = wanted or Wanted()
        self.files = (path,)
        self._file = _opened(path)
        content = self._file.content
        mappings = mappings_in(content)
        networks = networks_in(mappings)
        network = chosen(networks, wanted, path.name)
        if network is None:
            if not mappings:
                found = content.name if isinstance(content, Shell) else type(content).__name__
                raise CheckpointError(str(path), found, "holds no state dict", "Save a state dict.")
            holder = next((p for p in _HOLDERS if p in mappings), max(mappings, key=lambda p: len(mappings[p])))
            network = Network(key=holder, tensors={k: k for k in mappings[holder]}, holder=holder)
        values = mappings[network.holder]
        self._tensors = {inside: values[name] for inside, name in network.tensors.items()}
        self._meta: dict[str, Tensor] = {}
        for name, value in self._tensors.items():
            tensor = tensor_of(value)
            if tensor is not None:
                self._meta[name] = tensor.to("meta")
        self._resident = 0
        self.left_out = left_out(content, network, networks, values)
        self.taken = taken(network, networks)

    def names(self) -> list[str]:
        return list(self._meta)

    def meta(self, key: str) -> Tensor:
        return self._meta[key]

    def read(self, key: str) -> Tensor:
        if self._resident > RESIDENT:
            self._file.free_pages()
            self._resident = 0
        self._resident += self._meta[key].nbytes
        tensor = tensor_of(self._tensors[key])
        assert tensor is not None
        return tensor


class RenamedSource(TensorSource):
    """Some tensors of another source under other names.

    Args:
        names: for each new name, the name in `base`.
    """

    def __init__(self, base: TensorSource, names: Mapping[str, str]) -> None:
        self._base, self._names = base, names
        self.files, self.metadata, self.left_out = base.files, base.metadata, base.left_out
        self.taken = base.taken

    def names(self) -> list[str]:
        return list(self._names)

    def meta(self, key: str) -> Tensor:
        return self._base.meta(self._names[key])

    def read(self, key: str) -> Tensor:
        return self._base.read(self._names[key])


class JoinedSource(TensorSource):
    """The tensors of several sources together.

    Raises:
        CheckpointError: two of them have a tensor of one name.
    """

    def __init__(self, parts: Iterable[TensorSource]) -> None:
        self._part: dict[str, TensorSource] = {}
        left_out: dict[str, str] = {}
        for part in parts:
            self.files += part.files
            left_out |= part.left_out
            for key in part.names():
                if key in self._part:
                    first = self._part[key].files[0].name
                    raise CheckpointError(str(part.files[0]), key, f"is also in {first}", "Keep one of the two files.")
                self._part[key] = part
        self.left_out = left_out

    def names(self) -> list[str]:
        return list(self._part)

    def meta(self, key: str) -> Tensor:
        return self._part[key].meta(key)

    def read(self, key: str) -> Tensor:
        return self._part[key].read(key)


def under(source: TensorSource, prefix: str) -> RenamedSource:
    """The tensors whose names begin with `prefix`, named without it."""
    return RenamedSource(source, {k.removeprefix(prefix): k for k in source.names() if k.startswith(prefix)})


def open_source(path: Path, wanted: Wanted | None = None) -> TensorSource:
    """The tensors of a file's network, or of a folder with one file of weights or with several and an index.

    Args:
        wanted: which network, where the file holds several.

    Raises:
        CheckpointError: `path` is absent, corrupt or of an unknown kind, or no one network is wanted.
    """
    path, wanted = path.expanduser(), wanted or Wanted()
    if path.is_dir():
        indexes = sorted([*path.glob("*.safetensors.index*.json"), *path.glob("*.bin.index*.json")], reverse=True)
        return _network_of(open_shards(indexes[0]), wanted) if indexes else open_source(_only_file_of(path), wanted)
    if not path.is_file():
        raise CheckpointError("SRC", str(path), "no such file or folder", "Name an existing checkpoint.")
    if path.suffix == ".safetensors" or (path.suffix in PICKLES and _is_safetensors(path)):
        return _network_of(SafetensorsSource([path]), wanted)
    if path.suffix == ".npz":
        return _network_of(NpzSource(path), wanted)
    if path.suffix in PICKLES:
        return TorchSource(path, wanted)
    raise CheckpointError(
        "SRC", str(path), f"files ending in {path.suffix or 'nothing'} are not known",
        f"Give .safetensors, .npz or one of {', '.join(PICKLES)}.",
    )  # fmt: skip


def open_shards(index: Path) -> TensorSource:
    """The tensors of a model that is divided into several files, .safetensors or torch's, which `index` names.

    Raises:
        CheckpointError: the index is not JSON with a weight_map, or a file is missing or corrupt.
    """
    weight_map = read_mapping(index, CheckpointError, "Fetch it again.", "SRC").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(str(index), None, "is no index of weights (weight_map)", "Fetch it again.")
    paths = [index.parent / name for name in sorted({Path(name).name for name in weight_map.values()})]
    for path in paths:
        if not os.path.isfile(path):  # unlike Path.is_file, no error of a name that cannot be one
            raise CheckpointError(str(path), None, f"is named by {index.name} and missing", "Add it.")
    if all(path.suffix == ".safetensors" for path in paths):
        return SafetensorsSource(paths)
    return JoinedSource(map(open_source, paths))


def load_pickle(path: Path) -> Any:
    """Content of a torch checkpoint or a pickle: tensors, mapped from the file, plain containers, and shells.

    No code is run: objects of other classes are `pickles.values.Shell`.

    Raises:
        CheckpointError: the file is corrupt, of another kind, or was made to do harm.
    """
    return _opened(path).content


def _opened(path: Path) -> TorchFile:
    try:
        return TorchFile(path)
    except HarmError as e:
        raise CheckpointError(
            str(path), str(e), "is a function that the file asks to call when it is opened, to run code of its own; "
            "nothing of it was run", "Do not open it with other programs; get the weights as .safetensors.",
        ) from None  # fmt: skip
    except PickleError as e:
        with path.open("rb") as file:
            what = what_it_is(file.read(512))
        if what and not what.startswith("is a ZIP"):
            raise CheckpointError(str(path), None, what, "Fetch the checkpoint itself.") from None
        raise _corrupt(path, e) from None
    except OSError as e:
        raise CheckpointError("SRC", str(path), e.strerror or str(e), "Name a file that can be read.") from None


def _network_of(source: TensorSource, wanted: Wanted) -> TensorSource:
    """The tensors of one network of `source`, under their names inside it; all where none is recognised."""
    names = {name: name for name in source.names()}
    networks = networks_in({"": names})
    network = chosen(networks, wanted, source.files[0].name)
    if network is None or network.tensors == names:
        return source
    out = RenamedSource(source, network.tensors)
    out.left_out = {**source.left_out, **beside(network, networks, names)}
    out.taken = taken(network, networks)
    return out


def _is_safetensors(path: Path) -> bool:
    """Whether a file of another suffix is a .safetensors file: its header's length, then the header as JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _only_file_of(folder: Path) -> Path:
    """The one file of weights in a folder: the .safetensors file, if there is one; else torch's or numpy's."""
    found = sorted(folder.glob("*.safetensors"))
    found = found or sorted(p for p in folder.iterdir() if p.suffix in (*PICKLES, ".npz"))
    usual = [path for path in found if path.stem in _USUAL]
    if len(found) != 1 and len(usual) != 1:
        what, remedy = what_is(folder)
        raise CheckpointError("SRC", str(folder), what, remedy)
    return found[0] if len(found) == 1 else usual[0]


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(str(path), None, f"is corrupt or cut short ({reason})", "Fetch or copy it again.")
