"""What every format is read into and written from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model


@dataclass(frozen=True)
class AutoencoderWeights:
    """A diffusers autoencoder: its class, its config.json and its tensors under diffusers' names."""

    class_name: str
    config: dict[str, Any]
    tensors: TensorSource


@dataclass(kw_only=True)
class ModelWeights:
    """A model: what it is, its tensors under `MultistageUNet`'s names, and what became of each key of the source.

    Args:
        used: source key -> our names.
        left_out: source key (or other content) -> why it is not in the result.
        assumed: what no file said and the published models' answer was taken for.
        notes: files of the source about its licence and use.
    """

    description: ModelDescription
    tensors: TensorSource
    autoencoder_weights: AutoencoderWeights | None = None
    used: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    notes: list[Path] = field(default_factory=list)

    @property
    def model(self) -> ModelConfig:
        return self.description.model


@dataclass(kw_only=True)
class Written:
    """What a writer made. names: our name -> names in the result. files: file -> sha256."""

    names: dict[str, list[str]]
    files: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def empty_model(config: ModelConfig) -> MultistageUNet:
    """The model without values, on the meta device."""
    with torch.device("meta"):
        return build_model(config)


def ldm_model(weights: ModelWeights, target: str) -> LDMConfig:
    """The configuration of a model of the LDM family.

    Raises:
        CheckpointError: it is of another family, which `target` does not have.
    """
    if not isinstance(weights.model, LDMConfig):
        raise CheckpointError(
            "model.family", weights.model.family, f"{target} has no network of this family", "Use another --to."
        )
    return weights.model


class JoinedSource(TensorSource):
    """Several sources as one; their names must differ."""

    def __init__(self, parts: Iterable[TensorSource]) -> None:
        self._where: dict[str, TensorSource] = {}
        for part in parts:
            keys = part.names()
            assert not self._where.keys() & set(keys)
            self._where |= dict.fromkeys(keys, part)
            self.files = (*self.files, *part.files)

    def names(self) -> list[str]:
        return list(self._where)

    def meta(self, key: str) -> Tensor:
        return self._where[key].meta(key)

    def read(self, key: str) -> Tensor:
        return self._where[key].read(key)
