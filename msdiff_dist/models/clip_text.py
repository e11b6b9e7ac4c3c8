"""Text encoder `clip`: a Stable Diffusion's folders `text_encoder` (CLIPTextModel) and `tokenizer`, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from msdiff_dist.errors import ConfigError
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.models.identity import digest
from msdiff_dist.models.text_encoder import TextEncoder, TextEncoderConfig

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""The folders of the two in a pipeline's folder."""
_FIELD = "text_encoder.name"


class ClipText(TextEncoder):
    """The text encoder of a Stable Diffusion, called as diffusers' pipelines call it.

    Captions are cut or padded to the tokenizer's length, 77. The context is the last hidden state after the last
    normalisation; Stable Diffusion 2 takes the penultimate block of OpenCLIP by having no block behind it.

    Raises:
        ConfigError: the folder lacks one of the two, or holds another kind of text encoder.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device) -> None:
        folder = Path(config.name).expanduser()
        settings = _settings(folder)
        try:
            model = _model(folder / TEXT_ENCODER)
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
        except Exception as e:  # of many kinds: a missing file, tensors of another shape, JSON cut short
            reason = " ".join(str(e).split())[:300]
            remedy = f"Name a folder with complete folders {TEXT_ENCODER} and {TOKENIZER}."
            raise ConfigError(_FIELD, config.name, f"cannot be loaded ({type(e).__name__}: {reason})", remedy) from None
        self._model, self._device = model.to(device).eval().requires_grad_(False), device
        # A tokenizer that states no length has a huge one.
        length = min(self._tokenizer.model_max_length, settings["max_position_embeddings"])
        self.context_shape = (length, settings["hidden_size"])
        self._masked = bool(settings.get("use_attention_mask"))

    @property
    def identity(self) -> str:
        tokenizer = self._tokenizer
        settings = {
            "vocabulary": tokenizer.get_vocab(),
            "shape": self.context_shape,
            "padding": tokenizer.pad_token_id,
            "masked": self._masked,
            "activation": self._model.config.hidden_act,
            "heads": self._model.config.num_attention_heads,
        }
        # Versions of transformers differ in whether names begin with the module that holds all the others.
        weights = {name.removeprefix("text_model."): tensor for name, tensor in self._model.named_parameters()}
        return digest(settings, weights)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self._tokenizer(
            list(captions), padding="max_length", max_length=self.context_shape[0], truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        mask = tokens.attention_mask.to(self._device) if self._masked else None
        context = self._model(tokens.input_ids.to(self._device), attention_mask=mask).last_hidden_state
        return context.float().cpu(), tokens.attention_mask.bool()


def _model(folder: Path) -> Any:
    """The network in fp32, whatever its files hold, as all frozen networks here."""
    load: Any = CLIPTextModel.from_pretrained  # what it returns depends on `output_loading_info`
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = load(
            folder, dtype=torch.float32, variant=_variant(folder), local_files_only=True, output_loading_info=True
        )
    finally:
        if bar:
            logging.enable_progress_bar()
    # transformers gives random values to tensors that the file lacks.
    if found["missing_keys"]:
        raise ValueError(f"{len(found['missing_keys'])} tensors are missing, such as {min(found['missing_keys'])}")
    return model


def _settings(folder: Path) -> dict[str, Any]:
    """config.json of the text encoder, which must be a CLIPTextModel."""
    for part in (TEXT_ENCODER, TOKENIZER):
        if not (folder / part).is_dir():
            raise ConfigError(
                _FIELD, str(folder), f"holds no folder {part}",
                f"Name a folder that holds {TEXT_ENCODER} and {TOKENIZER}, as Stable Diffusion's does.",
            )  # fmt: skip
    try:
        settings = parse_mapping((folder / TEXT_ENCODER / "config.json").read_bytes())
        kinds = settings.get("architectures") or ["CLIPTextModel"]
    except (OSError, ValueError) as e:
        problem = f"has a {TEXT_ENCODER}/config.json that cannot be read ({e})"
        raise ConfigError(_FIELD, str(folder), problem, "Copy the folder again.") from None
    if kinds != ["CLIPTextModel"]:
        problem = f"holds a text encoder of class {', '.join(map(str, kinds)) if isinstance(kinds, list) else kinds}"
        raise ConfigError(_FIELD, str(folder), problem, "Name one of class CLIPTextModel, or an open_clip model.")
    return {"max_position_embeddings": 77, "hidden_size": 512, **settings}  # what CLIPTextConfig has by default


def _variant(folder: Path) -> str | None:
    """The variant of the weights' files, such as `fp16`; None where there are files of full precision."""
    names = [p.name for p in folder.iterdir()]
    for variant in (None, "fp16", "bf16"):
        for stem in ("model", "pytorch_model"):
            begin = f"{stem}." if variant is None else f"{stem}.{variant}."
            if any(n == f"{begin}safetensors" or n == f"{begin}bin" for n in names):
                return variant
    return None
