"""Text encoder `open_clip`: the frozen text tower of an open_clip model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdiff_dist.errors import ConfigError, did_you_mean
from msdiff_dist.models.identity import digest
from msdiff_dist.models.text_encoder import TextEncoder, TextEncoderConfig


class OpenClipText(TextEncoder):
    """A text tower of open_clip with its tokenizer.

    Raises:
        ConfigError: open_clip does not know the model or cannot load it, its text tower is not open_clip's own
            transformer, or it has no penultimate layer.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device) -> None:
        import open_clip

        name = _registered(config.name)
        try:
            with torch.random.fork_rng(devices=[]), _quiet():
                torch.manual_seed(config.seed)
                model = open_clip.create_model(name, pretrained=config.pretrained, device="cpu")
            self._tokenizer = open_clip.get_tokenizer(name)
        except Exception as e:  # of many kinds: unknown tags, files of other models, no connection
            field = "pretrained" if config.pretrained else "name"
            remedy = "Name a tag of this model (open_clip.list_pretrained()) or a file of its weights."
            raise ConfigError(
                f"text_encoder.{field}", getattr(config, field), f"cannot be loaded ({e})", remedy
            ) from None
        # open_clip keeps the text tower either as `model.text` (CustomTextCLIP) or in the model itself (CLIP).
        tower = model.text if hasattr(model, "text") else model
        if not hasattr(tower, "transformer") or not hasattr(tower.transformer, "resblocks"):
            problem, remedy = "has a text tower that is not open_clip's own", "Choose one without hf_model_name."
            raise ConfigError("text_encoder.name", config.name, problem, remedy)
        layers = len(tower.transformer.resblocks)
        if layers < 2 and config.layer == "penultimate":
            raise ConfigError("text_encoder.layer", config.layer, "the tower has one layer", "Use last.")
        model.visual = None
        self._config, self._device = config, device
        self._tower = tower.to(device).eval().requires_grad_(False)
        self._tower_is_model = tower is model
        self._block = layers - (1 if config.layer == "last" else 2)
        self.context_shape = (int(tower.context_length), int(tower.token_embedding.embedding_dim))

    @property
    def identity(self) -> str:
        how = {"layer": self._config.layer, "final_norm": self._config.final_norm, "shape": self.context_shape}
        return digest(how | {"tokenizer": type(self._tokenizer).__name__}, self._tower.state_dict())

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens_nT = self._tokenizer(list(captions))
        options: dict[str, Any] = {"normalize_intermediates": self._config.final_norm, "intermediates_only": True}
        tokens = tokens_nT.to(self._device)
        if self._tower_is_model:
            found = self._tower.forward_intermediates(text=tokens, text_indices=[self._block], **options)
        else:
            found = self._tower.forward_intermediates(tokens, indices=[self._block], output_fmt="NLC", **options)
        return found["text_intermediates"][0].float().cpu(), self._mask(tokens_nT)

    def _mask(self, tokens_nT: Tensor) -> Tensor:
        """True up to and with the first end token, or, for tokenizers without one, for all but padding."""
        end = getattr(self._tokenizer, "eot_token_id", None)
        if end is None:
            return tokens_nT != getattr(self._tower, "pad_id", -1)
        is_end = (tokens_nT == end).long()
        out: Tensor = is_end.cumsum(1) - is_end == 0  # no end token before this one
        return out


def _registered(name: str) -> str:
    """The name under which open_clip knows the model. Registers a model configuration given as a .json file."""
    import open_clip

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ConfigError(
                "text_encoder.name", name, "does not exist", "Name the configuration of an open_clip model."
            )
        open_clip.add_model_config(name)
        name = Path(name).stem
    if ":" not in name and name not in open_clip.list_models():
        raise ConfigError(
            "text_encoder.name", name, "is not a model of open_clip", did_you_mean(name, open_clip.list_models())
        )
    return name


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's warning about missing weights: random weights are wanted here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
