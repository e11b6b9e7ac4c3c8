"""Two U-Nets of diffusers trained together: each ends as if it had been trained alone, by a plain loop on diffusers.

The twin of a stage takes the samples that the joint run draws for the stage, the mean of their losses, and Adam's eps
divided by the stage's share p: the joint loss is the sum of p times each stage's mean, and Adam's step on a gradient
p g is that on g with eps / p. Clipping is off, since the norm that it compares is that of all networks together. eps is
large, so that the rounding by which two programs differ does not become whole steps where gradients are nearly zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from msdiff_dist.apps.init_recipe import init_recipe
from msdiff_dist.apps.train.local import run_local
from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.randomness import noise
from msdiff_dist.recipe import Recipe, load_recipe, recipe_mapping

pytestmark = pytest.mark.distributed

STEPS, TOLERANCE = 4, 1e-5
COMMON: dict[str, Any] = {"in_channels": 2, "out_channels": 2, "sample_size": 8, "norm_num_groups": 4}
NETWORKS: list[dict[str, Any]] = [
    COMMON | {
        "block_out_channels": (16, 32), "layers_per_block": 2, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    COMMON | {
        "block_out_channels": (8, 8, 16), "layers_per_block": 1, "attention_head_dim": 4,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
]  # fmt: skip
SHARES = [0.94, 0.06]  # 47 and 3 of 50 samples
CHANGES = [
    "data.kind=synthetic", "data.shards=[]", "data.lanes=12", f"stages.sampling={SHARES}", "train.global_batch_size=50",
    f"train.steps={STEPS}", "train.precision=fp32", "optimizer.lr=2e-3", "optimizer.eps=1e-3",
    "optimizer.weight_decay=0.01", "optimizer.grad_clip=0", "ema.decay=0.9", "checkpoint.every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of pipelines that diffusers has written, without parameters that are zero."""
    folders = []
    for k, config in enumerate(NETWORKS):
        folders.append(tmp_path_factory.mktemp(f"network_{k}"))
        torch.manual_seed(k)
        UNet2DModel(**config).save_pretrained(folders[k] / "unet")
        DDPMScheduler().save_pretrained(folders[k] / "scheduler")
    return folders


def noised(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """DDPM's x_t (2006.11239, Eq. 4) with linear betas. In float64, since diffusers' float32 products of a thousand
    factors are off by more than the tolerance of this test."""
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t][:, None, None, None]
    return (kept.sqrt() * x0 + (1 - kept).sqrt() * eps).float()


def alone(folder: Path, stage: int, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, their averages and losses of one network, trained by itself on the samples that the stage draws."""
    network = UNet2DModel.from_pretrained(folder / "unet").train()
    share, seed, B = SHARES[stage], recipe.train.seed, recipe.train.batch_size(1)
    o = recipe.optimizer
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=o.lr, betas=o.betas, eps=o.eps / share, weight_decay=o.weight_decay
    )
    quotas = StageQuotas(recipe.process(), recipe.partition(), recipe.stages.sampling, B)
    assert quotas.quotas_K[stage] == round(share * B)
    loader, losses = StepLoader(recipe.data, seed, B), []
    ema = {name: p.detach().clone() for name, p in network.named_parameters()}
    for step in range(STEPS):
        batch, draw = next(loader), quotas.draw(seed, step)
        rows = torch.from_numpy(draw.stage_B == stage)
        eps, t = noise(seed, step, batch.index_n, batch.x_nCHW.shape[1:])[rows], torch.from_numpy(draw.t_B)[rows]
        assert ((t < 875) == (stage == 0)).all()
        output = network(noised(batch.x_nCHW[rows], eps, t), t).sample
        loss = torch.nn.functional.mse_loss(output, eps)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = o.lr * recipe.lr_schedule.factor(step + 1, STEPS)
        optimizer.step()
        decay = recipe.ema.decay_at(step + 1, B)
        for name, p in network.named_parameters():
            ema[name].mul_(decay).add_(p.detach(), alpha=1 - decay)
        losses.append(loss.item())
    return {name: p.detach() for name, p in network.named_parameters()}, ema, losses


@pytest.mark.parametrize(("ranks", "more"), [
    (1, []),
    (2, ["parallel.zero_decoders=2"]),
    (3, ["train.gradient_accumulation_steps=2"]),
])  # fmt: skip
def test_each_network_trains_as_alone(networks: list[Path], tmp_path: Path, ranks: int, more: list[str]) -> None:
    convert(networks, tmp_path / "start", "diffusers", "msdiff", ConvertOptions(boundaries=(875.0,)))
    init_recipe(None, tmp_path / "start", tmp_path / "recipe.yaml")
    recipe = load_recipe(tmp_path / "recipe.yaml", [*CHANGES, *more])
    assert recipe.train.init_from == str(tmp_path / "start")
    assert run_local(recipe_mapping(recipe), tmp_path / "run", ranks) == "finished"
    twins = [alone(folder, k, recipe) for k, folder in enumerate(networks)]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for k, (_, _, losses) in enumerate(twins):
        assert [line["loss_per_stage"][k] for line in lines] == pytest.approx(losses, rel=TOLERANCE)
    for kind, place in (("raw", 0), ("ema", 1)):
        back = tmp_path / kind
        convert(tmp_path / "run", back, "msdiff", "diffusers", ConvertOptions(weights=kind))  # type: ignore[arg-type]
        for k, twin in enumerate(twins):
            trained = UNet2DModel.from_pretrained(back / f"stage_{k}/unet")
            start = UNet2DModel.from_pretrained(networks[k] / "unet").state_dict()
            moved = 0.0
            for name, p in trained.named_parameters():
                torch.testing.assert_close(p.detach(), twin[place][name], rtol=0, atol=TOLERANCE)
                moved = max(moved, float((p.detach() - start[name]).abs().max()))
            assert moved > 100 * TOLERANCE, "training changed the weights"
