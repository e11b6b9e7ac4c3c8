"""A run that begins from a checkpoint of another run, with another recipe: `msdiff train --branch NEW_RUN`.

The new run gets a copy of the checkpoint, in which recipe, batch size and fingerprint of the data are its own; from
there on it is a run like any other. RUN/branched_from.json says where it came from. The old run is only read.

The new run's recipe.yaml is written last. So a folder with branched_from.json and without recipe.yaml was left by a
kill, and the same command does all of it again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msdiff_dist.apps.train.found_data import FoundData, find_data
from msdiff_dist.apps.train.phases import Restart
from msdiff_dist.apps.train.warm_start import architecture
from msdiff_dist.checkpoint.layout import INDEX, CheckpointIndex, complete_checkpoints, find_checkpoint, part_of
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.tensor_file import CorruptError
from msdiff_dist.config import differences
from msdiff_dist.data.fingerprint import changes, fingerprint_shards
from msdiff_dist.errors import CheckpointError, ConfigError, RunFolderError
from msdiff_dist.files.atomic import atomic_folder, atomic_write, writing
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.recipe import Recipe, comparable_mapping, recipe_mapping, stored_recipe
from msdiff_dist.training.optimizer import OPTIMIZERS
from msdiff_dist.training.run_folder import ORIGIN, RunFolder

_ORDER = ("train.seed", "data.kind", "data.lanes", "data.shuffle")  # besides sources, shards and the batch size


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The content of branched_from.json.

    Attributes:
        run: the old run's folder.
        step: of the checkpoint that the new run began from.
        digest: sha256 of that checkpoint's checkpoint.json, which holds those of its files.
        data: `goes on` where the old run was in its data, or `begins anew` at sample 0.
        because: what makes it begin anew.
        changed: (field, old value, new value) of each recipe field that differs.
        notes: what else the new run does not take over.
        time: seconds since 1970.
    """

    run: str
    step: int
    digest: str
    data: str
    because: list[str]
    changed: list[tuple[str, Any, Any]]
    notes: list[str]
    time: float

    @staticmethod
    def of(run: Path) -> Origin | None:
        """Where the run in folder `run` came from; None if it is no branch."""
        path = run / ORIGIN
        return Origin(**json.loads(path.read_text())) if path.exists() else None

    def lines(self) -> Iterator[str]:
        """For the user, as the new run begins."""
        why = f" ({'; '.join(self.because)})" if self.because else ""
        where = (
            "goes on in its data where that run was" if self.data == "goes on" else "begins its data anew at sample 0"
        )
        yield f"branched from {self.run} at step {self.step}; {where}{why}"
        yield from self.notes


@dataclass(frozen=True)
class Branch:
    """What `--branch` asks for.

    Attributes:
        old: the run to branch from.
        step: of its checkpoint; None: the newest intact one.
    """

    old: Path
    step: int | None = None

    def check(self, recipe: Recipe, new: Path) -> None:
        """Refuse what cannot be branched, or resumed as this branch. Writes nothing.

        Raises:
            UserError: naming the option or the fields.
        """
        if not self.is_made(new):
            _, index = self._newest({})
            self._check_fits(index, recipe, new)

    def precision(self, new: Path) -> str:
        """The precision that the new run goes on in: its own, or the old run's."""
        stored = RunFolder(new).stored_recipe() or self._newest({})[1].recipe
        return str(stored["train"]["precision"])

    def begin(self, recipe: Recipe, folder: RunFolder, world_size: int, found: FoundData | None) -> Origin:
        """Give a new run its checkpoint and its origin. For one process, which has locked `folder`.

        Args:
            world_size: ranks of the new run.
            found: the recipe's data, if they have been read.

        Raises:
            UserError: as `check`; or no checkpoint is intact, or the data cannot be read.
        """
        tried: dict[str, str] = {}
        while True:
            checkpoint, index = self._newest(tried)
            self._check_fits(index, recipe, folder.path)
            begun, origin = _begun(checkpoint, index, recipe, world_size, found)
            in_use = ["that run is being trained by another process"] if RunFolder(self.old).in_use() else []
            not_intact = [f"{name} of that run was passed over: {problem}" for name, problem in tried.items()]
            origin = replace(origin, run=str(self.old.resolve()), notes=[*in_use, *not_intact, *origin.notes])
            with writing("--branch", folder.path, RunFolderError):
                atomic_write(folder.path / ORIGIN, json.dumps(asdict(origin), indent=1) + "\n")
                shutil.rmtree(folder.checkpoints, ignore_errors=True)  # what a kill left
                folder.checkpoints.mkdir()
                try:
                    with atomic_folder(folder.checkpoints / checkpoint.name) as aside:
                        _copy(checkpoint, index, aside, begun)
                except CorruptError as e:
                    tried[checkpoint.name] = f"{e.value} {e.problem}"
                    continue
            return origin

    def is_made(self, new: Path) -> bool:
        """Whether `new` is this branch already, so that it is resumed and the old run is not needed.

        Raises:
            RunFolderError: it is something else.
        """
        old, inside = self.old.resolve(), new.resolve()
        if inside == old or inside.is_relative_to(old) or old.is_relative_to(inside):
            where = "is the run to branch from" if inside == old else "and the run to branch from lie in each other"
            raise RunFolderError("--branch", str(new), where, "Name a folder outside it; the old run stays as it is.")
        is_run, origin = RunFolder(new).recipe_file.exists(), Origin.of(new)
        if origin is None and not is_run:
            return False
        what = f"a branch of {origin.run} at step {origin.step}" if origin else "a run of its own"
        wanted = f"the branch of {old}" + (f" at step {self.step}" if self.step is not None else "")
        if origin is None or origin.run != str(old) or self.step not in (None, origin.step):
            remedy = f"Name a new folder, or resume this run with --run-dir {new} and without --branch."
            raise RunFolderError("--branch", str(new), f"is {what}, not {wanted}", remedy)
        return is_run

    def _newest(self, tried: dict[str, str]) -> tuple[Path, CheckpointIndex]:
        """The old run's checkpoint to begin from, and its index. `tried` gets the names of those that are not intact.

        A checkpoint that is gone counts as not intact: the old run may be training, and remove old ones.
        """
        if not self.old.is_dir():
            raise RunFolderError("--run-dir", str(self.old), "no such run to branch from", "Correct the path.")
        while True:
            every = complete_checkpoints(self.old / "checkpoints") if self.step is None else [self._of_step(self.step)]
            found = [path for path in every if path.name not in tried]
            if not found:
                problem = "; ".join(tried.values()) or "holds no complete checkpoint to branch from"
                raise CheckpointError("--run-dir", str(self.old), problem, "Train it first, or name another run.")
            try:
                return found[-1], CheckpointIndex.load(found[-1])
            except CorruptError as e:
                tried[found[-1].name] = f"{e.value} {e.problem}"

    def _of_step(self, step: int) -> Path:
        try:
            return find_checkpoint(self.old, step)
        except CheckpointError as e:
            raise CheckpointError("--branch-from", step, e.problem, e.remedy) from None

    def _check_fits(self, index: CheckpointIndex, recipe: Recipe, new: Path) -> None:
        """Refuse a recipe whose model or stages, at that step, are not those of the checkpoint."""
        before, recipe = stored_recipe(index.recipe), Restart(recipe, _with_ends_of(recipe, index)).before
        changed = [
            (f"model.{f}", a, b) for f, a, b in differences(architecture(before.model), architecture(recipe.model))
        ]
        if before.stages.boundaries != recipe.stages.boundaries:
            changed.append(("stages.boundaries", list(before.stages.boundaries), list(recipe.stages.boundaries)))
        old, now = ([r.guide.features, r.guide.path, r.guide.width] if r.guide else None for r in (before, recipe))
        if old != now:
            changed.append(("guide", old, now))
        if changed:
            lines = "; ".join(f"{f} was {a!r}, now {b!r}" for f, a, b in changed)
            raise RunFolderError(
                "--branch", str(new), f"cannot take over the weights of {self.old}: {lines}",
                "Restore these fields. Other models begin from an export: see train.init_from and `msdiff grow`.",
            )  # fmt: skip


def branched(run_dir: Path, new: Path | None, step: int | None) -> tuple[Path, Branch | None]:
    """The run folder that a command means by --run-dir, --branch and --branch-from, and the branch it asks for.

    Raises:
        ConfigError: --branch-from without --branch.
    """
    if new is not None:
        return new, Branch(run_dir, step)
    if step is not None:
        raise ConfigError("--branch-from", step, "needs a run to branch into", "Add --branch NEW_RUN.")
    return run_dir, None


def _begun(
    checkpoint: Path, index: CheckpointIndex, recipe: Recipe, world_size: int, found: FoundData | None
) -> tuple[CheckpointIndex, Origin]:
    """The index of the new run's first checkpoint, and its origin, without the old run's path."""
    had_ended, index = index.stage_ends, _with_ends_of(recipe, index)
    at_step = Restart(recipe, index).before
    before, now = comparable_mapping(index.recipe), comparable_mapping(recipe_mapping(at_step))
    fingerprint = fingerprint_shards((found or find_data(recipe.data)).shards)
    batch_size = recipe.train.batch_size(world_size)
    changed = differences(before, now)
    because = [f"{f} was {a!r}, now {b!r}" for f, a, b in changed if f in _ORDER]
    weights = [[source.weight for source in r.data.mixed] for r in (stored_recipe(index.recipe), recipe)]
    if weights[0] != weights[1]:
        because.append(f"sources had the weights {weights[0]}, now {weights[1]}")
    if index.batch_size != batch_size:
        because.append(f"the global batch was {index.batch_size}, now {batch_size}")
    because += [f"shards: {change}" for change in changes(index.data, fingerprint)]
    notes = []
    if had_ended.get("ended") and not index.stage_ends:
        stages = ", ".join(sorted(had_ended["ended"]))
        notes.append(f"stages.end is another: stage {stages} had ended, and trains as the new recipe says")
    begun = replace(index, recipe=recipe_mapping(at_step), batch_size=batch_size, data=fingerprint)
    if because:
        begun = replace(begun, data_began=index.step)
    if _kinds_of_moments(before) != _kinds_of_moments(now):
        notes.append("the optimizer is another: its moments begin at zero")
        began = {part_of(name): index.step for name in index.shapes}
        begun = replace(begun, moments=[], optimizer_began=began)
    held = {key.split("/")[0] for file in index.files for key in file.keys}
    wanted = {f"ema_{length}" for length in (recipe.ema.power.lengths if recipe.ema.power else ())}
    if new := sorted(wanted - held):
        notes.append(f"{', '.join(new)}: averages that the checkpoint does not have begin at its weights")
    origin = Origin(
        run="",
        step=index.step,
        digest=sha256_of(checkpoint / INDEX),
        data="begins anew" if because else "goes on",
        because=because,
        changed=changed,
        notes=notes,
        time=time.time(),
    )
    return begun, origin


def _with_ends_of(recipe: Recipe, index: CheckpointIndex) -> CheckpointIndex:
    """The index, without what it knows of its stages' ends if another rule ends those of `recipe`: they train again."""
    same = stored_recipe(index.recipe).stages.end == recipe.stages.end
    return index if same else replace(index, stage_ends={})


def _kinds_of_moments(recipe: dict[str, Any]) -> tuple[str, int]:
    config = stored_recipe(recipe).optimizer
    return config.name, OPTIMIZERS[config.name].moments(config)


def _copy(checkpoint: Path, index: CheckpointIndex, aside: Path, begun: CheckpointIndex) -> None:
    """Copy a checkpoint's files, each compared with its checksum, and write another index to them.

    Raises:
        CorruptError: a file is corrupt, or gone: a run that is being trained removes old checkpoints.
    """
    for file in index.files:
        try:
            shutil.copyfile(checkpoint / file.name, aside / file.name)
        except FileNotFoundError:
            raise CorruptError("checkpoint", str(checkpoint / file.name), "is gone", "Try again.") from None
    (aside / INDEX).write_text(begun.dump())
    CheckpointReader(aside).verify()
