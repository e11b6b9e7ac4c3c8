"""The same training in the plainest way: one process, no DeepSpeed, the whole global batch at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdiff_dist.checkpoint.power_profile import exponent
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.diffusion.augmentation import draw_transforms, transformed
from msdiff_dist.diffusion.loss import sample_losses
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.evaluation.feature_classifier import FeatureClassifier, load_classifier
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.multistage_unet import build_model
from msdiff_dist.models.projector import build_projector
from msdiff_dist.randomness import dropped_conditions, generator, noise
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.optimizer import optimizer_factory


@dataclasses.dataclass
class ReferenceRun:
    """What the reference training comes to.

    Attributes:
        losses, grad_norms: one number per step.
        state, ema: weights and their averages after the last step, by parameter name.
        first: the weights before the first step.
        power: by length, the averages of `ema.power`.
        guide_losses: the alignment with the teacher, one number per guided step.
    """

    losses: list[float]
    grad_norms: list[float]
    state: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]
    power: dict[float, dict[str, torch.Tensor]]
    guide_losses: list[float] = dataclasses.field(default_factory=list)


def stage_of_step(seed: int, step: int, share_K: np.ndarray) -> int:
    """The stage of a step whose whole batch belongs to one: the first at which the shares add up to a uniform number
    or more."""
    uniform = generator(seed, "stage of batch", step).random()
    return next(k for k in range(len(share_K)) if uniform < share_K[: k + 1].sum() or k + 1 == len(share_K))


def train_reference(
    recipe: Recipe,
    steps: int,
    model: torch.nn.Module | None = None,
    is_frozen: Callable[[str], bool] = lambda name: False,
    later: tuple[int, Recipe] | None = None,
) -> ReferenceRun:
    """Train `recipe` for `steps` steps.

    Args:
        model: the model to train; None: the recipe's own, with its first weights.
        is_frozen: whether the parameter of a name does not train.
        later: steps after which another recipe holds, and that recipe, of the same model, optimizer and data.
    """
    seed, B = recipe.train.seed, recipe.train.batch_size(1)
    model, process = model or build_model(recipe.model, seed), recipe.process()
    teacher = add_projector(recipe, model)
    parameters = list(model.parameters())
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name))
    training = [p for p in parameters if p.requires_grad]
    optimizer = optimizer_factory(recipe.optimizer, fused=False)(training)
    trained_parts = {tuple(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad}
    drawn = [k for k in range(recipe.stages.num_stages) if ("stages", str(k)) in trained_parts]
    # Gradients reach a shared part from every stage; a model of other names than ours trains on all stages too.
    if not drawn or any(part == "shared" for part, _ in trained_parts):
        drawn = list(range(recipe.stages.num_stages))
    weighted = recipe.stages.importance_weights
    mixed = StageQuotas(
        recipe.times(), recipe.partition(), recipe.stages.sampling, B, drawn, importance_weights=weighted
    )
    one_stage = recipe.stages.batch == "one_stage"
    codec = LatentCodec(recipe.autoencoder, recipe.data.kind != "image", torch.device("cpu"))
    loader = StepLoader(recipe.data, seed, B)
    ema = [p.detach().clone() for p in parameters]
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    lengths = recipe.ema.power.lengths if recipe.ema.power else ()
    power = {length: {name: torch.zeros_like(p) for name, p in first.items()} for length in lengths}
    losses, norms, guide_losses = [], [], []
    since = dict.fromkeys(first, 0)  # steps since the last one of the optimizer, by parameter
    sums: dict[str, torch.Tensor] = {}  # of gradients that wait, times samples
    waiting = np.zeros(len(mixed.quotas_K), int)  # samples that they are of
    for step in range(steps):
        if later and step == later[0]:
            recipe, process = later[1], later[1].process()
            for group in optimizer.param_groups:
                group["weight_decay"] = recipe.optimizer.weight_decay
        quotas = mixed.of_stage(stage_of_step(seed, step, mixed.share_K)) if one_stage else mixed
        batch, draw = next(loader), quotas.draw(seed, step)
        x0, t_B = codec.to_latents(batch.x_nCHW), torch.from_numpy(draw.t_B)
        stage_B = torch.from_numpy(draw.stage_B)
        augment_labels = None
        if recipe.augmentation:
            transforms = draw_transforms(recipe.augmentation, seed, step, batch.index_n)
            x0, augment_labels = transformed(x0, transforms), transforms.label_n
        eps = noise(seed, step, batch.index_n, x0.shape[1:])
        x_in, time_in = process.network_input(process.perturb(x0, eps, t_B), t_B)
        label = batch.label_n
        if label is not None and recipe.train.condition_dropout:
            dropped = dropped_conditions(seed, step, batch.index_n, recipe.train.condition_dropout)
            label = torch.where(dropped, recipe.model.num_classes, label)
        output = model(x_in, time_in, stage_B, None, label, augment_labels)
        weight_of_stage_B = torch.from_numpy(quotas.importance_K).float()[stage_B]
        weight_B = recipe.times().weight(t_B) * weight_of_stage_B
        loss = (weight_B * sample_losses(output, process.target(x0, eps, t_B), recipe.train.loss)).sum() / B
        total = loss
        if recipe.guide and step < recipe.guide.last_step(recipe.train.steps):
            guided = (weight_of_stage_B * alignment(recipe, model, teacher, x0, x_in, time_in, label)).sum() / B
            guide_losses.append(float(guided.detach()))
            total = loss + recipe.guide.weight * guided
        optimizer.zero_grad()
        total.backward()
        waiting += quotas.quotas_K
        for name, p in model.named_parameters():
            if not name.startswith("stages.") or p.grad is None:
                continue
            k = int(name.split(".")[1])
            sums[name] = sums.get(name, 0) + p.grad * int(quotas.quotas_K[k])
            if waiting[k] >= recipe.stages.min_samples_per_step:
                p.grad = sums.pop(name) / int(waiting[k])
            else:
                p.grad = None
        waiting[(waiting >= recipe.stages.min_samples_per_step) & (quotas.quotas_K > 0)] = 0
        clip = recipe.optimizer.grad_clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(training, clip)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * recipe.lr_schedule.factor(step + 1, recipe.train.steps)
        optimizer.step()
        for average, (name, p) in zip(ema, model.named_parameters(), strict=True):
            since[name] += 1
            if p.grad is None:  # of a decoder without samples, or without enough
                continue
            decay = recipe.ema.decay_at(step + 1, B) ** since[name]
            average.mul_(decay).add_(p.detach(), alpha=1 - decay)
            for length, averages in power.items():
                # Of the last average in the new one.
                share = ((step + 1 - since[name]) / (step + 1)) ** (exponent(length) + 1)
                averages[name].mul_(share).add_(p.detach(), alpha=1 - share)
            since[name] = 0
        losses.append(float(loss.detach()))
    names = [name for name, _ in model.named_parameters()]
    state = {n: p.detach() for n, p in zip(names, parameters, strict=True)}
    return ReferenceRun(losses, norms, state, dict(zip(names, ema, strict=True)), first, power, guide_losses)


def add_projector(recipe: Recipe, model: torch.nn.Module) -> FeatureClassifier | None:
    """Give the model the projector of the recipe's guide, and return the teacher, a classifier."""
    if not recipe.guide:
        return None
    teacher = load_classifier(Path(recipe.guide.features))
    middle = recipe.model.encoder_width(0) * recipe.model.channel_mult[-1]
    features = teacher.info.channels[-1]
    model.guide = build_projector(middle, recipe.guide.width, features, recipe.train.seed)
    return teacher


def alignment(
    recipe: Recipe,
    model: Any,
    teacher: FeatureClassifier | None,
    x0: torch.Tensor,
    x_in: torch.Tensor,
    time_in: torch.Tensor,
    label: torch.Tensor | None,
) -> torch.Tensor:
    """Alignment of each sample, of places of the teacher's last feature map, one place after another."""
    assert teacher is not None
    assert recipe.guide is not None
    hidden = x0
    for layer in teacher.body:
        if isinstance(layer, torch.nn.Flatten):
            break
        hidden = layer(hidden)
    own = model.guide(model.shared(x_in, time_in, None, label)[0])
    own = torch.nn.functional.interpolate(own, hidden.shape[-2:], mode="bilinear", antialias=True)
    places = [(i, j) for i in range(hidden.shape[2]) for j in range(hidden.shape[3])]
    total: Any = 0.0
    for i, j in places:
        total = total + 1 - torch.cosine_similarity(own[..., i, j], hidden[..., i, j].detach())
    total = total / len(places)
    for a in places:
        for b in places:
            pair = [torch.cosine_similarity(m[:, :, a[0], a[1]], m[:, :, b[0], b[1]]) for m in (own, hidden.detach())]
            total = total + recipe.guide.gram_weight * (pair[0] - pair[1]) ** 2 / len(places) ** 2
    aligned: torch.Tensor = total
    return aligned
