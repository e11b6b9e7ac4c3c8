"""Runs of a model of three stages that steps in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.recipe import recipe_from
from msdiff_dist.training.run_folder import RunFolder

ADAM = {"lr": 5e-4, "eps": 1e-6, "grad_clip": 1.0}  # eps: near-zero gradients would amplify rounding


def recipe_of(optimizer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe of such a model as plain data. `changes` are `section__field=value`."""
    mapping: dict[str, Any] = {
        "name": "tiny",
        "data": {"kind": "synthetic", "lanes": 12, "latent_shape": [2, 8, 8], "num_classes": 3},
        "stages": {"boundaries": [442, 631], "sampling": "equal"},
        "model": {
            "in_channels": 2, "out_channels": 2, "encoder_channels": 8, "decoder_channels": [12, 8, 4],
            "channel_mult": [1, 2], "num_res_blocks": 1, "attention_downsamples": [2], "num_heads": 2,
            "norm_groups": 4, "num_classes": 3,
        },
        "optimizer": optimizer,
        "ema": {"decay": 0.9},
        "train": {"steps": 100, "global_batch_size": 24, "condition_dropout": 0.1, "precision": "fp32"},
        "checkpoint": {"keep_last": 100},
    }  # fmt: skip
    for name, value in changes.items():
        section, field = name.split("__")
        mapping[section] = mapping.get(section, {}) | {field: value}
    return mapping


def open_run(rank: int, world_size: int, mapping: dict[str, Any], path: Path) -> Trainer:
    """A rank's trainer of the run in folder `path`, resumed from its newest checkpoint."""
    return Trainer(
        recipe_from(mapping),
        RunFolder(path),
        Environment(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu")),
    )


def trained(
    rank: int, world_size: int, mapping: dict[str, Any], path: Path, stops: list[int]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Resume from the newest checkpoint and train to the last of `stops`, saving at each.

    Returns:
        The losses of these steps, and the network's own weights on this rank by parameter name.
    """
    losses = []
    with open_run(rank, world_size, mapping, path) as run:
        if 0 in stops:
            run.save()
        while run.state.step < stops[-1]:
            losses.append(run.step(mapping["optimizer"]["lr"]).loss)
            run.save_if_due(now=run.state.step in stops)
    engines = {"shared.": run.engines.shared, **{f"stages.{k}.": e for k, e in run.engines.stages.items()}}
    weights = {p + n: v.detach().clone() for p, e in engines.items() if e for n, v in e.module.named_parameters()}
    return losses, weights
