"""When checkpoints are made and which are kept."""

from __future__ import annotations

from dataclasses import dataclass

from msdiff_dist.errors import ConfigError


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints, 0 for the last step only. keep_last: newest checkpoints kept."""

    every: int = 1000
    keep_last: int = 3

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError("every", self.every, "must not be negative", "Use 0 to save at the end only.")
        if self.keep_last < 1:
            raise ConfigError("keep_last", self.keep_last, "must be at least 1", "Keep at least the newest.")
