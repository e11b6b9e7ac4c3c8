"""Conversion of checkpoints that plain DeepSpeed engines write; the converter does not use deepspeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from msdiff_dist import load_model
from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.formats.deepspeed import DeepspeedSource
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import CheckpointError
from msdiff_dist.models import build_model
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.testing import run_distributed

pytestmark = pytest.mark.distributed

STAGED = LDMConfig(
    encoder_channels=32, decoder_channels=(64, 32), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,),
    num_head_channels=32, num_classes=3,
)  # fmt: skip


class Net(nn.Module):
    """A network with odd sizes, a buffer, a frozen parameter and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 5)
        self.b = nn.Sequential(nn.Linear(5, 3, bias=False), nn.LayerNorm(3))
        self.tied = nn.Linear(7, 5)
        self.tied.weight = self.a.weight
        self.frozen = nn.Parameter(torch.arange(5.0), requires_grad=False)
        self.register_buffer("steps", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.tied(x)).pow(2).sum()


def train(rank: int, folder: str, stage: int, bf16: bool, groups: bool) -> dict[str, Tensor]:
    """Train a plain engine for two steps and save it. Returns its fp32 weights as DeepSpeed itself gathers them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    net = Net()
    trained: Any = [p for p in net.parameters() if p.requires_grad]
    if groups:
        trained = [{"params": trained[:2], "lr": 1e-2}, {"params": trained[2:], "lr": 1e-3}]
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": bf16},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=config)
    for step in range(2):
        x = torch.randn(2, 7, generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(x.bfloat16() if bf16 else x))
        engine.step()
    engine.save_checkpoint(folder)
    weights = {}
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        if not p.requires_grad:
            weights[name] = torch.arange(5.0)
        elif stage == 0:
            weights[name] = p.detach().float().clone()
        else:
            weights[name] = safe_get_full_fp32_param(p).clone()
    return weights


def save_model(rank: int, folder: str, config: LDMConfig, names: str) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model: nn.Module = build_model(config)
    settings = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings
    )
    engine.save_checkpoint(folder)


CASES = [(0, 2, True), (1, 3, False), (2, 2, True), (2, 1, False), (3, 3, True)]


@pytest.mark.parametrize(("stage", "world", "bf16"), CASES)
def test_weights_are_the_engines(tmp_path: Path, stage: int, world: int, bf16: bool) -> None:
    folder = tmp_path / "ds"
    expected = run_distributed(train, world, str(folder), stage, bf16, stage in (1, 2))[0]
    report = convert(folder, tmp_path / "x.safetensors", "deepspeed", "safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["steps"].float(), torch.arange(4.0))
    assert all(torch.equal(found[k].float(), expected[k]) for k in found if k != "steps")
    # ZeRO 3 does not save that two parameters are one: the report says so.
    lost = expected.keys() - found.keys()
    assert lost <= ({"tied.weight"} if stage == 3 else set())
    assert all("shared" in report["keys"][k]["left_out"] for k in lost)


def test_folders_of_older_versions_lack_the_slice_mappings(tmp_path: Path) -> None:
    expected = run_distributed(train, 3, str(tmp_path / "ds"), 1, False, True)[0]
    for path in (tmp_path / "ds").rglob("*optim_states.pt"):
        with torch.serialization.safe_globals([]):
            content = torch.load(path, weights_only=False)
        del content["optimizer_state_dict"]["param_slice_mappings"]
        torch.save(content, path)
    source = DeepspeedSource(tmp_path / "ds")
    assert all(torch.equal(source.read(k), expected[k]) for k in ("a.weight", "a.bias", "b.0.weight", "tied.bias"))


def test_the_network_is_recognised_by_its_parameter_names(tmp_path: Path) -> None:
    run_distributed(save_model, 2, str(tmp_path / "ds"), STAGED, "ours")
    convert(tmp_path / "ds", tmp_path / "ours", "deepspeed", "msdiff", ConvertOptions(boundaries=(500.0,)))
    model, expected = load_model(tmp_path / "ours", ema=False), build_model(STAGED)
    assert model.description.model == STAGED
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    report = json.loads((tmp_path / "ours" / "conversion_report.json").read_text())
    assert report["keys"]["stages.1.out.2.bias"] == {"to": ["stages.1.out.2.bias"]}


@pytest.mark.parametrize("corruption", ["missing rank", "truncated", "tag"])
def test_incomplete_folders_are_named(tmp_path: Path, corruption: str) -> None:
    run_distributed(train, 2, str(tmp_path / "ds"), 2, False, False)
    victim = next((tmp_path / "ds").rglob("*rank_1_mp*optim_states.pt"))
    if corruption == "missing rank":
        victim.unlink()
    elif corruption == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        (tmp_path / "ds" / "latest").write_text("global_step9")
    named = {"missing rank": r"\[1\]", "truncated": "rank_1", "tag": "global_step9"}[corruption]
    with pytest.raises(CheckpointError, match=named):
        convert(tmp_path / "ds", tmp_path / "x.safetensors", "deepspeed", "safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_unknown_networks_are_refused_with_a_remedy(tmp_path: Path) -> None:
    run_distributed(train, 1, str(tmp_path / "ds"), 1, False, False)
    with pytest.raises(CheckpointError, match="--to safetensors"):
        convert(tmp_path / "ds", tmp_path / "out", "deepspeed", "msdiff")
