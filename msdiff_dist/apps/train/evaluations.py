"""Evaluations of a run that is trained: its ranks sample between steps, and a process of rank 0 computes the scores.

RUN/evaluations/.training/step_XXXXXXXX/ holds the averages of the step that is evaluated, in the layout of a
checkpoint, and the images so far; it is removed when the scores are recorded. So a run that was killed goes on with its
evaluation. What is evaluated of a step past the checkpoint that the run resumes from is evaluated anew.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from msdiff_dist.apps.evaluation.during import IMAGES, check_evaluation, request_of, start_scoring
from msdiff_dist.apps.evaluation.evaluate import RECORDS, is_recorded, sampled_by
from msdiff_dist.apps.evaluation.subject import TRAINING
from msdiff_dist.apps.train.sliced import SlicedWork
from msdiff_dist.checkpoint.layout import CheckpointIndex, complete_checkpoints, remove_leftovers, step_folder, step_of
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.save import HostCopy, write_checkpoint
from msdiff_dist.distributed.agree import combined, from_rank_0, on_rank_0
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.object_exchange import own_exchange
from msdiff_dist.errors import MsdiffError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.grid import class_labels
from msdiff_dist.evaluation.sample_folder import image_path, write_image
from msdiff_dist.export.weights import CheckpointWeights
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.files.work_share import Part
from msdiff_dist.recipe import Recipe, stored_recipe
from msdiff_dist.training.sinks import Sinks

_LOOK_S = 5.0  # between two looks at the records
_UNHURRIED_S = 60.0
_WRITERS = 16  # threads, as `msdiff sample` has
_LOG = "scoring.log"


class RunEvaluations:
    """The evaluations of a run, on one rank. Collective: every rank makes it, and calls its methods, in one order.

    Args:
        run: the run folder.
        step: steps done when the run begins or is resumed.

    Attributes:
        active: the step whose images are being sampled; None: none is.
        seconds: for which training stood still for the newest evaluation.

    Raises:
        UserError: on every rank, if weights or reference of the evaluations are missing.
    """

    def __init__(self, recipe: Recipe, run: Path, step: int, env: Environment) -> None:
        self._config, self._run, self._env, self._began = recipe.evaluation, run, env, step
        self._total = recipe.train.steps
        self.active: int | None = None
        self.seconds = 0.0
        self._work: SlicedWork | None = None
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None
        self._scoring: tuple[int, subprocess.Popen[bytes]] | None = None
        self._to_score: deque[int] = deque()
        self._news = _News(run / RECORDS, step) if env.rank == 0 else None
        self._exchange = own_exchange("evaluations") if self._config.every else None
        if self._config.every:
            on_rank_0(lambda: check_evaluation(recipe.evaluation, recipe.reference_images()))
            self.active = on_rank_0(self._unfinished)
        elif env.rank == 0:
            shutil.rmtree(run / TRAINING, ignore_errors=True)  # of an earlier start with evaluations

    def forget_later(self) -> None:
        """Drop evaluations during training of steps past those done: they will be trained in another way. Rank 0."""
        file = self._run / RECORDS
        if not file.exists():
            return
        lines = file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not _of_training_past(line, self._began)]
        if len(kept) < len(lines):
            atomic_write(file, b"".join(kept))
            self._news = _News(file, self._began)

    def due(self, step: int) -> bool:
        """Whether an evaluation is to begin after `step` steps."""
        every = self._config.every
        return every > 0 and step > 0 and (step == self._total or step % every == 0)

    def begin(self, step: int, copy: HostCopy, index: CheckpointIndex, sinks: Sinks) -> None:
        """Begin the evaluation of this step, whose averages a thread writes, unless there is one or it has none to do.

        Args:
            copy: of this rank's shards, for this evaluation alone.
        """
        asked = request_of(self._config, Path()).digest()
        if self.active == step or on_rank_0(lambda: is_recorded(self._run, step, asked)):
            return
        while self.active is not None and step == self._total:  # no training waits any more
            self.go_on(None, sinks)
        if self.active is not None:
            sinks.say(f"evaluation of step {step} skipped: that of step {self.active} is under way")
            return
        self.active, self.seconds = step, 0.0
        pieces = copy.take(["ema"])

        def write() -> None:
            assert self._exchange is not None
            try:
                write_checkpoint(self._folder(step), pieces, index, self._exchange)
            except Exception as e:
                self._error = e

        self._writing = threading.Thread(target=write, daemon=True)
        self._writing.start()

    def go_on(self, seconds: float | None, sinks: Sinks) -> float:
        """Sample for at most so many seconds, a minute if None: no training waits. Returns how many it took."""
        assert self.active is not None
        start = time.perf_counter()
        done, failed = combined(self._slice(seconds), _together)
        if failed:
            sinks.say(f"warning: evaluation of step {self.active} ended ({failed}); training goes on")
        if failed or done:
            if self._env.rank == 0:
                self._to_score += [] if failed else [self.active]
                if failed:
                    shutil.rmtree(self._folder(self.active), ignore_errors=True)
            self._end_work()
            self.active = None
        stood_still = time.perf_counter() - start
        self.seconds += stood_still
        return stood_still

    def look(self, sinks: Sinks, now: bool = False) -> None:
        """Give the sinks what was recorded since the last look; begin and end the scoring process. Not collective."""
        if self._news is None:
            return
        if self._scoring and self._scoring[1].poll() is not None:
            (step, process), self._scoring, now = self._scoring, None, True
            if process.returncode == 0:
                shutil.rmtree(self._folder(step))
            else:
                sinks.say(f"warning: evaluation of step {step} failed ({self._reason(step)}); training goes on")
        if self._to_score and not self._scoring:
            step = self._to_score.popleft()
            with (self._folder(step) / _LOG).open("wb") as log:
                self._scoring = step, start_scoring(self._folder(step), log)
        for record in self._news.read(now):
            sinks.evaluation(record)

    def finish(self, sinks: Sinks, stop_requested: Callable[[], bool]) -> None:
        """Wait for the evaluation under way, and its scores, unless rank 0 is asked to stop."""

        def busy() -> bool:
            self.look(sinks, now=True)
            return bool(self.active or self._scoring or self._to_score) and not stop_requested()

        while from_rank_0(busy()):
            if self.active is not None:
                self.go_on(None, sinks)
            else:
                time.sleep(0.2)

    def close(self, wait: bool) -> None:
        """End what is under way. The next start of the run goes on with it.

        Args:
            wait: for averages that are being written; the other ranks do, too.
        """
        if self._writing and wait:
            self._writing.join()
        if self._scoring:
            self._scoring[1].kill()
            self._scoring[1].wait()
        self._end_work()

    def _folder(self, step: int) -> Path:
        return step_folder(self._run / TRAINING, step)

    def _unfinished(self) -> int | None:
        """The step whose evaluation goes on, after others are removed: of steps to be trained again. For rank 0."""
        remove_leftovers(self._run / TRAINING)
        found = complete_checkpoints(self._run / TRAINING)
        for folder in found:
            if step_of(folder) > self._began:
                shutil.rmtree(folder)
        steps = [step_of(folder) for folder in found if step_of(folder) <= self._began]
        # All but the newest have their images: one begins when the one before it has them.
        self._to_score += steps[:-1]
        return steps[-1] if steps else None

    def _slice(self, seconds: float | None) -> tuple[bool, str | None]:
        """Whether this rank's images are there, and why it cannot make them."""
        try:
            if self._writing is not None:
                if seconds is None:
                    self._writing.join()
                if self._writing.is_alive():
                    return False, None
                self._writing = None
                if self._error is not None:
                    raise self._error
            if self._work is None:
                self._work = SlicedWork(self._sample)
            try:
                return self._work.run(_UNHURRIED_S if seconds is None else seconds), None
            finally:
                if self._env.device.type == "cuda":
                    torch.cuda.empty_cache()  # training needs blocks of other sizes
        # Images are worth less than training, which goes on without these.
        except (MsdiffError, OSError, torch.OutOfMemoryError) as e:
            return True, f"rank {self._env.rank}: {' '.join(str(e).split())[:500]}"

    def _sample(self, may_stop: Callable[[], None]) -> None:
        """Make this rank's images that are not there."""
        assert self.active is not None
        folder, device = self._folder(self.active), self._env.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        weights = CheckpointWeights(CheckpointReader(folder))
        recipe = stored_recipe(dict(weights.reader.index.recipe))  # which may have changed since
        job = sampled_by(request_of(recipe.evaluation, folder), weights, recipe.reference_images())
        (folder / IMAGES).mkdir(exist_ok=True)
        # Every rank that samples reads the whole model from the shared disk, so only as many do as there are batches.
        ranks = min(self._env.world_size, len(job.batches))
        mine = Part(self._env.rank, ranks).share(job.batches) if self._env.rank < ranks else []
        paths = [image_path(folder / IMAGES, i) for i in range(job.num)]
        missing = [index_n for index_n in mine if not all(paths[i].exists() for i in index_n)]
        if not missing:
            return
        may_stop()
        generator = ImageGenerator(weights, device)

        def called() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the host is ahead, and would measure its own time
            may_stop()

        may_stop()
        with ThreadPoolExecutor(_WRITERS) as writers:
            for index_n in missing:
                labels = class_labels(index_n, generator.num_classes)
                images = generator(index_n, job.sampler, job.seed, labels, job.prompts, called)
                list(writers.map(write_image, images, [paths[i] for i in index_n]))
                may_stop()

    def _end_work(self) -> None:
        if self._work is not None:
            self._work.close()
            self._work = None
        self._error = None

    def _reason(self, step: int) -> str:
        """The last line that the scoring process wrote."""
        lines = (self._folder(step) / _LOG).read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it was killed'}; see {self._folder(step) / _LOG}"


class _News:
    """Reads what is added to a file of records.

    Args:
        step: records of steps up to this one that are there already are not news.
    """

    def __init__(self, file: Path, step: int) -> None:
        self._file, self._read, self._looked = file, 0, time.monotonic() - _LOOK_S
        self._step: int | None = step

    def read(self, now: bool) -> list[dict[str, Any]]:
        """The new records, if it is time to look for them or if `now`."""
        if not now and time.monotonic() - self._looked < _LOOK_S:
            return []
        self._looked = time.monotonic()
        if not self._file.is_file() or self._file.stat().st_size <= self._read:
            return []
        with self._file.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]  # a line that is being written is for the next look
        self._read += len(new)
        records = []
        for line in new.splitlines():
            with contextlib.suppress(ValueError):  # what is no record is not shown; `msdiff compare` names it
                records.append(parse_mapping(line))
        known, self._step = self._step, None
        return [r for r in records if isinstance(r.get("step"), int) and (known is None or r["step"] > known)]


def _together(of_ranks: list[tuple[bool, str | None]]) -> tuple[bool, str | None]:
    return all(done for done, _ in of_ranks), next((failed for _, failed in of_ranks if failed), None)


def _of_training_past(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return bool(record.get("during_training")) and record.get("step", 0) > step
