"""Maps captions to context embeddings with a frozen text encoder: one of open_clip, or that of a Stable Diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from msdiff_dist.bounds import check_seed
from msdiff_dist.errors import ConfigError

_OF_OPEN_CLIP = ("pretrained", "layer", "final_norm", "seed")


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A frozen text encoder."""

    kind: Literal["open_clip", "clip"] = "open_clip"
    """`open_clip`: a text tower of that library; `clip`: the folders `text_encoder` and `tokenizer` of a Stable
    Diffusion, as transformers has them. Its context is the output of the last block, normalised."""
    name: str
    """open_clip model (`ViT-H-14`), `hf-hub:...`, or a model configuration in a .json file. For kind `clip` the folder
    that holds `text_encoder` and `tokenizer`."""
    pretrained: str | None = None
    """Tag or file of an open_clip model's weights. null: random weights, the same for the same `seed`."""
    layer: Literal["last", "penultimate"] = "penultimate"
    """Block of an open_clip model whose output is the context: the last or the one before it."""
    final_norm: bool = True
    """Apply the open_clip tower's last normalisation to that output, as Stable Diffusion does to the penultimate
    block's."""
    seed: int = 0
    """Seed of an open_clip model's random weights."""

    def __post_init__(self) -> None:
        for field in ("name", "pretrained"):
            value = getattr(self, field)
            if value is not None and not value.strip():
                raise ConfigError(field, value, "is empty", "Name a model of open_clip, a file or a folder.")
        check_seed("seed", self.seed)
        if self.kind == "open_clip":
            return
        for f in fields(self):
            if f.name in _OF_OPEN_CLIP and getattr(self, f.name) != f.default:
                problem = f"has no meaning for kind {self.kind!r}, whose folder says all"
                raise ConfigError(f.name, getattr(self, f.name), problem, "Remove it.")


class TextEncoder(ABC):
    """A frozen text encoder with its tokenizer.

    Attributes:
        context_shape: (T, D) of a caption's embedding: number of tokens, width.
    """

    context_shape: tuple[int, int]

    @property
    @abstractmethod
    def identity(self) -> str:
        """A string that differs for encoders whose embeddings differ: a digest of weights, layer and tokenizer."""

    @abstractmethod
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [n, T, D], float32, and mask [n, T], True for the tokens of the caption, both on the CPU."""


def open_text_encoder(config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Load a text encoder.

    Raises:
        ConfigError: it is not known, or cannot be loaded.
    """
    # Either library takes seconds to import, so only the one that is needed is.
    if config.kind == "clip":
        from msdiff_dist.models.clip_text import ClipText

        return ClipText(config, device)
    from msdiff_dist.models.open_clip_text import OpenClipText

    return OpenClipText(config, device)
