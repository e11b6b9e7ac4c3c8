"""`msdiff evaluate RUN --follow`: each new checkpoint of a run is evaluated, beside the training that makes them.

RUN/evaluations/.followed/step_XXXXXXXX/ holds links to the files of a checkpoint from when it is found until its scores
are recorded. So training may remove the checkpoint meanwhile, and a follower that was killed resumes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from msdiff_dist.apps.evaluation.evaluate import (
    LOSS,
    Evaluation,
    EvaluationRequest,
    check_request,
    evaluate,
    is_recorded,
)
from msdiff_dist.apps.evaluation.subject import FOLLOWED
from msdiff_dist.checkpoint.layout import INDEX, complete_checkpoints, step_of
from msdiff_dist.errors import CheckpointError, ConfigError, DataError
from msdiff_dist.export.weights import open_weights
from msdiff_dist.recipe import Recipe, stored_recipe
from msdiff_dist.training.run_folder import RunFolder

POLL_S = 5.0
"""Seconds between two looks at the run."""
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP)


def follow(request: EvaluationRequest, found: Callable[[Evaluation], None], say: Callable[[str], None]) -> None:
    """Evaluate every checkpoint of the run `request.subject` as it is made, up to that of its last step.

    A checkpoint that is evaluated already, of the same weights and with the same options, is skipped.

    Args:
        found: is given each evaluation. say: shows one line to the user.

    Raises:
        ConfigError, DataError, CheckpointError: the subject is no run, another process follows it, or what `evaluate`
            raises, but for weights that make no images: these are reported, and the next checkpoint is awaited.
    """
    if request.part.of > 1:
        raise ConfigError("--parts", request.part.of, "has no meaning with --follow", "Use --nproc.")
    if request.samples is not None:
        problem = "has no meaning with --follow: images are removed when they are scored"
        raise ConfigError("--samples", str(request.samples), problem, "Leave it out.")
    run = request.subject
    recipe = _recipe_of(run)
    if request.metrics != (LOSS,):
        check_request(request, recipe.reference_images())  # what is missing is found now, not at the first checkpoint
    over: set[tuple[str, int]] = set()  # checkpoints that need no more work, by name and time
    with _alone(run):
        say(f"following {run} up to step {_recipe_of(run).train.steps}")
        while True:
            last = _recipe_of(run).train.steps  # a run that is resumed may have another one
            folder = next((folder for folder in _candidates(run) if _mark(folder) not in over), None)
            if folder is None:
                if any(step_of(Path(name)) >= last for name, _ in over):
                    return
                time.sleep(POLL_S)
                continue
            mark = _mark(folder)
            held = _hold(folder, run / FOLLOWED / folder.name)
            if held is None:
                say(f"skipped {folder.name}: it was removed before it could be evaluated")
                continue
            try:
                sha256 = open_weights(held, ema=request.ema).identity()
                if not is_recorded(run, step_of(folder), request.digest(), sha256):
                    evaluation = evaluate(replace(request, subject=held, samples=held / "images"))
                    assert evaluation is not None
                    found(evaluation)
            except CheckpointError as e:  # diverged or corrupt: those before and after it may be well
                say(f"skipped {folder.name}: {e}")
            over.add(mark)
            shutil.rmtree(held)


def _recipe_of(run: Path) -> Recipe:
    mapping = RunFolder(run).stored_recipe() if run.is_dir() else None
    if mapping is None:
        problem = "is no run, and only a run makes new checkpoints"
        raise DataError("SUBJECT", str(run), problem, "Name a run folder, or leave --follow out.")
    return stored_recipe(mapping)


def _candidates(run: Path) -> list[Path]:
    """The run's checkpoints, and those that are held of a follower that was killed, in order of step."""
    held = {folder.name: folder for folder in complete_checkpoints(run / FOLLOWED) if (folder / INDEX).exists()}
    present = {folder.name: folder for folder in complete_checkpoints(run / "checkpoints")}
    return sorted((held | present).values(), key=step_of)


def _mark(folder: Path) -> tuple[str, int]:
    try:
        return folder.name, (folder / INDEX).stat().st_mtime_ns
    except FileNotFoundError:  # removed this moment
        return folder.name, 0


def _hold(checkpoint: Path, place: Path) -> Path | None:
    """Links in `place` to the files of a checkpoint, which keep them when the checkpoint is removed.

    Returns `place`, None if the checkpoint was removed before they were made.
    """
    if checkpoint == place:
        return place
    if (place / INDEX).exists() and (place / INDEX).read_bytes() == _index_of(checkpoint):
        return place  # of a follower that was killed, perhaps with images
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        # The index last: a folder that has it has all files.
        for file in sorted(checkpoint.iterdir(), key=lambda file: file.name == INDEX):
            _link(file, place / file.name)
    except FileNotFoundError:
        pass
    # A checkpoint loses its name before it loses files.
    if (place / INDEX).exists() and checkpoint.is_dir():
        return place
    shutil.rmtree(place)
    return None


def _index_of(checkpoint: Path) -> bytes | None:
    try:
        return (checkpoint / INDEX).read_bytes()
    except FileNotFoundError:
        return None


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        shutil.copyfile(file, link)  # some file systems have no links between folders


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    folder = run / FOLLOWED
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "is followed by another process"
            raise DataError("SUBJECT", str(run), problem, "Wait for it, or leave --follow out.") from None
        yield
