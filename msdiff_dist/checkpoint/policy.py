"""When checkpoints are made, and which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msdiff_dist.bounds import check_different
from msdiff_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves, and what it keeps."""

    every: int = 1000
    """Steps between checkpoints; 0: only after the last step."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept too; 0: none."""
    keep_best: bool = False
    """The checkpoint with the lowest loss is kept too: the held-out loss with `validation`, else the smoothed training
    loss."""
    at: tuple[int, ...] = ()
    """Further steps that are saved, and kept."""

    def __post_init__(self) -> None:
        for field in ("every", "keep_every"):
            if getattr(self, field) < 0:
                raise ConfigError(field, getattr(self, field), "must not be negative", "Use 0 for none.")
        if any(step < 1 for step in self.at):
            raise ConfigError("at", list(self.at), "steps are counted from 1", "Correct it.")
        check_different("at", self.at)
        if self.keep_last < 1:
            raise ConfigError("keep_last", self.keep_last, "must be at least 1", "Keep at least the newest.")
        if self.every and self.keep_every % self.every:
            raise ConfigError(
                "keep_every", self.keep_every, f"is not a multiple of every = {self.every}",
                f"Use {-(-self.keep_every // self.every) * self.every}.",
            )  # fmt: skip

    def due(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint after `step` steps. One after the last step is always made."""
        return step in self.at or (self.every > 0 and step % self.every == 0)


def kept(losses: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """Steps of the existing checkpoints that are kept.

    Args:
        losses: the smoothed loss of each existing checkpoint, by step; None where there is none.
    """
    steps = sorted(losses)
    keep = set(steps[-config.keep_last :]) | (losses.keys() & set(config.at))
    if config.keep_every:
        keep |= {s for s in steps if s % config.keep_every == 0}
    known = {s: v for s, v in losses.items() if v is not None}
    if config.keep_best and known:
        keep.add(min(known, key=lambda s: (known[s], -s)))  # of equal losses the newest
    return keep
