"""A pipeline for models whose decoder changes with the timestep, with any of diffusers' discrete schedulers.

Needs torch and diffusers only: exported models bring a copy of this file.
"""

from __future__ import annotations

import bisect
import inspect
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class MultistagePipeline(DiffusionPipeline):
    """Samples images from noise.

    Args:
        unet: a MultistageUNet2DModel, or a stock U-Net.
        scheduler: any scheduler of discrete timesteps.
        vae: AutoencoderKL or VQModel that decodes latents; None where the model works on images.
        text_encoder: CLIPTextModel of transformers that embeds prompts; None where the model takes no text.
        tokenizer: its tokenizer.
        scale_factor: divides latents before they are decoded.
        pixel_shuffle: factor r by which the model's C r^2 channels become C channels at r times the height and width.
    """

    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012
    model_cpu_offload_seq = "text_encoder->unet->vae"  # type: ignore[assignment]

    unet: Any
    scheduler: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scale_factor: float = 1.0,
        pixel_shuffle: int = 1,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(scale_factor=scale_factor, pixel_shuffle=pixel_shuffle)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
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
            prompt: what to show, for models with text; one image for each, times `num_images_per_prompt`.
            negative_prompt: what guidance leads away from, one or one for each prompt; the empty prompt where None.
            batch_size: number of images; class_labels, or else the prompts, override it.
            num_inference_steps: steps of the scheduler.
            class_labels: a class for each image, [B], for models with classes.
            prompt_embeds: context tokens [B, S, D] instead of `prompt`.
            negative_prompt_embeds: context tokens instead of `negative_prompt`, [B, S, D] or [1, S, D].
            guidance_scale: s in output = unconditional + s (conditional - unconditional); 1 is no guidance.
            eta: for schedulers that take it: 0 is DDIM, 1 is DDPM.
            generator: source of the noise, one or one for each image.
            latents: the noise to start from [B, C, H, W]; drawn with `generator` where None.
            height: height of the images in pixels; the model's own where None.
            width: width of the images in pixels; the model's own where None.
            output_type: "pil", "np", "pt" (images in [0, 1]) or "latent" (the result before decoding).

        Raises:
            ValueError: an argument is missing, is not for this model, or has another shape than it needs.
        """
        device, config = self._execution_device, self.unet.config
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        guided = guidance_scale != 1
        labels = self._labels(class_labels, device)
        context, free_context = self._contexts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt, guided
        )
        counts = {"class_labels": labels, "prompts": context}
        sizes = {name: len(given) for name, given in counts.items() if given is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"there must be as many class_labels as images of the prompts, and there are {sizes}")
        batch_size = next(iter(sizes.values()), batch_size)
        x = self._noise(batch_size, height, width, latents, generator, device) * self.scheduler.init_noise_sigma
        # The last row of the table of classes is that of the dropped class.
        dropped = None if labels is None else torch.full_like(labels, config.num_class_embeds - 1)

        self._set_timesteps(num_inference_steps, device)
        # Schedulers differ in what `step` takes: only some have eta, or draw noise.
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in (("eta", eta), ("generator", generator)) if k in accepted}
        restarts = self._restarts()
        for t in self.progress_bar(self.scheduler.timesteps):
            if float(t) in restarts:
                self.scheduler.lower_order_nums = 0
            model_input = self.scheduler.scale_model_input(x, t)
            output = self._predict(model_input, t, context, labels)
            if guided:
                free = self._predict(model_input, t, free_context, dropped)
                output = free + guidance_scale * (output - free)
            x = self.scheduler.step(output, t, x, **extra).prev_sample

        images: Any = x if output_type == "latent" else self._decode(x)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _restarts(self) -> list[float]:
        """Timesteps of a multistep scheduler in another stage, from which a step is much longer than the one before.

        A step of order 2 adds the difference to the last output times half the ratio of the steps in log-SNR. Between
        outputs of two decoders that multiplies their disagreement, so such a step is of order 1.
        """
        boundaries = getattr(self.unet.config, "stage_boundaries", ())
        if not boundaries or not hasattr(self.scheduler, "lower_order_nums"):
            return []
        times, log_sigmas = self.scheduler.timesteps.tolist(), self.scheduler.sigmas.double().log()
        steps, stages = (-log_sigmas.diff()).tolist(), [bisect.bisect_right(boundaries, float(t)) for t in times]
        return [times[i] for i in range(1, len(times)) if stages[i] != stages[i - 1] and steps[i] > 1.25 * steps[i - 1]]

    def _labels(self, class_labels: Tensor | list[int] | None, device: torch.device) -> Tensor | None:
        """The classes [B], checked."""
        rows = getattr(self.unet.config, "num_class_embeds", None)
        if rows is None and class_labels is not None:
            raise ValueError("class_labels are given, and this model has no classes")
        if rows is None:
            return None
        if class_labels is None:
            raise ValueError(f"this model has {rows - 1} classes: give class_labels, a number for each image")
        labels = torch.as_tensor(class_labels, device=device)
        if labels.ndim != 1 or not ((labels >= 0) & (labels < rows)).all():
            raise ValueError(f"class_labels must be a list of numbers from 0 to {rows - 2} ({rows - 1}: no class)")
        return labels

    def _contexts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: Tensor | None,
        negative_embeds: Tensor | None,
        repeats: int,
        guided: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The context [B, S, D] of every image, and the one that guidance leads away from; None without text."""
        given = {"prompt": prompt, "negative_prompt": negative_prompt}
        given_embeds = {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
        named = [name for name, value in {**given, **given_embeds}.items() if value is not None]
        if not self._takes_text():
            if named:
                raise ValueError(f"{named[0]} is given, and this model takes no text")
            return None, None
        for name, value in given.items():
            if value is not None and given_embeds[f"{name}_embeds"] is not None:
                raise ValueError(f"{name} and {name}_embeds are both given: give one of them")
            if value is not None and (self.text_encoder is None or self.tokenizer is None):
                raise ValueError(
                    f"{name} needs a text encoder and its tokenizer, and this pipeline has none: give {name}_embeds, "
                    "or text_encoder and tokenizer to from_pretrained"
                )
        if prompt is None and embeds is None:
            raise ValueError("this model makes images from text: give prompt or prompt_embeds")
        context = self._embedded(prompt) if embeds is None else self._checked("prompt_embeds", embeds)
        context = context.repeat_interleave(repeats, dim=0)
        if not guided:
            return context, None
        if negative_embeds is not None:
            free = self._checked("negative_prompt_embeds", negative_embeds)
        elif self.text_encoder is not None and self.tokenizer is not None:
            free = self._embedded("" if negative_prompt is None else negative_prompt)
        else:
            raise ValueError("guidance needs negative_prompt_embeds, since this pipeline has no text encoder")
        if len(free) != 1:
            free = free.repeat_interleave(repeats, dim=0)
        if len(free) not in (1, len(context)) or free.shape[1] != context.shape[1]:
            raise ValueError(
                f"negative prompts of shape {list(free.shape)} do not fit prompts of shape {list(context.shape)}: give "
                "one for all or one for each, with as many tokens"
            )
        return context, free.expand(len(context), -1, -1)

    def _takes_text(self) -> bool:
        config = self.unet.config
        takes_context = getattr(config, "cross_attention_dim", None) is not None
        return takes_context and not getattr(config, "class_embeddings_as_context", False)

    def _embedded(self, prompt: Any) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompts must be text or a list of texts, not {prompt!r}")
        settings = self.text_encoder.config
        # A tokenizer that states no length has a huge one.
        length = min(self.tokenizer.model_max_length, settings.max_position_embeddings)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        masked, device = getattr(settings, "use_attention_mask", False), self._execution_device
        mask = tokens.attention_mask.to(device) if masked else None
        return self._checked("prompt", self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0])

    def _checked(self, name: str, embeds: Tensor) -> Tensor:
        """Context tokens in the network's type and place."""
        width = self.unet.config.cross_attention_dim
        if embeds.ndim != 3 or embeds.shape[2] != width:
            raise ValueError(f"{name} must be [images, tokens, {width}] for this model, not {list(embeds.shape)}")
        return embeds.to(self._execution_device, self.unet.dtype)

    def _noise(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        latents: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor:
        """What sampling starts from [B, C, H, W], of variance 1."""
        config: Any = self.unet.config
        factor = self._pixels_per_latent()
        size = self._size("height", height, 0, factor), self._size("width", width, 1, factor)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators are given for {batch_size} images")
        if latents is not None:
            # Without a height or width, latents may have any size that the network takes.
            wanted = [batch_size, config.in_channels, height and size[0], width and size[1]]
            fits = latents.ndim == 4 and all(w in (None, n) for w, n in zip(wanted, latents.shape, strict=True))
            if not fits:
                shown = ", ".join(str(w or name) for w, name in zip(wanted, ("", "", "height", "width"), strict=True))
                raise ValueError(f"latents must be [{shown}], not {list(latents.shape)}")
            return latents.to(device, self.unet.dtype)
        if size[0] is None or size[1] is None:
            raise ValueError("give `height` and `width`, or `latents`: the model names no sample_size")
        shape = (batch_size, config.in_channels, size[0], size[1])
        noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        return noise

    def _pixels_per_latent(self) -> int:
        """Pixels on the side of the square of the image that one position of the latents stands for."""
        shuffle: int = self.config.pixel_shuffle  # type: ignore[attr-defined]
        return shuffle if self.vae is None else shuffle * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _size(self, name: str, pixels: int | None, axis: int, factor: int) -> int | None:
        """Height or width of the latents."""
        config: Any = self.unet.config
        if pixels is None:
            own: int | list[int] | None = config.sample_size
            return own[axis] if isinstance(own, (list, tuple)) else own
        # Every level of the U-Net but the last halves its input.
        multiple = factor * 2 ** (len(config.block_out_channels) - 1)
        if pixels < 1 or pixels % multiple:
            raise ValueError(f"{name} is {pixels} pixels; it must be a multiple of {multiple} for this model")
        return pixels // factor

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
