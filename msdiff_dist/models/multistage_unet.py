"""The multi-stage model (2312.09181): a part that all stages share, and one part per stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES, Family


class MultistageUNet(nn.Module):
    """`shared` maps the inputs to a flat tuple of batch-first features, and `stages[k]` maps those to outputs.

    With a shared encoder, `shared` is the family's encoder and each stage a decoder. Without one, `shared` is a
    `PassThrough`, which has no parameters, and each stage a `SeparateStage`. A model of one stage is the unified model.
    """

    def __init__(self, shared: nn.Module, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.shared = shared
        self.stages = nn.ModuleList(stages)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        stage_B: Tensor,
        context: Tensor | None = None,
        label: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Output [B, out_channels, H, W]; each sample passes through the decoder of its own stage.

        Args:
            x_BCHW, t_B, context, label, augment: see the family's encoder.
            stage_B: int64 stage of each sample, in any mixture.
        """
        features = self.shared(x_BCHW, t_B, context, label, augment)
        stages = stage_B.unique().tolist()
        if len(stages) == 1:
            out: Tensor = self.stages[stages[0]](*features)
            return out
        rows = [(stage_B == k).nonzero()[:, 0] for k in stages]
        outputs = [self.stages[k](*(f[r] for f in features)) for k, r in zip(stages, rows, strict=True)]
        # The outputs lie stage after stage: the inverse permutation brings them back to the order of the inputs.
        return torch.cat(outputs)[torch.cat(rows).argsort()]


class PassThrough(nn.Module):
    """The shared part of a model without a shared encoder. Its features are the inputs that are not None."""

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        context: Tensor | None = None,
        label: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return tuple(f for f in (x_BCHW, t_B, context, label, augment) if f is not None)


class SeparateStage(nn.Module):
    """A stage with an encoder of its own. Its inputs are the features of `PassThrough`."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        # The stage alone as a unified model, whose encoder and decoder are built as any other's.
        self.config = config.of_stages([stage])
        encoder, decoder = _kinds(FAMILIES[self.config.family])
        self.encoder = encoder(self.config, 0)
        self.decoder = decoder(self.config, 0)

    def forward(self, *features: Tensor) -> Tensor:
        # `PassThrough` drops inputs that are None, so what a condition is follows from which ones the model takes.
        # `augment` is the last and may be absent: hence the zip that is not strict.
        x_BCHW, t_B, *conditions = features
        taken = {"context": self.config.takes_context, "label": self.config.takes_label, "augment": True}
        names = [name for name, takes in taken.items() if takes]
        out: Tensor = self.decoder(*self.encoder(x_BCHW, t_B, **dict(zip(names, conditions, strict=False))))
        return out


def build_model(config: ModelConfig, seed: int = 0) -> MultistageUNet:
    """The whole model, with the first weights that `build_parts` gives its parts."""
    shared, stages = build_parts(config, range(config.num_stages), seed)
    return MultistageUNet(shared, stages.values())


def build_parts(config: ModelConfig, stages: Iterable[int], seed: int = 0) -> tuple[nn.Module, dict[int, nn.Module]]:
    """The shared part, and the parts of the given `stages` by number.

    The first weights of a part depend on `seed` and on which part it is, and on nothing else: a stage is the same on
    every rank that builds it, whatever else the rank builds. The state of torch's generator does not change.
    """
    part: type[nn.Module] = SeparateStage
    shared: nn.Module = PassThrough()
    if config.share_encoder:
        encoder, part = _kinds(FAMILIES[config.family])
        shared = seeded(seed, "shared", encoder, config, 0)
    return shared, {k: seeded(seed, f"stage {k}", part, config, k) for k in stages}


def _kinds(family: Family) -> tuple[type[nn.Module], type[nn.Module]]:
    assert family.encoder is not None, "a family of whole networks has no encoder"
    assert family.decoder is not None
    return family.encoder, family.decoder


def seeded(seed: int, name: str, part: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """`part(*args)`, whose first weights depend on `seed` and `name` alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big"))
        return part(*args)
