"""File descriptors of ranks: as many as predicted, and a run that would need too many is refused."""

from __future__ import annotations

import os
import resource
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.distributed.descriptors import descriptors_needed
from msdiff_dist.distributed.environment import process_group
from msdiff_dist.distributed.groups import make_groups
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.errors import UserError

pytestmark = pytest.mark.distributed

JOB = {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}  # this process keeps the store


def opened() -> int:
    """The least of several counts: connections are accepted, and the heartbeat's files closed, by other threads."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.02)
    return min(counts)


def counts(rank: int, world_size: int) -> tuple[int, int, int]:
    """Descriptors that are open without groups, with those of a model of one stage, and with its engines too."""
    from msdiff_dist.distributed.engines import EngineConfig, StageParallelEngines

    before = opened()
    with process_group(WaitLimits(step_s=60, start_s=60)) as env:
        groups = make_groups([[0]] * world_size, rank)
        with_groups = opened()
        config = EngineConfig(
            precision="fp32", zero_shared=1, zero_decoders=1, gradient_accumulation_steps=1, grad_clip=1.0
        )
        StageParallelEngines(nn.Linear(2, 2), {0: nn.Linear(2, 2)}, torch.optim.AdamW, config, groups, env.device)
        dist.barrier()
        return before, with_groups, opened()


def test_as_many_as_predicted() -> None:
    most = {}
    for world_size in (2, 5):
        found = run_ranks(counts, world_size, world_size, preload=PRELOAD, env=JOB, timeout=120)
        assert all(with_engines == with_groups for _, with_groups, with_engines in found), f"a new group: {found}"
        most[world_size] = max(with_groups - before for before, with_groups, _ in found)
        assert max(total for *_, total in found) <= descriptors_needed(world_size, on_gpus=False, keeps_store=False)
    predicted = [descriptors_needed(w, on_gpus=False, keeps_store=False) for w in (2, 5)]
    assert most[5] - most[2] == predicted[1] - predicted[0]


def refusal(rank: int, limit: int, hard: int) -> str | int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with process_group(WaitLimits(step_s=60, start_s=60)):
            make_groups([[0]] * int(os.environ["WORLD_SIZE"]), rank)
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except UserError as e:
        return str(e)


def test_a_run_that_needs_too_many_is_refused() -> None:
    # Without the refusal they would wait for the connections of the second group, which they may not open.
    for said in run_ranks(refusal, 16, 40, 40, preload=PRELOAD, env=JOB, timeout=120):
        assert isinstance(said, str)
        assert said.startswith("ulimit -Hn = 40: a rank of 16 opens up to ")
        assert "Raise the hard limit" in said


def test_the_limit_is_raised_to_what_is_needed() -> None:
    needed = descriptors_needed(2, on_gpus=False, keeps_store=False)
    assert run_ranks(refusal, 2, needed - 20, needed + 20, preload=PRELOAD, env=JOB, timeout=120) == [needed, needed]
