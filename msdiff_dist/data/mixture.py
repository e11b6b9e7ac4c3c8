"""Mixing sources by weight: which source gives each global sample number, in closed form.

Weights are scaled to the smallest whole numbers in their ratio, the quotas. The stream repeats a pattern of
sum(quotas) places, of which each source fills its quota, spread evenly. So any range of the stream is about as near to
the weights as whole samples allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from msdiff_dist.data.order import Ints
from msdiff_dist.errors import ConfigError

_LONGEST = 1_000_000  # places of a pattern


class Mixture:
    """The pattern of a set of weights.

    Raises:
        ConfigError: a pattern that keeps the weights exactly would have more than a million places.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        # By way of text, 0.1 is 1/10 and not the binary fraction nearest to it, whose denominator is 2**55.
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(f.denominator for f in fractions))
        whole = [int(f * scale) for f in fractions]
        quotas = [n // math.gcd(*whole) for n in whole]
        if sum(quotas) > _LONGEST:
            raise ConfigError("data.sources", list(weights), "the weights are too fine to be kept", "Round them.")
        # A source's samples stand at the middles of `quota` equal intervals of [0, 1]. The order of all these points
        # interleaves the sources. The sort is stable: of equal points the earlier source comes first.
        source_n = np.repeat(np.arange(len(quotas)), quotas)
        middle_n = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        self._source_n: Ints = source_n[np.argsort(middle_n, kind="stable")]
        # before_nS[i, s]: samples of source s among the first i places of the pattern; the last row is the whole of it.
        before = np.eye(len(quotas), dtype=np.int64)[self._source_n].cumsum(axis=0)
        self._before_nS = np.concatenate([np.zeros((1, len(quotas)), dtype=np.int64), before])

    def locate(self, g_n: Ints) -> tuple[Ints, Ints]:
        """Map global sample numbers [n] to (source [n], number in that source's own order [n])."""
        round_n, at_n = np.divmod(np.asarray(g_n, dtype=np.int64), len(self._source_n))
        source_n = self._source_n[at_n]
        return source_n, round_n * self._before_nS[-1, source_n] + self._before_nS[at_n, source_n]

    def taken_before(self, g: int) -> Ints:
        """Samples that each source gives before global sample number g, int64 [sources]."""
        rounds, at = divmod(g, len(self._source_n))
        found: Ints = rounds * self._before_nS[-1] + self._before_nS[at]
        return found
