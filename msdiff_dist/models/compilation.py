"""Encoders and decoders compiled by torch.compile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from msdiff_dist.errors import ConfigError

_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"


def compile_part(part: nn.Module) -> None:
    """Have the part's forward pass compiled when it is first called, for the shapes of that call.

    Names of parameters and modules do not change, and hooks on the part run outside the compiled code.
    """
    # Only `forward` is replaced. `part.compile()` would compile the part's hooks as well, and those of DeepSpeed
    # communicate; `torch.compile(part)` would put a prefix before the names of parameters.
    part.forward = torch.compile(part.forward, dynamic=False)


def keep_compiled_code(folder: Path) -> None:
    """Keep what the compiler makes in `folder`, from which later starts take it; TORCHINDUCTOR_CACHE_DIR goes first."""
    # Torch sets the variable itself, to a folder below the one for temporary files, once some of its modules are
    # imported: that value is not the user's.
    if os.environ.get(_CACHE_DIR) in (None, default_cache_dir()):
        os.environ[_CACHE_DIR] = str(folder.resolve())


def check_compiler() -> None:
    """Raise `ConfigError` unless this machine has the C++ compiler that torch.compile needs."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in candidates):
        raise ConfigError(
            "train.compile", True, f"there is no C++ compiler ({', '.join(candidates)}) on this machine",
            "Install g++, name one in CXX, or set train.compile to false.",
        )  # fmt: skip
