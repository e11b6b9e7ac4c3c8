"""Which stages of a run have ended, and what decides it: fixed steps, or a held-out loss that no longer falls."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msdiff_dist.training.phases import StageEndConfig


@dataclass(frozen=True, kw_only=True)
class StageEnds:
    """What a run remembers of its stages' ends; every checkpoint holds it.

    Attributes:
        ended: by stage, the steps after which it had ended.
        lowest_K: lowest held-out loss of each stage, None before the first finite one; empty before any validation.
        waited_K: validations since then.
    """

    ended: Mapping[int, int] = field(default_factory=dict)
    lowest_K: tuple[float | None, ...] = ()
    waited_K: tuple[int, ...] = ()

    @staticmethod
    def of(stored: Mapping[str, Any]) -> StageEnds:
        """Inverse of `stored`."""
        if not stored:
            return StageEnds()
        return StageEnds(
            ended={int(k): step for k, step in stored["ended"].items()},
            lowest_K=tuple(stored["lowest"]),
            waited_K=tuple(stored["waited"]),
        )

    def stored(self) -> dict[str, Any]:
        """As JSON values; nothing where there is nothing to remember."""
        if not self.ended and not self.lowest_K:
            return {}
        ended = {str(k): step for k, step in sorted(self.ended.items())}
        return {"ended": ended, "lowest": list(self.lowest_K), "waited": list(self.waited_K)}

    def with_ended(self, late: Sequence[int], step: int, training: Collection[int]) -> StageEnds:
        """Also with the ends of the stages `late` after `step`.

        The last stage goes on to the end of the run: of several that would leave none, the one whose held-out loss fell
        last, or else the first.

        Args:
            training: the stages that have trained at `step`.
        """
        left = [k for k in training if k not in self.ended]
        late = [k for k in late if k in left]
        if late and len(late) == len(left):
            late.remove(min(late, key=lambda k: (self.waited_K[k] if self.waited_K else 0, k)))
        return replace(self, ended={**self.ended, **dict.fromkeys(late, step)})

    def judged(
        self, config: StageEndConfig, step: int, loss_K: Sequence[float], training: Collection[int]
    ) -> StageEnds:
        """After the validation of `step`: a stage ends whose loss has not fallen for `config.patience` validations.

        Args:
            loss_K: held-out loss of each stage, the same on every rank.
            training: the stages that have trained at `step`.
        """
        if config.patience is None:
            return self
        lowest_K = self.lowest_K or (None,) * len(loss_K)
        fell_K = [
            math.isfinite(loss) and (low is None or loss < low * (1 - config.min_delta))
            for loss, low in zip(loss_K, lowest_K, strict=True)
        ]
        before_K = self.waited_K or (0,) * len(loss_K)
        seen = replace(
            self,
            lowest_K=tuple(loss if fell else low for loss, low, fell in zip(loss_K, lowest_K, fell_K, strict=True)),
            waited_K=tuple(0 if fell else n + 1 for fell, n in zip(fell_K, before_K, strict=True)),
        )
        late = [k for k in training if seen.waited_K[k] >= config.patience]
        return seen.with_ended(late, step, training)
