"""Corrupt samples do not depend on the layout, and a changed data set does not pass unnoticed."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msdiff_dist.data.make.shard_writer import write_index, write_shard
from msdiff_dist.errors import DataError
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed


def write_shards(folder: Path, harmed: int) -> None:
    """12 shards of 6 latents. The first `harmed` shards lack a field, or hold a torn one, or are cut short."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    counts = {}
    for number in range(12):
        samples = []
        for i in range(6):
            stream = io.BytesIO()
            np.save(stream, rng.standard_normal((2, 8, 8), dtype=np.float32))
            fields = {"latent.npy": stream.getvalue(), "cls": str(i % 3).encode()}
            if number < harmed and i == 3:
                fields = {"cls": b"1"} if number % 3 == 0 else {**fields, "latent.npy": b"torn"}
            samples.append((f"{number}-{i}", fields))
        path = folder / f"{number:05d}.tar"
        write_shard(path, samples)
        if number < harmed and number % 3 == 2:
            path.write_bytes(path.read_bytes()[:2000])
        counts[path.name] = 6
    write_index(folder, "faults", counts)


def recipe_on(folder: Path, **changes: Any) -> dict[str, Any]:
    mapping = recipe_of(ADAM, **changes)
    data = {"kind": "latent", "shards": str(folder), "lanes": 12, "latent_shape": [2, 8, 8], "num_classes": 3}
    return mapping | {"data": {**data, "shuffle": 4}}


def trained(
    rank: int, world_size: int, mapping: dict[str, Any], path: Path, steps: int
) -> tuple[list[float], list[str]]:
    """Resume, train `steps` steps and save; losses, all corruption in the order in which it was met, and notes."""
    run = open_run(rank, world_size, mapping, path)
    try:
        outcomes = [run.step(5e-4) for _ in range(steps)]
        run.save()
        run.saver.finish()
    finally:
        run.feed.close()
    return [o.loss for o in outcomes], [d.problem for o in outcomes for d in o.corruption] + run.notes


def test_losses_and_corruption_are_the_same_on_any_layout(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", harmed=5)
    mapping = recipe_on(tmp_path / "data")
    mapping["data"]["max_bad"] = 5
    ((losses, corruption),) = run_distributed(trained, 1, 1, mapping, tmp_path / "1", 6)
    assert len(corruption) == 5
    mapping["data"]["workers"] = 2
    results = run_distributed(trained, 3, 3, mapping, tmp_path / "3", 6)
    for other, reported in results:
        assert other == pytest.approx(losses, rel=1e-5)
        assert sorted(reported) == sorted(corruption)


def test_the_limit_is_the_sum_of_all_ranks(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", harmed=5)
    mapping = recipe_on(tmp_path / "data")
    mapping["data"]["max_bad"] = 4
    with pytest.raises(DataError, match=r"data\.max_bad = 4: 5 corrupt"):
        run_distributed(trained, 3, 3, mapping, tmp_path / "run", 6)


def test_a_changed_data_set_is_refused_unless_accepted(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", harmed=0)
    mapping = recipe_on(tmp_path / "data")
    run_distributed(trained, 2, 2, mapping, tmp_path / "run", 1)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    mapping["data"]["shards"] = str(tmp_path / "moved")
    run_distributed(trained, 2, 2, mapping, tmp_path / "run", 1)
    (tmp_path / "moved/00007.tar").unlink()
    with pytest.raises(DataError, match=r"1 removed \(00007\.tar\).*step 2.*accept_changes"):
        run_distributed(trained, 2, 2, mapping, tmp_path / "run", 1)
    mapping["data"]["accept_changes"] = True
    results = run_distributed(trained, 2, 2, mapping, tmp_path / "run", 1)
    assert "1 removed (00007.tar)" in results[0][1][0]
    mapping["data"]["accept_changes"] = False
    run_distributed(trained, 1, 1, mapping, tmp_path / "run", 1)
