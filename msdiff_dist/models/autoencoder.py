"""Between images and the latents that the diffusion sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.identity import digest
from msdiff_dist.pixels import centred, to_pixels


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The first stage of latent diffusion."""

    kind: Literal["pixel", "space_to_depth", "kl", "vq"] = "pixel"
    """`pixel` trains on images as they are; `space_to_depth` folds factor x factor pixels into channels, without loss;
    `kl` and `vq` are diffusers' AutoencoderKL and VQModel."""
    path: str | None = None
    """Weights of `kl` and `vq`: a local folder or a hub id."""
    factor: int = 1
    """Pixels of an edge that `space_to_depth` folds into one."""
    scale_factor: float = 1.0
    """Factor on latents before diffusion, so that they have about unit variance (LDM's)."""

    def __post_init__(self) -> None:
        if self.kind == "pixel" and self.factor != 1:
            raise ConfigError("factor", self.factor, "pixel keeps the size of images", "Use factor 1 or another kind.")
        if self.factor < 1:
            raise ConfigError("factor", self.factor, "must be at least 1", "space_to_depth usually takes 2 or 4.")
        if not self.scale_factor > 0:
            raise ConfigError("scale_factor", self.scale_factor, "must be above 0", "Use 1, or the autoencoder's own.")

    def latent_shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """[C, H, W] of the latents of images [channels, size, size], for the kinds that fix it by themselves."""
        if size % self.factor:
            raise ConfigError("factor", self.factor, f"does not divide the image size {size}", "Choose a divisor.")
        if self.kind in ("kl", "vq"):
            raise ConfigError(
                "kind", self.kind, "latents of this kind are computed beforehand, not while training",
                "Use data.kind: latent with data.latent_shape; name the images in encode.data.",
            )  # fmt: skip
        return channels * self.factor**2, size // self.factor, size // self.factor


class LatentCodec:
    """Stored samples -> latents x0, and x0 -> images; images -> what is stored of them.

    Args:
        stored_latents: the shards hold latents, not images.
    """

    def __init__(self, config: AutoencoderConfig, stored_latents: bool, device: torch.device) -> None:
        self._config, self._stored_latents, self._device = config, stored_latents, device
        self._model: Any = None

    def to_latents(self, x_BCHW: Tensor) -> Tensor:
        """uint8 images or stored latents -> float32 x0 [B, C, H, W], scaled for diffusion."""
        if self._stored_latents:
            return x_BCHW.float() * self._config.scale_factor
        images = centred(x_BCHW.float())
        if self._config.kind == "space_to_depth":
            images = F.pixel_unshuffle(images, self._config.factor)
        return images * self._config.scale_factor

    @torch.no_grad()
    def to_images(self, x0_BCHW: Tensor) -> Tensor:
        """x0 -> uint8 images [B, C, H, W] on the CPU."""
        x = x0_BCHW / self._config.scale_factor
        if self._config.kind == "space_to_depth":
            x = F.pixel_shuffle(x, self._config.factor)
        elif self._config.kind in ("kl", "vq"):
            x = self._autoencoder().decode(x.to(self._device)).sample
        return to_pixels(x).cpu()

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images -> float32 latents [B, c, h, w] on the CPU, without the scale factor.

        Of kind `kl` the posterior's mean and log variance, [B, 2c, h, w]; of kind `vq` the latents before quantisation.

        Raises:
            ConfigError: the autoencoder cannot be loaded, or does not take such images.
        """
        images = centred(images_BCHW.to(self._device).float())
        if self._config.kind == "pixel":
            return images.cpu()
        if self._config.kind == "space_to_depth":
            return F.pixel_unshuffle(images, self._config.factor).cpu()
        model = self._autoencoder()
        if images.shape[1] != model.config.in_channels:
            problem = f"takes {model.config.in_channels} channels, the images have {images.shape[1]}"
            raise ConfigError("autoencoder.path", self._config.path, problem, "Correct the channels of the images.")
        if self._config.kind == "vq":
            out: Tensor = model.encode(images).latents.float().cpu()
            return out
        posterior = model.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()

    @property
    def identity(self) -> str:
        """What latents of other autoencoders cannot have: kind, settings and weights."""
        if self._config.kind == "pixel":
            return "pixel"
        if self._config.kind == "space_to_depth":
            return f"space_to_depth-{self._config.factor}"
        model = self._autoencoder()
        settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
        return f"{self._config.kind}-{digest(settings, model.state_dict())}"

    def _autoencoder(self) -> Any:
        if self._model is None:
            from diffusers import AutoencoderKL, VQModel

            if not self._config.path:
                raise ConfigError(
                    "autoencoder.path", None, f"a {self._config.kind} autoencoder makes and decodes these latents",
                    "Name its folder or hub id.",
                )  # fmt: skip
            model: Any = AutoencoderKL if self._config.kind == "kl" else VQModel
            try:
                self._model = model.from_pretrained(self._config.path).to(self._device).eval()
            except (OSError, ValueError, RuntimeError) as e:
                reason = " ".join(str(e).split())[:300]
                raise ConfigError(
                    "autoencoder.path", self._config.path, f"holds no {model.__name__} that can be loaded ({reason})",
                    "Name a folder that diffusers' save_pretrained wrote, or a hub id.",
                )  from None  # fmt: skip
        return self._model
