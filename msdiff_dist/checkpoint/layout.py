"""The layout of a checkpoint: ranges of flattened parameters, by name.

checkpoints/step_00000100/
  checkpoint.json               `CheckpointIndex`: step, recipe, every file with size, sha256 and keys
  rank_00000.safetensors ...    one file per rank that wrote; keys are KIND/NAME@START, values 1-D float32

KIND is `param` (fp32 weights), an optimizer moment (`exp_avg`, `exp_avg_sq`, `momentum_buffer`), `gathered` (of
decoders whose gradients wait: their sum, times numbers of samples), `ema`, or, with `ema.power`, `ema_LENGTH`; a folder
`ema_snapshots/step_XXXXXXXX` has the same layout and holds the kinds `ema_LENGTH` alone. NAME is the parameter's name
in the whole model, and START is the index of the range's first element in the flattened parameter. Frozen parameters
have no moments, and their averages are their weights. So nothing depends on world size, ZeRO level or placement. The
position in the data follows from the step: the next sample's number in the stream is (step - data_began) x batch_size,
and data_began is 0 but for some branches of other runs.

A folder named `step_*` is complete. Folders of other names may lie beside it:

  .step_*.partial    being written
  .step_*.replaced   complete; a new checkpoint of the same step is taking its place
  .step_*.old        being removed
  damaged_step_*     found corrupt and put aside
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msdiff_dist.checkpoint.tensor_file import StoredFile, corrupt
from msdiff_dist.checkpoint.what_is import what_is
from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.atomic import rename_to, sync_folder
from msdiff_dist.files.json_text import parse_mapping

FORMAT = 1
INDEX = "checkpoint.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.(step_\d{8,})\.(partial|old|replaced)")


@dataclass(frozen=True, kw_only=True)
class CheckpointIndex:
    """The content of checkpoint.json.

    Attributes:
        step: optimizer steps done.
        batch_size: samples per step, over all ranks.
        loss: the smoothed training loss; None before the first step.
        recipe: the resolved recipe, as plain data.
        shapes: shape of every parameter of the whole model, by name.
        moments: the optimizer's kinds of tensors (`exp_avg`, ...).
        world_size: how many ranks wrote the checkpoint.
        files: the tensor files, with their sizes, checksums and keys.
        data: fingerprint of the data set's shards, by source.
        data_began: the step at which a branch of another run began the data anew, in an order of its own. The position
            in the data is counted from there.
        optimizer_began: by prefix of the parameter names, the step at which the optimizer of a part began of which
            something was frozen before, or which is another one in a branch. Those of other parts began with the run.
        stages: counters of the stages' samples and of their decoders' steps, if not every decoder steps on every batch.
        stage_ends: which stages have ended, and what decides over the others, as `training.stage_ends` stores it.
        format: version of this layout.
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
    data_began: int = 0
    optimizer_began: dict[str, int] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    stage_ends: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def dump(self) -> str:
        """The index as JSON text."""
        content = asdict(self)
        for name in ("data_began", "optimizer_began", "stages", "stage_ends"):
            if not content[name]:  # a key that earlier versions do not know
                del content[name]
        return json.dumps(content, indent=1)

    @staticmethod
    def load(folder: Path) -> CheckpointIndex:
        """Read the index of a checkpoint folder.

        Raises:
            CorruptError: the index is absent or cannot be parsed.
            CheckpointError: it has a newer format.
        """
        path = folder / INDEX
        try:
            raw = parse_mapping(path.read_bytes())
            if raw["format"] > FORMAT:
                raise CheckpointError(
                    "checkpoint", str(path), f"has format {raw['format']}, newer than {FORMAT}",
                    "Use a newer msdiff_dist to read it.",
                )  # fmt: skip
            raw["files"] = [StoredFile(**f) for f in raw["files"]]
            raw["shapes"] = {k: tuple(v) for k, v in raw["shapes"].items()}
            index = CheckpointIndex(**raw)
            _check_types(index)
            return index
        except OSError as e:
            raise corrupt(path, e.strerror or str(e)) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise corrupt(path, "it is not the index that was written") from None


def _check_types(index: CheckpointIndex) -> None:
    """Raise a ValueError at a wrong type. `from_mapping` would take seconds for a million keys."""
    counts = [index.step, index.batch_size, index.world_size, *(f.size for f in index.files)]
    counts += itertools.chain.from_iterable(index.shapes.values())
    counts += itertools.chain.from_iterable(f.keys.values() for f in index.files)
    names = [*index.moments, *itertools.chain.from_iterable((f.name, f.sha256) for f in index.files)]
    if not (set(map(type, counts)) <= {int} and min(counts) >= 0 and set(map(type, names)) <= {str}):
        raise ValueError("a number or a name is of another type")
    if not isinstance(index.loss, (int, float, type(None))) or not isinstance(index.recipe, dict):
        raise ValueError("loss or recipe is of another type")
    if not isinstance(index.stages, dict):
        raise ValueError("the stages' counters are of another type")
    for key in itertools.chain.from_iterable(f.keys for f in index.files):
        parse_key(key)


def key_of(kind: str, name: str, start: int) -> str:
    """Key of one range inside a rank's file."""
    return f"{kind}/{name}@{start}"


def parse_key(key: str) -> tuple[str, str, int]:
    """Inverse of `key_of`: (kind, name, start)."""
    kind, rest = key.split("/", 1)
    name, start = rest.rsplit("@", 1)
    return kind, name, int(start)


def part_of(name: str) -> str:
    """Prefix of the names of all parameters of the part that holds the parameter `name`: `shared.`, `stages.1.`."""
    return ".".join([*name.split(".")[: 2 if name.startswith("stages.") else 1], ""])


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint made after `step` steps."""
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Inverse of `step_folder`."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in a folder, in order of step."""
    if not checkpoints.is_dir():
        return []
    return sorted((p for p in checkpoints.iterdir() if _STEP_FOLDER.fullmatch(p.name)), key=step_of)


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """The checkpoint that a command names.

    Args:
        path: a run folder, its folder `checkpoints` or `ema_snapshots`, a checkpoint, or a file in one.
        step: which of the run's checkpoints; None: the newest.

    Raises:
        CheckpointError: there is none, or none of this step; the error says what is there instead.
    """
    path = path.expanduser()
    if path.is_file() and (path.parent / INDEX).is_file():
        path = path.parent
    if (path / INDEX).exists() and step is None:
        return path
    found = checkpoints_below(path)
    if step is not None:
        steps = ", ".join(str(step_of(p)) for p in found) or "none"
        found = [p for p in found if step_of(p) == step]
        if not found:
            raise CheckpointError("--step", step, f"{path} has no checkpoint of that step", f"It has: {steps}.")
    if not found:
        raise CheckpointError("RUN", str(path), *what_is(path))
    return found[-1]


def checkpoints_below(path: Path) -> list[Path]:
    """The complete checkpoints of the run folder `path`, or in the folder `path` of checkpoints, in order of step."""
    return complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a killed run had begun to write or to remove; bring back what it was about to replace.

    To be called before anything else is read from or written to the folder.
    """
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover:
            folder = checkpoints / leftover[1]
            # The kill came between the two renames of `put_in_place`: the old checkpoint is whole, and the new one
            # is not in its place.
            if leftover[2] == "replaced" and not folder.exists():
                path.rename(folder)
            else:
                shutil.rmtree(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that it is never seen in part."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename `aside`, whose content is on the disk, to the checkpoint `folder`, over the one that may be there.

    After a kill at any moment `remove_leftovers` leaves one of the two under the name `folder`, whole.

    Raises:
        OSError: `folder` holds the old checkpoint, or the new one if only the old one could not be deleted.
    """
    if not folder.exists():
        rename_to(folder, aside)
        return
    # A folder that is not empty cannot be renamed over. So the old one steps aside until the new one has the name.
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    folder.rename(replaced)
    try:
        aside.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(replaced)
