"""Images from the weights of a checkpoint or an export, in one process.

The shared encoder is loaded at once, each decoder when sampling first reaches its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from msdiff_dist.diffusion.sampling import Condition, sample, sampler_times
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.distributed.precision import bf16_support
from msdiff_dist.errors import CheckpointError
from msdiff_dist.evaluation.prompts import Prompter
from msdiff_dist.export.weights import Weights
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.multistage_unet import build_parts


class ImageGenerator:
    """Generates images with one set of weights."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        description = weights.description
        self._weights, self.device, self._model = weights, device, description.model
        self._codec = LatentCodec(description.autoencoder, False, device)
        self._process, self._partition = description.process(), description.partition()
        self._latent_shape = description.latent_shape
        # On CPUs in fp32 always, so that the images of an export are the same on all of them, up to rounding of fp32.
        bf16 = description.precision == "bf16" and device.type == "cuda" and bf16_support(device).native
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self._shared = self._load(build_parts(self._model, [])[0], "shared.")
        self._stages: dict[int, nn.Module] = {}
        self._prompter = Prompter(description, device)

    def __call__(
        self,
        index_n: Sequence[int],
        sampler: SamplerConfig,
        seed: int,
        label_n: Tensor | None = None,
        prompts: Sequence[str] = (),
        called: Callable[[], object] = lambda: None,
        seen: Callable[[float, int, Tensor], object] | None = None,
    ) -> Tensor:
        """The uint8 images [n, C, H, W] with the numbers `index_n`.

        An image depends only on weights, sampler, seed, label, prompt and its number, up to rounding.

        Args:
            label_n: int64 class of each image, for a model with classes.
            prompts: image i has prompt i modulo their number; if there are none, the caption is empty.
            called: called after each of the `calls` of the network.
            seen: called with time, stage and estimate of x0 after each of them: latents of a latent model, which
                `to_images` decodes.

        Raises:
            ConfigError: there are prompts, but the model takes none.
            CheckpointError: the images are not finite.
        """
        # The class after the last stands for a dropped label.
        null = None if label_n is None else torch.full_like(label_n, self._model.num_classes or 0)
        context, null_context = self._prompter(index_n, prompts)
        unconditional = Condition(None if null is None else null.to(self.device), null_context)

        def network(*inputs: Any) -> Tensor:
            output = self.network(*inputs)
            called()
            return output

        x0 = sample(
            network,
            self._process,
            self._partition,
            sampler,
            seed=seed,
            index_n=index_n,
            shape=self._latent_shape,
            device=self.device,
            condition=Condition(None if label_n is None else label_n.to(self.device), context),
            unconditional=None if null is None and null_context is None else unconditional,
            seen=seen,
        )
        if not torch.isfinite(x0).all():
            raise CheckpointError(
                "RUN", self._weights.description.name, "makes images that are not numbers (NaN or infinity)",
                "Sample an earlier checkpoint: the training diverged.",
            )  # fmt: skip
        return self._codec.to_images(x0)

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return self._partition.num_stages

    def to_images(self, x0: Tensor) -> Tensor:
        """The uint8 images [n, C, H, W] of samples, or latents, [n, C, H, W]."""
        return self._codec.to_images(x0)

    def calls(self, sampler: SamplerConfig) -> int:
        """How often the network is called for a batch of images."""
        return len(sampler_times(self._process, self._partition, sampler))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise what a call would raise for these prompts, before anything is sampled."""
        self._prompter([0], prompts)

    @property
    def num_classes(self) -> int | None:
        """Number of the model's classes; None if it takes no labels."""
        return self._model.num_classes

    @property
    def loaded_stages(self) -> list[int]:
        """Stages whose decoders have been loaded so far."""
        return sorted(self._stages)

    def network(self, x_in: Tensor, t_in: Tensor, stage: int, label: Tensor | None, context: Tensor | None) -> Tensor:
        """The network's output in one stage: the `ModelFn` that `sample` calls."""
        if stage not in self._stages:
            self._stages[stage] = self._load(build_parts(self._model, [stage])[1][stage], f"stages.{stage}.")
        context = None if context is None else context.to(self._dtype)
        features = self._shared(x_in.to(self._dtype), t_in, context, label)
        out: Tensor = self._stages[stage](*features)
        return out

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        # `prefix` selects the part's tensors among those of the whole model.
        module.load_state_dict(self._weights.module_state(prefix))
        return module.to(self.device, self._dtype).eval()


class SplicedGenerator(ImageGenerator):
    """Uses the network of `inside` at times in [lo, hi) and that of `outside` at all others (2312.09181, Figure 2).

    Both must have the same process, latent shape and conditions. Their stages may differ.
    """

    def __init__(self, inside: ImageGenerator, outside: ImageGenerator, lo: float, hi: float) -> None:
        # All but the network is the same in both, so take it from `inside`. Time is divided at the boundaries of both
        # and at lo and hi, so that each interval lies in one stage of the generator that owns it.
        vars(self).update(vars(inside))
        a, b = inside._partition, outside._partition
        inner = {x for x in (*a.boundaries, *b.boundaries, lo, hi) if a.lo < x < a.hi}
        self._partition = replace(a, boundaries=tuple(sorted(inner)))
        self._owners: list[tuple[ImageGenerator, int]] = []
        for k in range(self._partition.num_stages):
            start, _ = self._partition.interval(k)
            owner = inside if lo <= start < hi else outside
            self._owners.append((owner, int(owner._partition.stage_of(np.array(start)))))

    def network(self, x_in: Tensor, t_in: Tensor, stage: int, label: Tensor | None, context: Tensor | None) -> Tensor:
        owner, own_stage = self._owners[stage]
        return owner.network(x_in, t_in, own_stage, label, context)
