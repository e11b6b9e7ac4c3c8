"""How much the gradients of different times agree: the affinity behind gradient clustering (2306.00354)."""

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
    """Cosine similarity [G, G] between the gradients of the loss at the given times, of the same samples and noise.

    The gradient is that of the parameters which every time has in common: the shared encoder's, and the decoder's if
    there is only one.

    Raises:
        ConfigError: no parameters in common.
    """
    common = [shared, *stages.values()] if len(stages) == 1 else [shared]
    parameters = [p for module in common for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError(
            "--run", None, "its stages share no parameters", "Use a run of a unified or multi-stage model."
        )
    rows = []
    for t in times:
        t_B = torch.full((len(x0_BCHW),), float(t), dtype=torch.float64, device=x0_BCHW.device)
        noised = objective.noised(x0_BCHW, noise_BCHW, t_B)
        stage = stages[int(partition.stage_of(np.array(float(t))))]
        output = stage(*shared(noised.x_nCHW, noised.time_n, context_BTC, label_B))
        loss = objective.losses(output, noised).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None]).float().cpu()
        rows.append(flat / flat.norm().clamp(min=torch.finfo(torch.float32).tiny))
    unit_GP = torch.stack(rows)
    return (unit_GP @ unit_GP.T).double().numpy()
