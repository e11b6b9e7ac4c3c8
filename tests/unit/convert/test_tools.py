"""The scripts in tools/ that edit stages, run one after the other on one model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.models.ldm.config import LDMConfig
from tests.unit.convert.convert_helpers import export_tensors

TOOLS = Path(__file__).parents[3] / "tools"


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_grow_split_and_merge(tmp_path: Path, make_export: Any) -> None:
    unified = LDMConfig(
        encoder_channels=32, decoder_channels=(32,), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,),
        num_head_channels=32,
    )  # fmt: skip
    source, grown = make_export(unified), tmp_path / "grown"
    done = tool("init_from_unified", source, grown, "--boundaries", "500", "--widths", "96,32", "--attention", "2:")
    assert done.returncode == 0, done.stderr
    stages = [tmp_path / f"stage_{k}" for k in range(2)]
    for k, folder in enumerate(stages):
        done = tool("extract_stage", grown, folder, "--stage", k)
        assert done.returncode == 0, done.stderr
    done = tool("merge_stages", tmp_path / "merged", *stages, "--boundaries", "500")
    assert done.returncode == 0, done.stderr
    before, after = export_tensors(grown), export_tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    refused = tool("extract_stage", grown, tmp_path / "none", "--stage", 2)
    assert refused.returncode == 2
    assert "--stage = 2" in refused.stderr
