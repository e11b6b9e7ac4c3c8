"""Maps prompts to the context embeddings that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdiff_dist.errors import ConfigError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models.text_encoder import TextEncoder, open_text_encoder


class Prompter:
    """Embeds prompts with the text encoder of a model. It is loaded when first needed, and embeddings are kept."""

    def __init__(self, description: ModelDescription, device: torch.device) -> None:
        self._takes_context = description.model.takes_context
        self._config, self._shape, self._device = description.text_encoder, description.context_shape, device
        self._encoder: TextEncoder | None = None
        self._known: dict[str, Tensor] = {}

    def __call__(self, index_n: Sequence[int], prompts: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        """(context, context without a caption), each [n, T, D], of the images with the numbers `index_n`.

        Both are None for a model that takes no context. Without a caption the context is that of the empty caption, or
        zeros for a model without a text encoder, as in training.

        Args:
            prompts: image i has prompt i modulo their number; none: images without a caption.

        Raises:
            ConfigError: there are prompts, but the model takes no text or has no text encoder; or its text encoder does
                not have the shape that the model was trained with.
        """
        if prompts and not (self._takes_context and self._config):
            problem = (
                "the model was not trained with a text_encoder" if self._takes_context else "the model takes no text"
            )
            raise ConfigError("--prompt", prompts[0], problem, "Omit it.")
        if not self._takes_context:
            return None, None
        null = self._embedded("").expand(len(index_n), -1, -1)
        if not prompts:
            return null, null
        return torch.stack([self._embedded(prompts[i % len(prompts)]) for i in index_n]), null

    def _embedded(self, prompt: str) -> Tensor:
        if self._config is None:
            if self._shape is None:
                raise ConfigError("context_shape", None, "is missing from the model's config.json", "Add it there.")
            return torch.zeros(self._shape, device=self._device)
        if prompt not in self._known:
            self._encoder = self._encoder or open_text_encoder(self._config, self._device)
            if self._shape not in (None, self._encoder.context_shape):
                raise ConfigError(
                    "text_encoder.name", self._config.name, f"embeds as {list(self._encoder.context_shape)}, the model "
                    f"was trained on {list(self._shape or ())}", "Name the tower that made its training data.",
                )  # fmt: skip
            self._known[prompt] = self._encoder([prompt])[0][0].to(self._device)
        return self._known[prompt]
