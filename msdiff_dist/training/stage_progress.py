"""How many samples and optimizer steps each stage's decoder has had, and whether it steps after a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msdiff_dist.distributed.engines import Turn

_COUNTS = ("samples", "steps", "waited", "gathered")


class StageProgress:
    """Counters of every stage, the same on every rank.

    Args:
        quotas_K: samples of each stage in a global batch, if all batches are alike.
        min_samples: a decoder steps when it has gathered so many samples.
        stored: whether checkpoints need the counters. Where every decoder steps on every batch they follow from the
            step.

    Attributes:
        samples: by stage, samples trained on.
        steps: by stage, optimizer steps of its decoder.
        waited: by stage, steps of the run since its decoder's last one.
        gathered: by stage, samples whose gradients wait.
        elapsed: by stage, after its decoder has stepped: steps of the run since its step before; 0: it has not.
    """

    def __init__(self, quotas_K: Sequence[int], min_samples: int = 1, *, stored: bool = False) -> None:
        self._quotas, self._min_samples, self.stored = [int(q) for q in quotas_K], min_samples, stored
        self.samples, self.steps, self.waited, self.gathered, self.elapsed = ([0] * len(quotas_K) for _ in range(5))

    def turns(self, quotas_K: Sequence[int]) -> list[Turn]:
        """What every decoder does after a batch with so many samples of each stage."""
        return [
            Turn(int(n), gathered, bool(n) and n + gathered >= self._min_samples)
            for n, gathered in zip(quotas_K, self.gathered, strict=True)
        ]

    def take(self, turns: Sequence[Turn]) -> None:
        """Count a batch after which the decoders have done this."""
        for k, turn in enumerate(turns):
            self.samples[k] += turn.samples
            self.steps[k] += turn.steps
            self.gathered[k] = 0 if turn.steps else self.gathered[k] + turn.samples
            self.elapsed[k] = self.waited[k] + 1 if turn.steps else 0
            self.waited[k] = 0 if turn.steps else self.waited[k] + 1

    def fields(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: list(getattr(self, name)) for name in _COUNTS} if self.stored else {}

    def restore(self, step: int, fields: Mapping[str, Any], began: Mapping[str, int]) -> None:
        """Take over what a checkpoint of `step` has kept; nothing: every decoder has stepped on every batch.

        Args:
            began: by prefix of the parameter names, the step at which a part's optimizer began.
        """
        K = len(self._quotas)
        counts = dict(fields) or {
            "samples": [step * quota for quota in self._quotas],
            "steps": [step] * K,
            "waited": [0] * K,
            "gathered": [0] * K,
        }
        for name in _COUNTS:
            setattr(self, name, list(counts[name]))
        for k in range(K):
            first = began.get(f"stages.{k}.", 0)
            self.steps[k] = 0 if first == step else self.steps[k] if fields else step - first

    def own_steps(self) -> dict[str, int]:
        """Optimizer steps of the decoders that do not step on every batch, by prefix of their parameter names."""
        return {f"stages.{k}.": steps for k, steps in enumerate(self.steps)} if self.stored else {}
