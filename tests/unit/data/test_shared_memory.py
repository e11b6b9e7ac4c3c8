"""Too small a folder of shared memory is refused before workers start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.shared_memory import check_shared_memory
from msdiff_dist.errors import ConfigError


def test_three_batches_of_every_rank_of_the_node_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_shared_memory(2, free // 24, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.workers = 2.*on 4 ranks.*--shm-size"):
        check_shared_memory(2, free // 6, tmp_path)
    check_shared_memory(2, free, tmp_path / "none")


def test_a_loader_with_workers_is_refused() -> None:
    config = DataConfig(kind="synthetic", latent_shape=(4, 1024, 1024), latent_dtype="float32", workers=2)
    assert config.sample_bytes == 4 * 4 * 2**20
    with pytest.raises(ConfigError, match="shared memory"):
        StepLoader(config, 0, 2**20)
    StepLoader(config.__class__(**{**vars(config), "workers": 0}), 0, 2**20)
