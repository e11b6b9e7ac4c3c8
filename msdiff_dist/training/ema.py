"""Moving averages of the weights, kept element by element on the ZeRO shards: no rank gathers the whole model.

LDM's and EDM's averages have a fixed decay or half-life after a warm-up (Karras et al. 2022). EDM2's power-function
averages have a length relative to the training so far (Karras et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msdiff_dist.checkpoint.power_profile import LONGEST, exponent, kind_of
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.errors import ConfigError

_MOST_LENGTHS = 16
_SHORTEST = 1e-6  # shorter ones are the last weights


@dataclass(frozen=True, kw_only=True)
class PowerEmaConfig:
    """EDM2's averages, from which `msdiff export --ema-length` makes that of any length when training is over."""

    snapshot_every: int
    """Steps between snapshots in the run's `ema_snapshots`. Each is as large as the model times the number of lengths,
    and all are kept."""
    lengths: tuple[float, ...] = (0.05, 0.10)
    """Lengths of the averages, relative to the training so far; each is one more copy of the weights."""

    def __post_init__(self) -> None:
        if self.snapshot_every < 1:
            raise ConfigError("snapshot_every", self.snapshot_every, "must be at least 1", "Use 1000, say.")
        if len(self.lengths) > _MOST_LENGTHS:
            problem = f"are {len(self.lengths)} copies of the weights, and at most {_MOST_LENGTHS} are kept"
            raise ConfigError("lengths", list(self.lengths), problem, "EDM2 uses 0.05 and 0.1.")
        usable = {s for s in self.lengths if _SHORTEST < s < LONGEST}
        if not usable or len(usable) < len(self.lengths):
            problem = f"must be different numbers in ({_SHORTEST}, {LONGEST:.4f})"
            raise ConfigError("lengths", list(self.lengths), problem, "EDM2 uses 0.05 and 0.1.")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Either a decay per step, or (EDM's) a number of images in which a weight's share in the average halves."""

    decay: float | None = None
    """Limit of the decay per step; null is 0.9999, unless there is a half-life."""
    halflife_images: float | None = None
    """Images in which a weight's share in the average halves, instead of `decay`. EDM: 500,000."""
    warmup: bool = True
    """Smaller decays at first: min(decay, (1 + n) / (10 + n)) at update n (LDM's), or a half-life of at most
    `warmup_ratio` of the images seen."""
    warmup_ratio: float = 0.05
    """Greatest half-life, relative to the images seen so far, during warm-up."""
    power: PowerEmaConfig | None = None
    """Further averages, from which one of any length is made after training."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ConfigError("decay", self.decay, "must lie in [0, 1)", "Use 0.9999, or 0 to follow the weights.")
        for name in ("halflife_images", "warmup_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(name, value, "must be above 0", "EDM uses 500000 images and a ratio of 0.05.")
        if self.decay is not None and self.halflife_images is not None:
            raise ConfigError(
                "halflife_images", self.halflife_images, f"there is also a decay per step, {self.decay}", "Keep one."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of averages, as checkpoints name them."""
        return "ema", *map(kind_of, self.power.lengths if self.power else ())

    def decay_at(self, update: int, batch_size: int) -> float:
        """Share of the average that update number `update`, counted from 1, keeps.

        Args:
            batch_size: images per step.
        """
        if self.halflife_images is not None:
            halflife = self.halflife_images
            if self.warmup:
                # EDM takes the images seen before this step. At the first step none were seen: no decay, the average
                # becomes the weights.
                halflife = min(halflife, self.warmup_ratio * (update - 1) * batch_size)
            return 0.5 ** (batch_size / halflife) if halflife else 0.0
        decay = 0.9999 if self.decay is None else self.decay
        return min(decay, (1 + update) / (10 + update)) if self.warmup else decay


class ShardedEma:
    """The averages of every fp32 shard that trains on this rank, beginning with copies of the weights.

    Averages of frozen weights are these weights, and are not kept.

    Args:
        state: fp32 shards by prefix of the parameter names, as `StageParallelEngines.state` returns them.
        batch_size: the global batch size.

    Attributes:
        averages: `averages[kind][prefix][i]` is the average of `state[prefix].flats()[i]`. Kinds are `ema` and, for
            each length of `ema.power`, `kind_of(length)`.
    """

    def __init__(self, config: EmaConfig, state: Mapping[str, ShardedState], batch_size: int) -> None:
        self._config, self._state, self._batch_size = config, state, batch_size
        self._exponents = {kind_of(s): exponent(s) for s in (config.power.lengths if config.power else ())}
        self.averages: dict[str, dict[str, list[Tensor]]] = {
            kind: {p: [f.detach().clone() for f in s.flats()] for p, s in state.items()} for kind in config.kinds
        }

    @torch.no_grad()
    def update(self, step: int, elapsed: Mapping[str, int] | None = None) -> None:
        """Take the weights after step number `step` of the run, counted from 1, into every average.

        Args:
            elapsed: by prefix, steps since a part's last update, 1 for those not named. 0: the part has not stepped,
                and its averages stay. What they have not decayed meanwhile they decay at its next step.
        """
        # The new weights' share in each average. A power average of t steps has (t^(g + 1) - (t - e)^(g + 1)) /
        # t^(g + 1) of the last e, which is 1 - (1 - e / t)^(g + 1).
        for prefix, state in self._state.items():
            since = 1 if elapsed is None else elapsed.get(prefix, 1)
            if not since:
                continue
            weights = {"ema": 1 - self._config.decay_at(step, self._batch_size) ** since}
            weights |= {kind: 1 - (1 - since / step) ** (gamma + 1) for kind, gamma in self._exponents.items()}
            for kind, weight in weights.items():
                if flats := [f.detach() for f in state.flats()]:  # none of a frozen part, whose averages never change
                    torch._foreach_lerp_(self.averages[kind][prefix], flats, weight)
