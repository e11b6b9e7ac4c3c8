"""Which parameters of a model do not train, and which stages' samples are then worth computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import nn

from msdiff_dist.errors import ConfigError, did_you_mean, raise_all
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.multistage_unet import build_parts


@dataclass(frozen=True, kw_only=True)
class Freezing:
    """What of a model does not train.

    Attributes:
        names: the frozen parameters, by name in the whole model; empty: everything trains.
        stages: the stages whose samples train something, ascending. While a parameter of the shared part trains these
            are all stages, because gradients reach it through frozen decoders too; else those whose own part trains.
            Stages that have ended are never among them.
    """

    names: frozenset[str]
    stages: tuple[int, ...]

    def apply(self, shared: nn.Module, stages: Mapping[int, nn.Module]) -> None:
        """Let the frozen parameters of these parts require no gradient."""
        for prefix, part in {"shared.": shared, **{f"stages.{k}.": part for k, part in stages.items()}}.items():
            for name, p in part.named_parameters():
                if prefix + name in self.names:
                    p.requires_grad_(False)


@lru_cache(maxsize=64)
def freezing(config: ModelConfig, patterns: tuple[str, ...], ended: tuple[int, ...] = ()) -> Freezing:
    """What `train.freeze` and `stages.ended` leave of a model.

    Args:
        patterns: each names a parameter, a module with all below it (`shared`, `stages.0`), or several of either by
            `*`, `?` and `[...]`, as file names are matched; `*` also matches dots.
        ended: stages that do not train, of which no samples are drawn although a shared part trains.

    Raises:
        ConfigError: patterns match nothing, or nothing is left to train.
    """
    every = tuple(k for k in range(config.num_stages) if k not in ended)
    if not patterns and not ended:
        return Freezing(names=frozenset(), stages=every)
    known = parameter_names(config)
    matched = {pattern: frozenset(name for name in known if matches(pattern, name)) for pattern in patterns}
    raise_all(
        ConfigError(f"train.freeze[{i}]", pattern, "matches no parameter of the model", _nearest(pattern, known))
        for i, pattern in enumerate(patterns)
        if not matched[pattern]
    )
    of_ended = tuple(f"stages.{k}." for k in ended)
    names = frozenset(name for name in known if name.startswith(of_ended)).union(*matched.values())
    trained = [name for name in known if name not in names]
    if not trained or not every:
        field, value = ("train.freeze", patterns) if every else ("stages.ended", ended)
        raise ConfigError(field, list(value), "leaves nothing to train", "Take a part from the list.")
    if any(name.startswith("shared.") for name in trained):
        return Freezing(names=names, stages=every)
    stages = tuple(k for k in every if any(name.startswith(f"stages.{k}.") for name in trained))
    return Freezing(names=names, stages=stages)


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names the parameter `name`, or a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


@lru_cache(maxsize=16)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of all parameters of the whole model, by name. Nothing is allocated."""
    with torch.device("meta"):
        shared, stages = build_parts(config, range(config.num_stages))
    parts: Sequence[tuple[str, nn.Module]] = [("shared.", shared), *((f"stages.{k}.", p) for k, p in stages.items())]
    return {prefix + name: tuple(p.shape) for prefix, part in parts for name, p in part.named_parameters()}


def parameter_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of all parameters of the whole model. Nothing is allocated."""
    return tuple(parameter_shapes(config))


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """A remedy: the nearest name of a parameter or module, or else the names of the parts."""
    modules = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)} - {"stages"}
    hint = did_you_mean(pattern, {*names, *modules})
    parts = {".".join(name.split(".")[: 2 if name.startswith("stages.") else 1]) for name in names}
    return hint if hint.startswith("Did you mean") else did_you_mean(pattern, parts)
