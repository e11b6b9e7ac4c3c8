"""One layout for everything a run keeps: stretches of flattened parameters, by name.

checkpoints/step_00000100/
  checkpoint.json               `CheckpointIndex`: step, recipe, every file with size, sha256 and keys
  rank_00000.safetensors ...    one file per rank that wrote; keys are KIND/NAME@START, values 1-D float32

KIND is `param` (fp32 weights), an optimizer moment (`exp_avg`, `exp_avg_sq`, `momentum_buffer`), `ema`, or, with
`ema.power`, `ema_LENGTH`; `ema_snapshots/step_XXXXXXXX` are checkpoints of these last alone. NAME is the
parameter's name in the whole model and START where in the flattened parameter the stretch begins, so that nothing
depends on world size, ZeRO stage or placement. The position in the data is the step: sample numbers begin at
step x batch_size.

A folder of that name is complete. Beside it may lie `.step_*.partial`, being written, `.step_*.old`, being removed, and
`damaged_step_*`, found corrupt and put aside.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msdiff_dist.checkpoint.tensor_file import StoredFile, corrupt
from msdiff_dist.errors import CheckpointError

FORMAT = 1
INDEX = "checkpoint.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(partial|old)")


@dataclass(frozen=True, kw_only=True)
class CheckpointIndex:
    """What checkpoint.json says.

    batch_size: global. loss: the training loss, smoothed; None before the first step. shapes: of every parameter by
    name. moments: the optimizer's kinds of tensors. world_size: ranks that wrote it. data: marks of the
    data set's shards, by source.
    """

    step: int
    batch_size: int
    loss: float | None
    recipe: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    moments: list[str]
    world_size: int
    files: list[StoredFile] = field(default_factory=list)
    data: list[list[str]] = field(default_factory=list)
    format: int = FORMAT

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def load(folder: Path) -> CheckpointIndex:
        """Read the index of a checkpoint folder.

        Raises:
            CorruptError: absent, or not what was written. CheckpointError: of a newer format.
        """
        path = folder / INDEX
        try:
            raw = json.loads(path.read_text())
            if raw["format"] > FORMAT:
                raise CheckpointError(
                    "checkpoint", str(path), f"has format {raw['format']}, newer than {FORMAT}",
                    "Use a newer msdiff_dist to read it.",
                )  # fmt: skip
            raw["files"] = [StoredFile(**f) for f in raw["files"]]
            raw["shapes"] = {k: tuple(v) for k, v in raw["shapes"].items()}
            return CheckpointIndex(**raw)
        except OSError as e:
            raise corrupt(path, e.strerror or str(e)) from None
        except (ValueError, KeyError, TypeError):
            raise corrupt(path, "it is not the index that was written") from None


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


def step_of(folder: Path) -> int:
    """Inverse of `step_folder`."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Every checkpoint, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((p for p in checkpoints.iterdir() if _STEP_FOLDER.fullmatch(p.name)), key=step_of)


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """A checkpoint of a run folder, the newest or the one of `step`, or `path` itself if it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if (path / INDEX).exists() and step is None:
        return path
    found = complete_checkpoints(path / "checkpoints")
    if step is not None:
        steps = ", ".join(str(step_of(p)) for p in found) or "none"
        found = [p for p in found if step_of(p) == step]
        if not found:
            raise CheckpointError("--step", step, f"{path} has no checkpoint of that step", f"It has: {steps}.")
    if not found:
        raise CheckpointError("RUN", str(path), "holds no complete checkpoint", "Name a run folder that has trained.")
    return found[-1]


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a killed run had begun to write or to remove."""
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that it is never seen in part."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)
