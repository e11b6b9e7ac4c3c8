"""Similarity of the gradients at different times, which gradient clustering divides time by (2306.00354)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.diffusion.stage_partition import StagePartition
from msdiff_dist.errors import ConfigError


def gradient_affinity(
    shared: nn.Module,
    stages: Mapping[int, nn.Module],
    objective: Objective,
    partition: StagePartition,
    x0_BCHW: Tensor,
    noise_BCHW: Tensor,
    times: Iterable[float],
    label_B: Tensor | None = None,
    context_BTC: Tensor | None = None,
) -> np.ndarray:
    """Cosine similarity [G, G], float64, between the gradients of the loss at G times.

    All times use the same samples and the same noise. Gradients are taken of the parameters that all times share: those
    of the shared part, and of the decoder if there is only one.

    Args:
        shared, stages: the model's parts, from `build_parts`.
        partition: the model's stages; each time uses the decoder of its own stage.
        times: in the process's unit.

    Raises:
        ConfigError: the stages share no parameters.
    """
    common_modules = [shared, *stages.values()] if len(stages) == 1 else [shared]
    parameters = [p for module in common_modules for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError(
            "--run", None, "its stages share no parameters", "Use a run of a unified or multi-stage model."
        )
    unit_gradients = []
    for t in times:
        t_B = torch.full((len(x0_BCHW),), float(t), dtype=torch.float64, device=x0_BCHW.device)
        noised = objective.noised(x0_BCHW, noise_BCHW, t_B)
        stage = stages[int(partition.stage_of(np.array(float(t))))]
        output = stage(*shared(noised.x_nCHW, noised.time_n, context_BTC, label_B))
        loss = objective.losses(output, noised).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        # Parameters without a gradient are the same at all times, so dropping them keeps the vectors aligned.
        flat = torch.cat([g.flatten() for g in gradients if g is not None]).float().cpu()
        # The smallest positive number keeps a gradient of zero at zero instead of nan.
        unit_gradients.append(flat / flat.norm().clamp(min=torch.finfo(torch.float32).tiny))
    unit_GP = torch.stack(unit_gradients)
    return (unit_GP @ unit_GP.T).double().numpy()
