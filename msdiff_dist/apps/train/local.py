"""Training on several ranks of this machine, each with a log of its own."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path
from typing import Any

from msdiff_dist.apps.train.branch import Branch
from msdiff_dist.apps.train.found_data import FoundData
from msdiff_dist.distributed.cores import cores, threads_of
from msdiff_dist.distributed.spawn import RankDiedError, report_error, run_ranks
from msdiff_dist.errors import MsdiffError, TrainingError
from msdiff_dist.recipe import recipe_from

# What every rank imports; all but the first are pulled in late, by the first use of DeepSpeed and torch.
PRELOAD = (
    "msdiff_dist.apps.train.rank",
    "torch._dynamo",
    "torch._refs",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "fairscale.nn",
)
_SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # at these every rank saves at the next step and ends


def run_local(
    recipe: dict[str, Any],
    run_dir: Path,
    nproc: int,
    found: FoundData | None = None,
    branch: Branch | None = None,
) -> str:
    """Train on `nproc` ranks of this machine; returns the outcome of `run_rank`.

    Rank 0 prints its progress on this terminal; what the ranks print otherwise goes to the run folder's logs.

    Args:
        recipe: the resolved recipe as plain data.
        found: the recipe's data, if the command has read them; None: rank 0 reads them.
        branch: the run to begin from, if `run_dir` is a new run.

    Raises:
        UserError, TrainingError: the error of the rank that failed first.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # a process of its own keeps the store: rank 0 must not open one
    own = cores()
    env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads_of(own, [own] * nproc))
    try:
        return str(
            run_ranks(_train, nproc, recipe, run_dir, found, branch, preload=PRELOAD, env=env, signals=_SAVING)[0]
        )
    except RankDiedError as e:
        raise TrainingError(
            f"{e}; its log is {_log(run_dir, e.rank)}. Run the same command again to resume from the newest checkpoint"
        ) from None


def _train(rank: int, recipe: dict[str, Any], run_dir: Path, found: FoundData | None, branch: Branch | None) -> str:
    """Body of one rank's process."""
    # File descriptors are redirected, not `sys.stdout`, so that output of native code (NCCL) reaches the log too.
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    with _log(run_dir, rank).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def lost(error: TrainingError) -> None:
        report_error(error)
        print_error(error)

    try:
        from msdiff_dist.apps.train.rank import run_rank  # here, so that what its libraries print is in the log
        from msdiff_dist.distributed.environment import print_error

        return run_rank(recipe_from(recipe), run_dir, terminal, found=found, branch=branch, lost=lost)
    except MsdiffError:
        traceback.print_exc()
        raise
    except Exception as e:
        traceback.print_exc()
        about = f"rank {rank} failed: {type(e).__name__}: {e} (see {_log(run_dir, rank)})"
        raise TrainingError(about) from None


def _log(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank}.log"
