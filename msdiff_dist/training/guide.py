"""Representation alignment: the shared encoder's middle learns to predict a frozen network's features of clean images.

REPA (2410.06940) aligns a diffusion network's activations with those of a network that knows images; U-REPA
(2503.18414) found that in a U-Net the middle is the place, and that the projected activations are to be brought to the
teacher's grid, not the teacher's features to the network's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from msdiff_dist.bounds import check_between
from msdiff_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """Representation alignment (2410.06940; of U-Nets 2503.18414): in training, a projector maps the middle of the
    shared encoder to a frozen teacher's features of the clean images, and `weight` times one minus their cosine
    similarity is added to the loss. It trains faster at no cost of sampling; recipes on images alone."""

    features: str
    """The teacher: `mobilenet`, `efficientnet` or `dinov2`, as of `msdiff evaluate --features`, or the file of
    a classifier that `msdiff classifier train` made."""
    path: str | None = None
    """File of the teacher's weights; null: those of an installed package, where there is one."""
    weight: float = 0.5
    """Weight of the alignment in the loss. REPA uses 0.5."""
    gram_weight: float = 0.0
    """Weight, beside that of the cosine similarity, of the squared difference of the similarities between an image's
    positions: U-REPA's manifold loss, inside each image, where it does not depend on how samples are divided."""
    stop_at: float | None = None
    """Last step with the guide; up to 1, as a fraction of `train.steps`. After it the guide costs nothing. null: it
    never ends."""
    width: int = 2048
    """Width of the projector, an MLP of three layers. REPA uses 2048; small models need less."""

    def __post_init__(self) -> None:
        if not self.features.strip():
            raise ConfigError("features", self.features, "is empty", "Name a teacher: mobilenet, say.")
        if not self.weight > 0:
            raise ConfigError("weight", self.weight, "must be above 0", "Use 0.5, or remove the section guide.")
        check_between("weight", self.weight, 0, 1e6)
        check_between("gram_weight", self.gram_weight, 0, 1e6)
        check_between("width", self.width, 1, 2**16)
        if self.stop_at is not None:
            if not self.stop_at > 0:
                raise ConfigError("stop_at", self.stop_at, "must be above 0", "Remove the section guide to do without.")
            if self.stop_at > 1 and self.stop_at != int(self.stop_at):
                raise ConfigError(
                    "stop_at", self.stop_at, "is above 1 and no whole number of steps", f"Use {int(self.stop_at)}."
                )

    def last_step(self, steps: int) -> int:
        """Number of the last step with the guide, counted from 1, of a run of `steps` steps."""
        if self.stop_at is None:
            return steps
        return min(steps, int(self.stop_at) if self.stop_at > 1 else math.ceil(self.stop_at * steps))


Teacher = Callable[[Tensor], Tensor]
"""From clean latents x0 [n, C, H, W] to the teacher's features of their images, float32 [n, D, h, w]."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What a training step needs of the guide: its settings and its teacher."""

    config: GuideConfig
    teacher: Teacher

    def losses(self, projected_nDhw: Tensor, x0_nCHW: Tensor) -> Tensor:
        """Alignment of each sample, before `guide.weight`, float32 [n]; differentiable by `projected_nDhw`."""
        return alignment_losses(projected_nDhw, self.teacher(x0_nCHW), self.config.gram_weight)


def alignment_losses(projected_nDhw: Tensor, teacher_nDHW: Tensor, gram_weight: float = 0.0) -> Tensor:
    """One minus the cosine similarity of each sample's features, mean over positions (2410.06940), float32 [n].

    The projected features are resized to the teacher's grid. `gram_weight` times the mean squared difference of the
    similarities between all pairs of an image's positions is added (2503.18414, whose pairs are of a batch).
    """
    projected = projected_nDhw.float()
    if projected.shape[-2:] != teacher_nDHW.shape[-2:]:
        projected = F.interpolate(projected, teacher_nDHW.shape[-2:], mode="bilinear", antialias=True)
    own_nDP = F.normalize(projected.flatten(2), dim=1)
    teacher_nDP = F.normalize(teacher_nDHW.float().flatten(2), dim=1)
    losses_n = 1 - (own_nDP * teacher_nDP).sum(1).mean(1)
    if gram_weight:
        difference_nPP = own_nDP.mT @ own_nDP - teacher_nDP.mT @ teacher_nDP
        losses_n = losses_n + gram_weight * difference_nPP.square().mean((1, 2))
    return losses_n
