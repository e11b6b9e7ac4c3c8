"""Models with random weights, their inputs, and comparisons of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.models import MultistageUNet, build_model


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values of its own, zero-initialised ones too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * (0.05 if p.ndim > 1 else 0.2))
    return model.eval()


def loaded(weights: ModelWeights) -> MultistageUNet:
    """A model with the weights that a reader returned."""
    model = build_model(weights.model)
    model.load_state_dict({k: weights.tensors.read(k) for k in weights.tensors.names()})
    return model.eval()


def inputs(config: Any, batch: int = 2, size: int = 8) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noisy images, timesteps of all stages, and the conditions that the model takes."""
    draw = torch.Generator().manual_seed(3)
    conditions = {}
    if config.takes_label:
        conditions["label"] = torch.arange(batch) % (config.num_classes + 1)
    if config.takes_context:
        conditions["context"] = torch.randn(batch, 5, config.context_dim, generator=draw)
    x = torch.randn(batch, config.in_channels, size, size, generator=draw)
    return x, torch.linspace(0, 999, batch).long(), conditions


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts have equal names, types and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def files_below(folder: Path) -> list[str]:
    """Paths of everything in a folder, to check that nothing was written."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def export_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export folder."""
    return load_file(folder / "model.safetensors")
