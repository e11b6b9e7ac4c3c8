"""Held-out samples in a file of the run folder: read from the shards once, and the same for every later evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from msdiff_dist.data.samples import Samples
from msdiff_dist.errors import RunFolderError
from msdiff_dist.files.atomic import atomic_write

HELD_OUT = "held_out.safetensors"
_COLUMNS = {"x": "x_nCHW", "label": "label_n", "context": "context_nTC"}


def write_held_out(path: Path, samples: Samples) -> None:
    """Write samples as the shards store them, with their names."""
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(column))
        for name, field in _COLUMNS.items()
        if (column := getattr(samples, field)) is not None
    }
    atomic_write(path, save(tensors, {"keys": json.dumps(samples.key_n.tolist())}))


def read_held_out(path: Path) -> Samples:
    """The samples of `write_held_out`.

    Raises:
        RunFolderError: the file is missing or corrupt.
    """
    try:
        with safe_open(path, "pt") as file:
            keys = json.loads((file.metadata() or {})["keys"])
            held = {_COLUMNS[name]: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        return Samples(key_n=np.array(keys, dtype=object), **held)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise RunFolderError(
            "--run-dir", str(path), f"cannot be read ({' '.join(str(e).split())[:200]})",
            "Remove it: the next start writes it again.",
        ) from e  # fmt: skip
