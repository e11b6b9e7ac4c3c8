"""`ModelWeights`, which every format is read into and written from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    """An autoencoder as diffusers has it; other formats' autoencoders are converted to it."""

    class_name: str
    """`AutoencoderKL` or `VQModel`."""
    config: dict[str, Any]
    """Content of its config.json."""
    tensors: TensorSource
    """Its tensors under diffusers' names."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderWeights:
    """A CLIPTextModel as transformers has it, with its tokenizer."""

    config: dict[str, Any]
    """Content of its config.json."""
    tensors: TensorSource
    """Its tensors under the names in its file."""
    tokenizer: tuple[Path, ...]
    """The tokenizer's files."""
    context_shape: tuple[int, int]
    """Number of tokens of a caption's embedding and their width, (T, D)."""


# Beginnings of our names for tensors of the frozen networks, which no edit of the stages changes.
FROZEN = ("autoencoder/", "text_encoder/")


@dataclass(kw_only=True)
class ModelWeights:
    """A model of any format: its description, its tensors under our names, and what became of each key of the source.

    Our names are those of `MultistageUNet`, and those of `FROZEN` before the other libraries' names for tensors of the
    autoencoder and the text encoder.
    """

    description: ModelDescription
    tensors: TensorSource
    """The network's tensors under `MultistageUNet`'s names."""
    autoencoder_weights: AutoencoderWeights | None = None
    """The autoencoder, where the source holds it."""
    text_encoder_weights: TextEncoderWeights | None = None
    """The text encoder with its tokenizer, where the source holds them."""
    used: dict[str, list[str]] = field(default_factory=dict)
    """For each key of the source that is converted, our names of the tensors that it gives."""
    left_out: dict[str, str] = field(default_factory=dict)
    """For each other key of the source (or other content), the reason why it is not converted."""
    assumed: list[str] = field(default_factory=list)
    """For each question that no file answers, the published models' answer, which was assumed."""
    notes: list[Path] = field(default_factory=list)
    """Files of the source about its licence and use, to be copied along."""
    unstated: frozenset[Literal["diffusion", "autoencoder"]] = frozenset()
    """Sections of the description that no file of the source states: the source is a network alone."""

    @property
    def model(self) -> ModelConfig:
        """Configuration of the network."""
        return self.description.model


@dataclass(kw_only=True)
class Written:
    """What a writer wrote, for the report."""

    names: dict[str, list[str]]
    """For each of our names, the names of its tensors in the result."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file of weights, by its path in the result."""
    added: dict[str, str] = field(default_factory=dict)
    """For each tensor of the result that comes from no tensor of the model, its origin."""
    remarks: list[str] = field(default_factory=list)
    """Sentences for the user about the result."""


def empty_model(config: ModelConfig) -> MultistageUNet:
    """The model on the meta device: names and shapes without memory or values."""
    with torch.device("meta"):
        return build_model(config)


def ldm_model(weights: ModelWeights, target: str) -> LDMConfig:
    """The model's configuration, which must be of the LDM family.

    Args:
        target: the program to convert to, for the message.

    Raises:
        CheckpointError: it is of another family, which the target does not have.
    """
    if not weights.model.share_encoder:
        raise CheckpointError(
            "share_encoder", False, f"every stage has an encoder of its own, and {target}'s model has one",
            "Convert one stage with --stage.",
        )  # fmt: skip
    if not isinstance(weights.model, LDMConfig):
        raise CheckpointError(
            "model.family", weights.model.family, f"{target} has no network of this family", "Use another --to."
        )
    return weights.model


class JoinedSource(TensorSource):
    """Several sources as one. No name may be in two of them."""

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
