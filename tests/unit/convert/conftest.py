from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from msdiff_dist import __version__
from msdiff_dist.config import to_mapping
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models import ModelConfig, build_model
from tests.unit.convert.convert_helpers import randomise

Exporter = Callable[..., Path]


@pytest.fixture
def make_export(tmp_path: Path) -> Exporter:
    """Writes an export folder with random weights, without the code under test."""

    def make(config: ModelConfig, name: str = "export", dtype: torch.dtype = torch.float32, **sections: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        model = randomise(build_model(config))
        save_file({k: v.to(dtype) for k, v in model.state_dict().items()}, folder / "model.safetensors")
        stages = {1: (), 2: (500.0,), 3: (442.0, 631.0)}[config.num_stages]
        known: dict[str, Any] = {
            "diffusion": DiffusionConfig(process="discrete", section=DiscreteConfig()),
            "sample_size": 8,
        }
        description = ModelDescription(
            model=config, version=__version__, **{**known, "stages": StagesConfig(boundaries=stages), **sections}
        )
        (folder / "config.json").write_text(json.dumps(to_mapping(description)))
        return folder

    return make
