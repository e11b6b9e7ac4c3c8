"""A pipeline for models whose decoder changes with the timestep, with any of diffusers' discrete schedulers.

Needs torch and diffusers only: exported models bring a copy of this file.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class MultistagePipeline(DiffusionPipeline):
    """Samples images from noise.

    Args:
        unet: a MultistageUNet2DModel, or a stock U-Net.
        scheduler: any scheduler of discrete timesteps.
        vae: AutoencoderKL or VQModel that decodes latents; None where the model works on images.
        scale_factor: divides latents before they are decoded.
        pixel_shuffle: factor r by which the model's C r^2 channels become C channels at r times the height and width.
    """

    _optional_components = ["vae"]  # noqa: RUF012
    model_cpu_offload_seq = "unet->vae"  # type: ignore[assignment]

    unet: Any
    scheduler: Any
    vae: Any

    def __init__(
        self, unet: Any, scheduler: Any, vae: Any = None, scale_factor: float = 1.0, pixel_shuffle: int = 1
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(scale_factor=scale_factor, pixel_shuffle=pixel_shuffle)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        class_labels: Tensor | list[int] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: number of images; class_labels, or else prompt_embeds, overrides it.
            num_inference_steps: steps of the scheduler.
            class_labels: a class for each image, [B], for models with classes.
            prompt_embeds: context tokens [B, S, D], for models with context.
            negative_prompt_embeds: context tokens of the empty prompt [B, S, D], for guidance.
            guidance_scale: s in output = unconditional + s (conditional - unconditional); 1 is no guidance.
            eta: for schedulers that take it: 0 is DDIM, 1 is DDPM.
            generator: source of the noise.
            latents: the noise to start from [B, C, H, W]; drawn with `generator` where None.
            height: height of the latents; the model's own where None.
            width: width of the latents; the model's own where None.
            output_type: "pil", "np", "pt" (images in [0, 1]) or "latent" (the result before decoding).

        Raises:
            ValueError: the model has no size of its own, and neither a size nor latents are given.
        """
        device = self._execution_device
        config = self.unet.config
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=device)
            batch_size = class_labels.shape[0]
        if prompt_embeds is not None:
            prompt_embeds = prompt_embeds.to(device, self.unet.dtype)
            batch_size = prompt_embeds.shape[0]
        if latents is None:
            size = height or config.sample_size, width or config.sample_size
            if None in size:
                raise ValueError("give `height` and `width`, or `latents`: the model names no sample_size")
            shape = (batch_size, config.in_channels, *size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        x = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma

        self._set_timesteps(num_inference_steps, device)
        # Schedulers differ in what `step` takes: only some have eta, or draw noise.
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in (("eta", eta), ("generator", generator)) if k in accepted}
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(x, t)
            output = self._predict(model_input, t, prompt_embeds, class_labels)
            if guidance_scale != 1:
                # The last row of the table of classes is that of the dropped class.
                dropped = None if class_labels is None else torch.full_like(class_labels, config.num_class_embeds - 1)
                free = self._predict(model_input, t, negative_prompt_embeds, dropped)
                output = free + guidance_scale * (output - free)
            x = self.scheduler.step(output, t, x, **extra).prev_sample

        images: Any = x if output_type == "latent" else self._decode(x)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        # Schedulers that accept a list of timesteps get those of DDIM; the others space them as they are configured.
        if "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            total = self.scheduler.config.num_train_timesteps
            times = [i * total // steps + (total >= 2 * steps) for i in range(steps)]
            self.scheduler.set_timesteps(timesteps=times[::-1], device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _predict(self, x: Tensor, t: Tensor, context: Tensor | None, classes: Tensor | None) -> Tensor:
        # Only those that are given: UNet2DModel does not accept encoder_hidden_states.
        conditions = {"encoder_hidden_states": context, "class_labels": classes}
        given = {name: value for name, value in conditions.items() if value is not None}
        out: Tensor = self.unet(x, t, **given, return_dict=False)[0]
        return out

    def _decode(self, x: Tensor) -> Tensor:
        config: Any = self.config
        x = torch.nn.functional.pixel_shuffle(x / config.scale_factor, config.pixel_shuffle)
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        return (x / 2 + 0.5).clamp(0, 1)
