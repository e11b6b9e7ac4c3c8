"""Images of a model sampled into a folder by several processes of this machine."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from msdiff_dist.data.worker_processes import end_with_parent
from msdiff_dist.distributed.cores import cores, threads_of
from msdiff_dist.errors import MsdiffError
from msdiff_dist.evaluation.sample_folder import sample_run
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.files.work_share import Part


def sample_images(run: Path, out: Path, job: SamplingJob, ema: bool, nproc: int, part: Part) -> bool:
    """Make the images of a job, or a part of them, in `nproc` processes; the same command resumes.

    Returns whether all images of the job are there.

    Raises:
        MsdiffError: a process died; or what `sample_run` raises.
    """
    if nproc == 1:
        return sample_run(run, out, job, ema, part, option="--samples")[1]
    # Parts of this part, so that processes on several machines and on this one divide the same batches.
    shares = [Part(part.number * nproc + i, part.of * nproc) for i in range(nproc)]
    own = cores()
    # Not fork: CUDA does not work in a fork of a process that has used it.
    with ProcessPoolExecutor(
        nproc, multiprocessing.get_context("forkserver"), _start, (threads_of(own, [own] * nproc),)
    ) as pool:
        futures = [pool.submit(_sample, i, (run, out, job, ema, share)) for i, share in enumerate(shares)]
        try:
            complete = [future.result() for future in futures]  # of all, also of those after the one that saw the last
        except BrokenProcessPool:
            raise MsdiffError("a sampling process died. Give the same command again to resume") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return any(complete)


def _start(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


def _sample(number: int, arguments: tuple[Path, Path, SamplingJob, bool, Part]) -> bool:
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    return sample_run(*arguments, option="--samples")[1]
