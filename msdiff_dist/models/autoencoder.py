"""Maps images to the latents x0 that are diffused, and back: pixels as they are, space-to-depth, KL or VQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from msdiff_dist.bounds import check_between
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.identity import digest
from msdiff_dist.pixels import centred, to_pixels


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder between images and the latents that are diffused (2112.10752)."""

    kind: Literal["pixel", "space_to_depth", "kl", "vq"] = "pixel"
    """`pixel` trains on images as they are; `space_to_depth` folds factor x factor pixels into channels, without loss;
    `kl` and `vq` are diffusers' AutoencoderKL and VQModel."""
    path: str | None = None
    """Weights of `kl` and `vq`: a local folder or a hub id."""
    factor: int = 1
    """Edge of the square of pixels that `space_to_depth` folds into one position."""
    scale_factor: float = 1.0
    """Factor on latents before diffusion, which brings them to about unit variance (`scale_factor` of LDM)."""

    def __post_init__(self) -> None:
        if self.kind == "pixel" and self.factor != 1:
            raise ConfigError("factor", self.factor, "pixel keeps the size of images", "Use factor 1 or another kind.")
        if self.factor < 1:
            raise ConfigError("factor", self.factor, "must be at least 1", "space_to_depth usually takes 2 or 4.")
        if not self.scale_factor > 0:
            raise ConfigError("scale_factor", self.scale_factor, "must be above 0", "Use 1, or the autoencoder's own.")
        check_between("scale_factor", self.scale_factor, 1e-6, 1e6)
        if self.path is not None and not self.path.strip():
            raise ConfigError("path", self.path, "is empty", "Name a folder or hub id, or write null.")

    def latent_shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """[C, H, W] of the latents of images [channels, size, size].

        Raises:
            ConfigError: the factor does not divide the size, or the kind is `kl` or `vq`, whose latents are computed
                before training and have their shape from there.
        """
        if size % self.factor:
            raise ConfigError("factor", self.factor, f"does not divide the image size {size}", "Choose a divisor.")
        if self.kind in ("kl", "vq"):
            raise ConfigError(
                "kind", self.kind, "latents of this kind are computed beforehand, not while training",
                "Use data.kind: latent with data.latent_shape; name the images in encode.data.",
            )  # fmt: skip
        return channels * self.factor**2, size // self.factor, size // self.factor


class LatentCodec:
    """Converts stored samples to latents x0, x0 to images, and images to the latents that shards store.

    The autoencoder of kinds `kl` and `vq` is loaded when it is first needed: training on stored latents never does.

    Args:
        stored_latents: the samples given to `to_latents` are latents, not images.
        device: where the autoencoder runs.
    """

    def __init__(self, config: AutoencoderConfig, stored_latents: bool, device: torch.device) -> None:
        self._config, self._stored_latents, self._device = config, stored_latents, device
        self._model: Any = None

    def to_latents(self, x_BCHW: Tensor) -> Tensor:
        """float32 x0 [B, C, H, W], times `scale_factor`, from uint8 images or stored latents."""
        if self._stored_latents:
            return x_BCHW.float() * self._config.scale_factor
        images = centred(x_BCHW.float())
        if self._config.kind == "space_to_depth":
            images = F.pixel_unshuffle(images, self._config.factor)
        return images * self._config.scale_factor

    @torch.no_grad()
    def to_images(self, x0_BCHW: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] on the CPU, from x0."""
        if self._config.kind in ("kl", "vq"):
            return to_pixels(self._autoencoder().decode(self._unscaled(x0_BCHW).to(self._device)).sample).cpu()
        return self.pixels(x0_BCHW).cpu()

    @torch.no_grad()
    def pixels(self, x0_BCHW: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] on the device of x0, for autoencoders that are no network."""
        assert self._config.kind not in ("kl", "vq")
        x = self._unscaled(x0_BCHW)
        return to_pixels(F.pixel_shuffle(x, self._config.factor) if self._config.kind == "space_to_depth" else x)

    def _unscaled(self, x0_BCHW: Tensor) -> Tensor:
        return x0_BCHW / self._config.scale_factor

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """float32 latents [B, c, h, w] on the CPU, without the scale factor, from uint8 images.

        Kind `kl` gives the posterior's mean and log variance, [B, 2c, h, w]; kind `vq` the latents before quantisation.

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
        """A string that differs for autoencoders whose latents differ: kind, settings and a digest of the weights."""
        if self._config.kind == "pixel":
            return "pixel"
        if self._config.kind == "space_to_depth":
            return f"space_to_depth-{self._config.factor}"
        model = self._autoencoder()
        # diffusers' own entries (`_name_or_path`, `_diffusers_version`) do not change latents.
        settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
        return f"{self._config.kind}-{digest(settings, model.state_dict())}"

    def _autoencoder(self) -> Any:
        if self._model is None:
            from diffusers import AutoencoderKL, VQModel

            if not self._config.path:
                raise ConfigError(
                    "autoencoder.path", None, f"latents of kind {self._config.kind} need an autoencoder's weights",
                    "Name its folder or hub id.",
                )  # fmt: skip
            model: Any = AutoencoderKL if self._config.kind == "kl" else VQModel
            # Files of half precision are computed with in fp32, too. diffusers' faster loading needs another package.
            how = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
            try:
                self._model = model.from_pretrained(self._config.path, **how).to(self._device).eval()
            except (OSError, ValueError, RuntimeError) as e:
                reason = " ".join(str(e).split())[:300]  # diffusers' messages run over many lines
                raise ConfigError(
                    "autoencoder.path", self._config.path, f"holds no {model.__name__} that can be loaded ({reason})",
                    "Name a folder that diffusers' save_pretrained wrote, or a hub id.",
                )  from None  # fmt: skip
        return self._model
