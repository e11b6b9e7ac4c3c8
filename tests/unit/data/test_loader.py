"""Steps of the loader: independent of ranks, workers and the batch at which reading starts."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msdiff_dist.data.config import DataConfig, SourceConfig
from msdiff_dist.data.index import Shard
from msdiff_dist.data.loader import StepLoader, _RankDataset, _Schedule
from msdiff_dist.data.step_samples import merged_parts
from msdiff_dist.errors import ConfigError, DataError


def config_of(folder, **fields) -> DataConfig:
    settings = {"kind": "latent", "latent_shape": (1, 1, 1), "latent_dtype": "float32", "num_classes": 7, "shuffle": 5}
    return DataConfig(shards=str(folder), **{**settings, **fields})


def batches(config, B, steps, world_size=1, start_step=0, seed=0) -> list[list[str]]:
    """The keys of global batches, put together from all ranks; checks every rank's part on the way."""
    loaders = [StepLoader(config, seed, B, rank, world_size, start_step) for rank in range(world_size)]
    found = []
    for step in range(start_step, start_step + steps):
        keys = [""] * B
        for rank, loader in enumerate(loaders):
            part = next(loader)
            assert part.batch == step
            assert part.index_n.tolist() == np.flatnonzero(loader.source_rank(step) == rank).tolist()
            assert part.x_nCHW.flatten().tolist() == [int(key) for key in part.keys]
            assert part.label_n is not None
            assert part.label_n.tolist() == [int(key) % 7 for key in part.keys]
            for i, key in zip(part.index_n.tolist(), part.keys, strict=True):
                keys[i] = key
        found.append(keys)
    for loader in loaders:
        loader.close()
    return found


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0),
    world_size=st.integers(1, 8),
    lanes_per_rank=st.integers(1, 8),
    workers=st.integers(1, 3),
    B=st.integers(1, 20),
    start_step=st.integers(0, 6),
    shuffle=st.integers(0, 12),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_content_does_not_depend_on_ranks_workers_or_start(
    tmp_path_factory, latent_shards, sizes, world_size, lanes_per_rank, workers, B, start_step, shuffle
):
    folder = tmp_path_factory.mktemp("shards")
    every_key = latent_shards(folder, sizes)
    lanes, N, steps = world_size * lanes_per_rank, sum(sizes), -(-2 * sum(sizes) // B)
    config = config_of(folder, lanes=lanes, shuffle=shuffle)
    reference = batches(config, B, start_step + steps)
    stream = list(itertools.chain(*reference))
    for epoch in range(len(stream) // N):
        assert sorted(stream[epoch * N : (epoch + 1) * N]) == every_key
    assert batches(config, B, steps, world_size, start_step) == reference[start_step:]

    shards = [Shard(path=str(folder / f"{i:05d}.tar"), num_samples=n) for i, n in enumerate(sizes)]
    dataset = _RankDataset(_Schedule(config, [shards], 0, B), list(range(lanes)), start_step)
    parts = [dataset.parts(set(range(lanes)[v::workers])) for v in range(workers)]
    merged = [merged_parts([next(part) for part in parts]) for _ in range(steps)]
    assert [step.keys for step in merged] == reference[start_step:]


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=2, max_size=3),
    weights=st.lists(st.sampled_from([1.0, 2.5, 0.3]), min_size=3, max_size=3),
    world_size=st.integers(1, 3),
    B=st.integers(1, 12),
    start_step=st.integers(0, 9),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sources_are_mixed_by_weight_and_each_in_its_own_epochs(
    tmp_path_factory, latent_shards, sizes, weights, world_size, B, start_step
):
    folder = tmp_path_factory.mktemp("sources")
    weights = weights[: len(sizes)]
    keys = []
    for source, counts in enumerate(sizes):
        latent_shards(folder / str(source), counts, first=1000 * source)
        keys.append([f"{1000 * source + i:05d}" for i in range(sum(counts))])
    sources = tuple(SourceConfig(shards=str(folder / str(s)), weight=weight) for s, weight in enumerate(weights))
    config = replace(config_of(folder, lanes=2 * world_size), shards=(), sources=sources)
    steps = start_step + -(-3 * max(map(len, keys)) // B)
    reference = batches(config, B, steps)
    assert batches(config, B, steps - start_step, world_size, start_step) == reference[start_step:]
    stream = list(itertools.chain(*reference))
    for s, expected in enumerate(keys):
        own = [key for key in stream if key in expected]
        assert abs(len(own) - len(stream) * weights[s] / sum(weights)) < len(weights)
        for epoch in range(len(own) // len(expected)):
            assert sorted(own[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_over_http_give_the_same_steps(tmp_path, latent_shards, http_folder, workers):
    latent_shards(tmp_path, [30, 41, 25])
    config = config_of(tmp_path, lanes=2, shuffle=16)
    with http_folder(tmp_path) as (url, server):
        server.torn, server.torn_after = 5, 30_000
        remote = replace(config, shards=url + "{00000..00002}.tar", workers=workers)
        with StepLoader(config, 0, 16, start_batch=1) as here, StepLoader(remote, 0, 16, start_batch=1) as there:
            for a, b in itertools.islice(zip(here, there, strict=True), 10):
                assert a.keys == b.keys
                assert torch.equal(a.x_nCHW, b.x_nCHW)
        assert server.torn == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_give_the_same_steps(tmp_path, latent_shards, workers):
    latent_shards(tmp_path, [5, 11, 3, 8])
    config = config_of(tmp_path, lanes=4, captions=True, context_shape=(2, 3))
    with_workers = DataConfig(**{**vars(config), "workers": workers})
    state = torch.random.get_rng_state()
    with StepLoader(config, 3, 6, start_batch=2) as here, StepLoader(with_workers, 3, 6, start_batch=2) as there:
        for a, b in itertools.islice(zip(here, there, strict=True), 8):
            assert a.batch == b.batch
            assert a.keys == b.keys
            assert a.captions == b.captions == [f"sample {int(key)}" for key in a.keys]
            assert a.index_n.tolist() == b.index_n.tolist()
            for field in ("x_nCHW", "label_n", "context_nTC"):
                assert torch.equal(getattr(a, field), getattr(b, field))
            assert a.context_nTC.shape == (6, 2, 3)
    assert torch.equal(torch.random.get_rng_state(), state)


ON_ITS_OWN = """
import multiprocessing, os, sys
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import StepLoader

if __name__ == "__main__":
    config = DataConfig(shards=sys.argv[1], kind="latent", latent_shape=(1, 1, 1), lanes=4, workers=2)
    loader = StepLoader(config, 0, 6)
    next(loader)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    for line in sys.stdin:
        print(*[next(loader).batch for _ in range(int(line))], flush=True)
"""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_worker_processes_survive_a_clusters_signals_but_not_their_rank(tmp_path, latent_shards):
    latent_shards(tmp_path / "shards", [5, 11, 3, 8])
    script = tmp_path / "script.py"
    script.write_text(ON_ITS_OWN)
    command = [sys.executable, str(script), str(tmp_path / "shards")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdin is not None
        assert rank.stdout is not None
        workers = [int(pid) for pid in rank.stdout.readline().split()]
        helpers = {*workers, *(_parent(worker) for worker in workers)} - {rank.pid}
        assert len(workers) == 2
        for helper in helpers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(helper, number)
        time.sleep(0.2)
        rank.stdin.write("20\n")
        rank.stdin.flush()
        assert rank.stdout.readline().split() == [str(step) for step in range(1, 21)]
        rank.kill()
    deadline = time.monotonic() + 60
    while any(map(_runs, helpers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_closed_loader_has_ended_its_workers(tmp_path, latent_shards):
    latent_shards(tmp_path, [5, 11, 3, 8])
    before = set(multiprocessing.active_children())
    loader = StepLoader(config_of(tmp_path, lanes=4, workers=2), 0, 6)
    next(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) == before
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_surfaces_as_data_error(tmp_path, latent_shards, workers):
    latent_shards(tmp_path, [5, 11, 3, 8])
    config = config_of(tmp_path, lanes=4, latent_shape=(1, 2, 2), workers=workers)
    with pytest.raises(DataError) as caught:
        next(StepLoader(config, 0, 6))
    assert caught.value.field == "data.latent_shape"
    assert ".tar" in caught.value.problem


def test_lanes_must_be_dealt_evenly():
    config = DataConfig(kind="synthetic", latent_shape=(1, 1, 1), lanes=8)
    with pytest.raises(ConfigError, match=r"data\.lanes = 8.*3 ranks.*multiple of 3"):
        StepLoader(config, 0, 4, rank=0, world_size=3)


def test_synthetic_data_needs_no_files_and_is_the_same_on_any_world_size():
    config = DataConfig(kind="synthetic", latent_shape=(2, 4, 4), lanes=6, num_classes=3, latent_dtype="float32")
    whole = StepLoader(config, 0, 8, start_batch=3)
    parts = [StepLoader(config, 0, 8, rank, 3, start_batch=3) for rank in range(3)]
    for _ in range(4):
        expected = next(whole)
        for rank, loader in enumerate(parts):
            part = next(loader)
            assert part.index_n.tolist() == np.flatnonzero(loader.source_rank(part.batch) == rank).tolist()
            assert torch.equal(part.x_nCHW, expected.x_nCHW[part.index_n])
            assert torch.equal(part.label_n, expected.label_n[part.index_n])


def test_a_rank_without_samples_gets_empty_steps_of_the_same_shape(tmp_path, latent_shards):
    latent_shards(tmp_path, [9])
    loader = StepLoader(config_of(tmp_path, lanes=2, context_shape=(2, 3)), 0, 4, rank=1, world_size=2)
    step = next(loader)
    assert step.x_nCHW.shape == (0, 1, 1, 1)
    assert step.context_nTC is not None
    assert step.context_nTC.shape == (0, 2, 3)
    assert step.label_n is not None
    assert step.label_n.dtype == torch.int64
