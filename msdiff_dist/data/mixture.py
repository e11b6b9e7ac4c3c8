"""Mixing sources by weight: which source gives each global sample number, in closed form.

Weights are made whole numbers. Of every sum(weights) samples in a row, aligned, exactly weight come from each source,
spread evenly, so any stretch of the stream is as near to the weights as whole samples allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from msdiff_dist.data.order import Ints
from msdiff_dist.errors import ConfigError

_LONGEST = 1_000_000


class Mixture:
    """The pattern of a set of weights.

    Raises:
        ConfigError: weights that only a pattern of more than a million samples keeps exactly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(f.denominator for f in fractions))
        whole = [int(f * scale) for f in fractions]
        quotas = [n // math.gcd(*whole) for n in whole]
        if sum(quotas) > _LONGEST:
            raise ConfigError("data.sources", list(weights), "the weights are too fine to be kept", "Round them.")
        source_n = np.repeat(np.arange(len(quotas)), quotas)
        middle_n = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        self._source_n: Ints = source_n[np.argsort(middle_n, kind="stable")]
        before = np.eye(len(quotas), dtype=np.int64)[self._source_n].cumsum(axis=0)
        self._before_nS = np.concatenate([np.zeros((1, len(quotas)), dtype=np.int64), before])

    def locate(self, g_n: Ints) -> tuple[Ints, Ints]:
        """Global sample numbers to (source, number in the source's own order)."""
        round_n, at_n = np.divmod(np.asarray(g_n, dtype=np.int64), len(self._source_n))
        source_n = self._source_n[at_n]
        return source_n, round_n * self._before_nS[-1, source_n] + self._before_nS[at_n, source_n]

    def taken_before(self, g: int) -> Ints:
        """Samples each source has given before global sample number g."""
        rounds, at = divmod(g, len(self._source_n))
        found: Ints = rounds * self._before_nS[-1] + self._before_nS[at]
        return found
