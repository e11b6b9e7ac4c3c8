"""Feature spaces as feature extractors of torch-fidelity: importing this module registers them.

`torch_fidelity.calculate_metrics(..., feature_extractor="msdiff-mobilenet")` then computes what `msdiff evaluate
--features mobilenet` computes. The names are `msdiff-` and those of `FEATURE_SPACES`, but for Inception, which is
torch-fidelity's own; `register` adds a classifier's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from msdiff_dist.evaluation.feature_spaces import FEATURE_SPACES, load_feature_space

PREFIX = "msdiff-"
_FEATURES, _LOGITS = "features", "logits"


def register(name: str, features: str) -> None:
    """Register the feature space `features`, a name in `FEATURE_SPACES` or a classifier's file, under `name`.

    Its layers are `features` and, where the network has classes, `logits`. The weights are its own, or those of
    torch-fidelity's option `feature_extractor_weights_path`.
    """

    class Extractor(_SpaceExtractor):
        space_name = features

    register_feature_extractor(name, Extractor)


class _SpaceExtractor(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    space_name: str

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self._weights = None if feature_extractor_weights_path is None else Path(feature_extractor_weights_path)
        self._device = torch.device("cpu")
        self._space = load_feature_space(self.space_name, self._weights, self._device)

    def forward(self, images_nCHW: Tensor) -> tuple[Tensor, ...]:
        """The requested layers [n, ...] of uint8 RGB images, float64, as `msdiff evaluate` takes them to scores."""
        if images_nCHW.device != self._device:  # torch-fidelity says on which device only by its images
            self._device = images_nCHW.device
            self._space = load_feature_space(self.space_name, self._weights, self._device)
        features, logits = self._space(images_nCHW)
        found = {_FEATURES: features, _LOGITS: logits}
        layers = [found[layer] for layer in self.features_list]
        if any(layer is None for layer in layers):
            raise ValueError(f"{self.name} has no {_LOGITS}: its network has no classes")
        return tuple(layer.double() for layer in layers if layer is not None)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (_FEATURES, _LOGITS)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return _LOGITS if metric == "isc" else _FEATURES

    @staticmethod
    def can_be_compiled() -> bool:
        return False


for _name in FEATURE_SPACES:
    if _name != "inception":
        register(f"{PREFIX}{_name}", _name)
