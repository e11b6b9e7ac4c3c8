"""The held-out loss of an ablation: one set of samples, times, noise and weights for all variants.

The number is the mean over the baseline's training distribution of times of the error of the network's output, without
weights of times or stages: for noise prediction the mean squared error of the noise, for EDM its own objective. The
objective itself would not compare: it depends on `stages.sampling` and on weights such as min-SNR's.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from msdiff_dist.apps.ablation.config import LOSS, TENTHS
from msdiff_dist.apps.evaluation.loss import losses_of
from msdiff_dist.apps.train.found_data import FoundData
from msdiff_dist.apps.train.validation import held_out_loss, held_out_samples
from msdiff_dist.config import differences, to_mapping
from msdiff_dist.diffusion.process import Process
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.held_out_loss import HeldOutLoss, ValidationConfig
from msdiff_dist.recipe import Recipe

_FREE = (
    "flip", "lanes", "workers", "shuffle", "retries", "allow_pipe", "accept_changes", "max_bad", "crop", "captions",
)  # fmt: skip
"""Fields of `data` that decide nothing about held-out samples."""
_DECIDING = ("fraction", "shards", "num", "seed")  # fields of `validation`


class HeldOut:
    """The samples that the baseline holds out, and its evaluations of them.

    Raises:
        ConfigError: the baseline holds none out. DataError: they cannot be read.
    """

    def __init__(self, baseline: Recipe, found: FoundData) -> None:
        if baseline.validation is None:
            raise ConfigError(
                "score.metrics", LOSS, "needs held-out samples, and the baseline holds none out",
                "Write `validation.fraction: 0.02` under `changes`, or leave loss out.",
            )  # fmt: skip
        self._baseline, self._config = baseline, baseline.validation
        self._samples = held_out_samples(baseline, self._config, found.shards)
        self._own = self._loss(baseline)

    def about(self) -> dict[str, Any]:
        """What the losses depend on besides weights, as JSON values."""
        columns = [self._samples.x_nCHW, self._samples.label_n, self._samples.context_nTC]
        digest = hashlib.sha256("\n".join(map(str, self._samples.key_n.tolist())).encode())
        for column in columns:
            digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
        recipe = self._baseline
        return {
            "held_out": digest.hexdigest()[:16],
            "samples": len(self._samples.key_n),
            "num": self._config.num,
            "seed": self._config.seed,
            "process": {"name": recipe.diffusion.process, **to_mapping(recipe.diffusion.settings())},
            "loss": recipe.train.loss,
        }

    def check(self, recipe: Recipe) -> None:
        """Refuse a variant whose held-out loss does not compare with the baseline's.

        Raises:
            ConfigError: it has other samples, another process or another parametrization.
        """
        mine, others = _samples_of(self._baseline, self._config), _samples_of(recipe, recipe.validation)
        for field, own, other in differences(mine, others):
            problem = f"the baseline has {own!r}, so held-out losses would be of other samples"
            raise ConfigError(field, other, problem, _REMEDY)
        if not _alike(self._baseline.process(), recipe.process(), self._own):
            raise ConfigError(
                "diffusion", recipe.diffusion.process,
                "its network does not take and predict the same as the baseline's, so held-out losses do not compare",
                _REMEDY,
            )  # fmt: skip
        own, other = self._own.evaluations, self._loss(recipe).evaluations
        if not all(np.array_equal(getattr(own, f), getattr(other, f)) for f in ("sample_n", "t_n", "weight_n")):
            problem = "its held-out evaluations are not the baseline's, so held-out losses do not compare"
            raise ConfigError("validation", recipe.name, problem, _REMEDY)

    def of(self, recipe: Recipe, model: ImageGenerator) -> dict[str, float]:
        """The held-out loss of a model of a recipe that `check` accepts, and that in each tenth of times, by name."""
        loss = self._loss(recipe)
        found = loss.summary(losses_of(loss, recipe, model))
        value, tenths = found["unweighted"], found["loss_per_bin"]
        assert isinstance(value, float)
        assert isinstance(tenths, list)
        return {LOSS: value, **dict(zip(TENTHS, tenths, strict=True))}

    def _loss(self, recipe: Recipe) -> HeldOutLoss:
        # The stages are the variant's, whose decoders are asked; times, targets and error are the baseline's.
        train = replace(recipe.train, loss=self._baseline.train.loss)
        evaluated = replace(recipe, diffusion=self._baseline.diffusion, train=train)
        return held_out_loss(evaluated, self._config, self._samples)


_REMEDY = "Take loss out of score.metrics, or give both the same."


def _samples_of(recipe: Recipe, config: ValidationConfig | None) -> dict[str, Any]:
    data = {name: value for name, value in to_mapping(recipe.data).items() if name not in _FREE}
    held = None if config is None else {name: to_mapping(config)[name] for name in _DECIDING}
    return {"data": data, "validation": held, "autoencoder": to_mapping(recipe.autoencoder)}


def _alike(a: Process, b: Process, loss: HeldOutLoss) -> bool:
    """Whether networks of both processes get the same inputs and are regressed on the same targets, at all times."""
    if (a.unit, a.discrete) != (b.unit, b.discrete) or (a.discrete and a.hi != b.hi):
        return False
    t_n = torch.from_numpy(np.ascontiguousarray(loss.evaluations.t_n))
    x0, noise = torch.randn((2, len(t_n), 1, 1, 1), generator=torch.Generator().manual_seed(0))
    seen = [(*p.network_input(p.perturb(x0, noise, t_n), t_n), p.target(x0, noise, t_n)) for p in (a, b)]
    return all(torch.equal(own, other) for own, other in zip(*seen, strict=True))
