"""What a model thinks of an image at steps of its sampling, with the stage whose decoder was asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from msdiff_dist.apps.report.pictures import Picture, picture_of
from msdiff_dist.apps.report.run_data import RunData
from msdiff_dist.apps.train.costs import cost_report
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.export.weights import CheckpointWeights, open_checkpoint

_SHOWN = 10  # estimates in a strip
_CHEAP_MACS, _CHEAP_PARAMS = 10e9, 20e6  # a second or two on one core


@dataclass(frozen=True)
class Strip:
    """Rows of pictures of the same network calls; for each call its stage and time."""

    step: int
    calls: list[tuple[int, str]]
    rows: list[list[Picture]]


def is_cheap(run: RunData) -> bool:
    """Whether a strip of one image takes a second or two: a small model of pixels, in a run that drew previews."""
    recipe = run.recipe
    if recipe is None or not recipe.preview.every or recipe.data.kind != "image" or recipe.model.context_channels:
        return False
    report = cost_report(recipe)
    guided = 1 + (recipe.preview.sampler.guidance_scale != 1)
    macs = report.gmacs(report.sampling_K) * 1e9 * report.evaluations * guided
    small = recipe.latent_shape == recipe.data.x_shape  # no autoencoder between
    return small and macs <= _CHEAP_MACS and report.costs.total_params <= _CHEAP_PARAMS


def denoising_strip(run: RunData, device: torch.device, rows: int) -> Strip:
    """Sample `rows` images of the newest checkpoint, and keep the estimates of x0 at some network calls.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupt.
        ConfigError: the sampler of the recipe's previews does not fit the process.
    """
    reader = open_checkpoint(run.folder)
    generator = ImageGenerator(CheckpointWeights(reader), device)
    job = preview_job(run, rows)
    seen: list[tuple[float, int, Tensor]] = []
    calls = generator.calls(job.sampler)
    kept = {round(i * (calls - 1) / (min(_SHOWN, calls) - 1)) if calls > 1 else 0 for i in range(min(_SHOWN, calls))}
    count = iter(range(calls))

    def keep(t: float, stage: int, estimate: Tensor) -> None:
        if next(count) in kept:
            seen.append((t, stage, generator.to_images(estimate.float())))

    job.draw(generator, range(rows), seen=keep)
    pictures = [
        [Picture(picture_of(as_image(images[i])), f"stage {stage}") for _, stage, images in seen] for i in range(rows)
    ]
    return Strip(reader.index.step, [(stage, f"{t:.4g}") for t, stage, _ in seen], pictures)


def preview_job(run: RunData, num: int) -> SamplingJob:
    """The images that the run's previews draw, `num` of them."""
    assert run.recipe
    preview = run.recipe.preview
    job = SamplingJob(
        num=num, seed=preview.seed, sampler=preview.sampler, prompts=preview.prompts, batch_size=preview.batch_size
    )
    return replace(job, sampler=job.sampler.for_process(run.recipe.process()))


def as_image(image_CHW: Tensor) -> Image.Image:
    """A uint8 image; small ones are enlarged without smoothing."""
    pixels = image_CHW.cpu()
    image = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
    scale = max(1, 64 // max(image.size))
    if max(image.size) > 128:
        image.thumbnail((128, 128), Image.Resampling.LANCZOS)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
