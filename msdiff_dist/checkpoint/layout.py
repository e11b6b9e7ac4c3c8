"""One layout for everything a run keeps: stretches of flattened parameters, by name.

checkpoints/step_00000100/
  checkpoint.json               step, format, files with sizes and sha256, optimizer steps, the recipe
  rank_00000.safetensors ...    one file per rank that wrote; keys are KIND/NAME@START, values 1-D float32

KIND is `param` (fp32 weights), an optimizer moment (`exp_avg`, `exp_avg_sq`, `momentum_buffer`) or `ema`. NAME is the
parameter's name in the whole model and START where in the flattened parameter the stretch begins, so that nothing
depends on world size, ZeRO stage or placement.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msdiff_dist.errors import CheckpointError

FORMAT = 1
INDEX = "checkpoint.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class CheckpointIndex:
    """What checkpoint.json says. shapes: of every parameter by name. moments: the optimizer's kinds of tensors."""

    step: int
    recipe: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    moments: list[str]
    world_size: int
    files: list[StoredFile] = field(default_factory=list)
    format: int = FORMAT

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def load(folder: Path) -> CheckpointIndex:
        """Read the index of a checkpoint folder.

        Raises:
            CheckpointError: absent, not JSON, or of a newer format.
        """
        path = folder / INDEX
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(str(folder), None, f"has no {INDEX}", "Name a complete checkpoint.") from None
        except json.JSONDecodeError as e:
            raise CheckpointError(str(path), None, f"is damaged ({e})", "Use another checkpoint.") from None
        if raw.get("format", 0) > FORMAT:
            raise CheckpointError(
                str(path), raw["format"], f"is of a newer format than {FORMAT}", "Use a newer msdiff_dist to read it."
            )
        raw["files"] = [StoredFile(**f) for f in raw["files"]]
        raw["shapes"] = {k: tuple(v) for k, v in raw["shapes"].items()}
        return CheckpointIndex(**raw)


def key_of(kind: str, name: str, start: int) -> str:
    """Key of one stretch inside a rank's file."""
    return f"{kind}/{name}@{start}"


def parse_key(key: str) -> tuple[str, str, int]:
    """Inverse of `key_of`: (kind, name, start)."""
    kind, rest = key.split("/", 1)
    name, start = rest.rsplit("@", 1)
    return kind, name, int(start)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint made after `step` steps."""
    return checkpoints / f"step_{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Every complete checkpoint, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if _STEP_FOLDER.fullmatch(p.name) and (p / INDEX).exists()]
    return sorted(found, key=lambda p: int(p.name.split("_")[1]))


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
