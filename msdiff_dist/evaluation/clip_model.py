"""CLIP models of open_clip: their image tower as a feature space, and both towers for scores of images and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.scores import Array

DEFAULT_MODEL = "ViT-L-14"
_BATCH = 256


class ClipModel:
    """Both towers of a CLIP model.

    Args:
        weights: file of the model's weights.
        model: name of an open_clip model, or a .json file with a model's configuration.

    Raises:
        ConfigError: there is no such model or file, or the file holds another model's weights.
    """

    def __init__(self, weights: Path | None, model: str, device: torch.device) -> None:
        import open_clip

        if weights is None or not weights.is_file():
            raise ConfigError(
                "--feature-weights", None if weights is None else str(weights),
                f"clip needs the file of the weights of {model}",
                f"`hf download timm/vit_large_patch14_clip_224.openai` gets {DEFAULT_MODEL}'s.",
            )  # fmt: skip
        if model.endswith(".json"):
            open_clip.add_model_config(model)
            model = Path(model).stem
        try:
            net = open_clip.create_model(model, pretrained=str(weights), device="cpu", weights_only=True)
            self._tokenizer = open_clip.get_tokenizer(model)
        except Exception as e:  # of many kinds: unknown models, files of other models
            problem = f"cannot be loaded as {model} ({' '.join(str(e).split())[:200]})"
            remedy = "Name a model of open_clip.list_models() with --clip-model, and its weights."
            raise ConfigError("--feature-weights", str(weights), problem, remedy) from e
        self._net, self._device = net.to(device).eval().requires_grad_(False), device
        size = net.visual.image_size
        self.size = int(size[0] if isinstance(size, tuple) else size)
        self.width = int(net.visual.output_dim)
        self._mean = torch.tensor(net.visual.image_mean, device=device)[:, None, None]
        self._std = torch.tensor(net.visual.image_std, device=device)[:, None, None]

    def network(self, images_nCHW: Tensor) -> tuple[Tensor, None]:
        """Image embeddings [n, width] of uint8 RGB images, resized bicubically with antialiasing, of unit length."""
        x = images_nCHW.to(self._device).float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self._net.encode_image((x - self._mean) / self._std, normalize=True), None

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Array:
        """Embeddings [n, width] of prompts, of unit length."""
        parts = []
        for start in range(0, len(prompts), _BATCH):
            tokens = self._tokenizer(list(prompts[start : start + _BATCH])).to(self._device)
            parts.append(self._net.encode_text(tokens, normalize=True).float().cpu())
        return np.asarray(torch.cat(parts).double().numpy())
