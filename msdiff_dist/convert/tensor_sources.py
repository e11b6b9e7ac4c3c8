"""Tensor sources: named tensors, read one at a time, from safetensors, numpy and torch files and folders of them."""

from __future__ import annotations

import json
import pickle
import re
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.checkpoint.tensor_file import TensorReader
from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.text import read_text

RESIDENT = 1 << 26
"""Bytes of mapped files that may stay in memory before their pages are freed."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of files that `torch.save` wrote."""


class TensorSource(ABC):
    """Named tensors, each read when it is asked for."""

    files: tuple[Path, ...] = ()
    """The files that the tensors come from."""
    metadata: Mapping[str, str] = {}
    """Metadata in the headers of the files."""
    left_out: Mapping[str, str] = {}
    """Content of the files that is no weights: its name, and what it is."""

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
            # numpy reads an array with its shape, so each is read here once, and again when it is asked for.
            self._archive = np.load(file, allow_pickle=False)
            self._meta = {key: torch.from_numpy(self._archive[key]).to("meta") for key in self._archive.files}
        except (ValueError, OSError, TypeError, zipfile.BadZipFile, EOFError) as e:
            raise _corrupt(path, e) from None

    def names(self) -> list[str]:
        return list(self._meta)

    def meta(self, key: str) -> Tensor:
        return self._meta[key]

    def read(self, key: str) -> Tensor:
        return torch.from_numpy(self._archive[key])


class TorchSource(TensorSource):
    """The weights of a torch checkpoint, mapped from its file.

    Pages that were read stay in memory as long as their mapping, so the file is mapped anew after every `RESIDENT`
    bytes. A tensor that was returned earlier keeps its own mapping.

    Raises:
        CheckpointError: the file is corrupt, would run code to load, or holds no state dict.
    """

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        self._tensors, self.left_out = _weights_in(path)
        self._meta = {k: v.to("meta") for k, v in self._tensors.items()}
        self._mapped, self._resident = zipfile.is_zipfile(path), 0  # other files were read whole (see `load_pickle`)

    def names(self) -> list[str]:
        return list(self._meta)

    def meta(self, key: str) -> Tensor:
        out: Tensor = self._meta[key]
        return out

    def read(self, key: str) -> Tensor:
        if self._mapped and self._resident > RESIDENT:
            self._tensors, self._resident = _weights_in(self.files[0])[0], 0
        self._resident += self._meta[key].nbytes
        out: Tensor = self._tensors[key]
        return out


class RenamedSource(TensorSource):
    """Some tensors of another source under other names.

    Args:
        names: for each new name, the name in `base`.
    """

    def __init__(self, base: TensorSource, names: Mapping[str, str]) -> None:
        self._base, self._names = base, names
        self.files, self.metadata, self.left_out = base.files, base.metadata, base.left_out

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


def open_source(path: Path) -> TensorSource:
    """The tensors of a file, or of a folder with one .safetensors file or with several and an index.

    Raises:
        CheckpointError: `path` is absent, corrupt, of an unknown kind, or a pickle that would run code to load.
    """
    path = path.expanduser()
    if path.is_dir():
        indexes = sorted(path.glob("*.safetensors.index*.json"))
        return open_shards(indexes[0]) if indexes else SafetensorsSource([_only_file_of(path)])
    if not path.is_file():
        raise CheckpointError("SRC", str(path), "no such file or folder", "Name an existing checkpoint.")
    if path.suffix == ".safetensors":
        return SafetensorsSource([path])
    if path.suffix == ".npz":
        return NpzSource(path)
    if path.suffix in PICKLES:
        return TorchSource(path)
    if path.suffix == ".pkl":
        raise code_refused(path, "a Python pickle")
    raise CheckpointError(
        "SRC", str(path), f"files ending in {path.suffix or 'nothing'} are not known",
        f"Give .safetensors, .npz or one of {', '.join(PICKLES)}.",
    )  # fmt: skip


def open_shards(index: Path) -> TensorSource:
    """The tensors of a model that is divided into several files, .safetensors or torch's, which `index` names.

    Raises:
        CheckpointError: the index is not JSON with a weight_map, or a file is missing or corrupt.
    """
    text = read_text(index, "SRC", CheckpointError)
    try:
        names = sorted({Path(name).name for name in json.loads(text)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(str(index), None, f"is no index of weights ({e})", "Fetch it again.") from None
    paths = [index.parent / name for name in names]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(str(path), None, f"is named by {index.name} and missing", "Add it.")
    if all(path.suffix == ".safetensors" for path in paths):
        return SafetensorsSource(paths)
    return JoinedSource(map(open_source, paths))


def load_pickle(path: Path) -> Any:
    """Content of a torch checkpoint: tensors, mapped from the file, and plain containers. No code of the file is run.

    Training programs store objects of their own classes too (callbacks, loss scalers). The classes in `_INERT` are
    replaced by `Shell`; any other is an error.

    Raises:
        CheckpointError: the file is corrupt, or it would run code to load.
    """
    mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another container, which cannot be mapped
    try:
        with torch.serialization.safe_globals(_shells()):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as e:
        # torch names the class in its message only, in one of these wordings.
        found = re.search(r"GLOBAL ([\w.]+)|([\w.]+) was not an allowed global", str(e))
        if found is None:
            raise _corrupt(path, e) from None
        raise code_refused(path, found[1] or found[2]) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, IndexError) as e:
        raise _corrupt(path, e) from None


def code_refused(path: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that would run code of its own when read; `what` is that code's name."""
    return CheckpointError(
        str(path), what, "reading it means running code that came with it, so it is not read",
        "Where you trust it, load it with the program that wrote it and save its state dict with "
        "safetensors.torch.save_file; then convert that file.",
    )  # fmt: skip


def _weights_in(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The weights of a torch checkpoint, and its other content as in `TensorSource.left_out`."""
    content = load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(str(path), type(content).__name__, "holds no state dict", "Save a state dict.")
    inside = next((n for n in ("state_dict", "model", "module") if isinstance(content.get(n), Mapping)), None)
    weights = content if inside is None else content[inside]
    left_out = {str(name): "state of the training, no weights" for name in content if inside and name != inside}
    left_out |= {str(name): "no tensor" for name, value in weights.items() if not isinstance(value, Tensor)}
    return {k: v for k, v in weights.items() if isinstance(v, Tensor)}, left_out


def _only_file_of(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            "SRC", str(folder), f"holds {len(found)} .safetensors files and no index", "Give the file itself as SRC."
        )
    return found[0]


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(str(path), None, f"is corrupt or cut short ({reason})", "Fetch or copy it again.")


class Shell:
    """Stands for a class that a checkpoint names. It keeps the fields as they were stored and does nothing."""

    fields: dict[str, Any]
    """The object's attributes, by name."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = state


# Classes in checkpoints of Lightning and DeepSpeed that hold settings or places, and no code that a conversion needs.
_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def _shells() -> list[Any]:
    """For `torch.serialization.safe_globals`: a class of its own for every name that a pickle may contain."""
    return [(type("Shell", (Shell,), {}), name) for name in _INERT]
