"""The loss and gradients of one batch, for every U-Net family, against the same network in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msdiff_dist.apps.check.exactness import cosine, exact_fp32, relative_error
from msdiff_dist.apps.check.findings import Bench, Finding
from msdiff_dist.apps.train.smoke import smoke
from msdiff_dist.diffusion.objective import NoisedBatch, Objective
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.distributed.precision import bf16_support
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model
from msdiff_dist.recipe import Recipe, load_recipe
from msdiff_dist.shipped import find_shipped

GROUP = "families"
# A recipe for each family and for each kind of condition: class, class as context, text, augmentation, time alone.
_RECIPES = {
    "ldm": ("fashion_mnist_3stage", ()),
    "ldm, class as context": ("cin256_ldm_3stage", ()),
    "ldm, text": ("emoji_text2img_3stage", ()),
    "ddpmpp": ("fashion_mnist_edm_3stage", ()),
    "ncsnpp": ("fashion_mnist_edm_3stage", ("model.family=ncsnpp",)),
    "ncsnpp_vp": ("fashion_mnist_dpm_3stage", ()),
}
_FP32 = {"loss": 1e-5, "gradients": 1e-3}
_TF32 = {"loss": 5e-3, "1 - cosine of gradients": 1e-3}
_BF16 = {"loss": 3e-2, "1 - cosine of gradients": 2e-2}
_BATCH = 24


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A network and one batch, both float32 on the CPU.

    Attributes:
        conditions: context, labels, labels of the augmentation; None where the network takes none.
    """

    model: MultistageUNet
    objective: Objective
    batch: NoisedBatch
    stage_B: Tensor
    conditions: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class _Outcome:
    """The mean loss, and the gradient of each part of the network in one row."""

    loss: float
    gradients: dict[str, Tensor]


def families(bench: Bench) -> Iterator[Finding]:
    """For each family: float32 in both memory formats, on GPUs also TF32, and bf16 where the device has it."""
    for family, (name, changes) in _RECIPES.items():
        case = _case(smoke(load_recipe(find_shipped(name).path, list(changes))))
        exact = _outcome(case, torch.float64, torch.device("cpu"))
        with exact_fp32():
            yield _near(f"{family}, float32", _outcome(case, torch.float32, bench.device), exact)
            last = _outcome(case, torch.float32, bench.device, torch.channels_last)
            yield _near(f"{family}, float32, channels last", last, exact)
        if bench.on_gpu:
            with exact_fp32(False):
                yield _along(f"{family}, TF32", _outcome(case, torch.float32, bench.device), exact, _TF32)
        if bf16_support(bench.device).native:
            yield _along(f"{family}, bfloat16", _outcome(case, torch.bfloat16, bench.device), exact, _BF16)


def _near(name: str, found: _Outcome, exact: _Outcome) -> Finding:
    errors = {part: relative_error(found.gradients[part], g) for part, g in exact.gradients.items()}
    worst = {"loss": abs(found.loss / exact.loss - 1), "gradients": max(errors.values())}
    return replace(Finding.within(GROUP, name, worst, _FP32), figures={"gradients": errors, "loss": worst["loss"]})


def _along(name: str, found: _Outcome, exact: _Outcome, limits: dict[str, float]) -> Finding:
    """Coarser numbers: gradients are compared by their direction."""
    cosines = {part: cosine(found.gradients[part], g) for part, g in exact.gradients.items()}
    loss, gradients = limits
    worst = {loss: abs(found.loss / exact.loss - 1), gradients: 1 - min(cosines.values())}
    return replace(Finding.within(GROUP, name, worst, limits), figures={"cosines": cosines, "loss": worst[loss]})


def _case(recipe: Recipe) -> _Case:
    generator = torch.Generator().manual_seed(0)
    model = build_model(recipe.model)
    with torch.no_grad():  # fresh networks end in zeros, through which no gradient reaches the other layers
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    quotas = StageQuotas(recipe.times(), recipe.partition(), recipe.stages.sampling, _BATCH)
    draw = quotas.draw(0, 0)
    shape = (_BATCH, *recipe.latent_shape)
    objective = Objective(recipe.process(), recipe.train.loss, recipe.times())
    batch = objective.noised(
        torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), torch.from_numpy(draw.t_B)
    )
    classes, context, augment = recipe.model.num_classes, recipe.data.context_shape, recipe.model.augment_labels
    conditions = (
        torch.randn(_BATCH, *context, generator=generator) if context else None,
        torch.randint(classes, (_BATCH,), generator=generator) if classes else None,
        torch.rand(_BATCH, augment, generator=generator) if augment else None,
    )
    stage_B = torch.from_numpy(draw.stage_B)
    return _Case(model=model, objective=objective, batch=batch, stage_B=stage_B, conditions=conditions)


def _outcome(
    case: _Case,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> _Outcome:
    """One forward and backward pass of a copy of the network in `dtype`; times and the loss stay float32."""
    model = copy.deepcopy(case.model).to(device, dtype)
    batch = NoisedBatch(**{field: value.to(device) for field, value in vars(case.batch).items()})
    context, label, augment = (None if c is None else c.to(device) for c in case.conditions)
    context = context if context is None else context.to(dtype)
    x_BCHW = batch.x_nCHW.to(dtype, memory_format=memory_format)
    output = model(x_BCHW, batch.time_n, case.stage_B.to(device), context, label, augment)
    loss = case.objective.losses(output, batch).mean()
    loss.backward()
    parts: dict[str, nn.Module] = {"shared": model.shared}
    parts |= {f"stage {k}": part for k, part in enumerate(model.stages)}
    return _Outcome(float(loss.detach()), {name: _gradient(part) for name, part in parts.items()})


def _gradient(part: nn.Module) -> Tensor:
    """All gradients of a part in one row, float64 on the CPU."""
    return (
        torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in part.parameters()])
        .double()
        .cpu()
    )
