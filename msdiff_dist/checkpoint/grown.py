"""A checkpoint of a unified model, read as one of the multi-stage model that grows out of it.

Weights and averages follow `models.growing`: an average is linear in the weights, so the average of grown weights is
the grown average. The optimizer's moments follow the gradients (`Resized.apply_to_gradient`). Nothing is written: each
rank reads what it holds, so a run that is killed here loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from msdiff_dist.checkpoint.layout import part_of
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.freezing import parameter_shapes
from msdiff_dist.models.growing import grown_from
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.models.resizing import Resized


class GrownReader:
    """Reads ranges of the grown model's state, as `CheckpointReader` does.

    Args:
        reader: a checkpoint of `unified`.
        model: the configuration of the grown model.
        degrees: powers of the gradient that the optimizer's moments average, by kind.
        seed: of the first weights of parameters that the unified model does not have.

    Raises:
        ConfigError: a decoder changes its width, and how a kind of moment follows is not known.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        unified: ModelConfig,
        model: ModelConfig,
        degrees: Mapping[str, int],
        seed: int,
    ) -> None:
        self._reader, self._model, self._degrees, self._seed = reader, model, degrees, seed
        self._from = grown_from(unified, model)
        # What else trains, such as a guide's projector, stays.
        beside = {n: s for n, s in reader.index.shapes.items() if not n.startswith(("shared.", "stages."))}
        self._from |= {name: Resized(name) for name in beside}
        self._first: tuple[str, nn.Module] | None = None  # the part whose first weights were asked for last
        resized = [name for name, how in self._from.items() if how and not how.is_copy]
        unknown = [kind for kind in reader.index.moments if kind not in degrees]
        if resized and unknown:
            raise ConfigError(
                "grow.at", reader.index.step, f"the optimizer's {', '.join(unknown)} of {resized[0]} cannot be resized",
                "Use adamw, adam or sgd, or decoders as wide as the unified model's.",
            )  # fmt: skip
        began: dict[str, int] = {}
        for name, how in self._from.items():
            # One optimizer's count may now serve parameters of two old ones: the later start is the safer count.
            old = reader.index.optimizer_began.get(part_of(how.name), 0) if how else 0
            began[part_of(name)] = max(old, began.get(part_of(name), 0))
        self.index = replace(
            reader.index,
            shapes={**parameter_shapes(model), **beside},
            optimizer_began={part: step for part, step in began.items() if step},
            stages={},  # a unified model steps on every batch
        )

    @property
    def kinds(self) -> list[str]:
        """Kinds of tensors in the checkpoint: `param`, optimizer moments, averages."""
        return self._reader.kinds

    def holds(self, kind: str, name: str) -> bool:
        """Whether there is any of that kind of a parameter: new ones have no moments."""
        how = self._from[name]
        return how is not None and self._reader.holds(kind, how.name)

    def read_range(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened `kind` of parameter `name`, float32."""
        how = self._from[name]
        if how is not None and how.is_copy:
            return self._reader.read_range(kind, how.name, start, numel)
        whole = self._first_weights(name) if how is None else self._resized(kind, how)
        return whole.flatten()[start : start + numel]

    def _resized(self, kind: str, how: Resized) -> Tensor:
        old = self._reader.tensor(kind, how.name)
        return how.apply_to_gradient(old, self._degrees[kind]) if kind in self._reader.index.moments else how.apply(old)

    def _first_weights(self, name: str) -> Tensor:
        _, stage, own = name.split(".", 2)
        if self._first is None or self._first[0] != stage:
            self._first = stage, build_parts(self._model, [int(stage)], self._seed)[1][int(stage)]
        with torch.no_grad():
            return self._first[1].get_parameter(own).detach().float()
