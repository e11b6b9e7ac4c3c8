"""Settings of sampled folders, compared with those that versions before `last` stored."""

from __future__ import annotations

from typing import Any

import pytest

from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models.song.config import SongConfig
from tests.unit.convert.conftest import make_export

__all__ = ["make_export"]

MODEL = SongConfig(
    encoder_channels=16, channel_mult=(1, 2), num_res_blocks=2, attention_downsamples=(2,), norm_groups=16,
    family="ddpmpp", decoder_channels=(24, 16, 8),
)  # fmt: skip
BOUNDARIES = {"discrete": (442, 631), "vp": (0.442, 0.6308), "edm": (2.5103, 7.6577)}


@pytest.mark.parametrize(
    ("process", "sampler", "same_images"),
    [
        ("discrete", SamplerConfig(name="ddim", steps=4), False),
        ("discrete", SamplerConfig(name="ddim", steps=4, last="clean"), True),
        ("discrete", SamplerConfig(name="dpmpp_2m", steps=4, last="clean"), True),
        ("discrete", SamplerConfig(name="ddpm", steps=4), True),
        ("vp", SamplerConfig(name="ddim", steps=4), True),
        ("vp", SamplerConfig(name="ddim", steps=4, last="clean"), False),
        ("vp", SamplerConfig(name="dpmpp_2m", steps=12), False),
        ("vp", SamplerConfig(name="dpm_3s", steps=4), True),
        ("edm", SamplerConfig(name="heun", steps=4), True),
    ],
)
def test_a_folder_of_an_earlier_version_goes_on_where_the_images_are_the_same(
    make_export: Any, process: str, sampler: SamplerConfig, same_images: bool
) -> None:
    stages = StagesConfig(boundaries=BOUNDARIES[process])
    export = make_export(MODEL, diffusion=DiffusionConfig(process=process), stages=stages)
    stored = SamplingJob(num=2, sampler=sampler).settings(open_weights(export, ema=False))["sampler"]
    assert ("last" not in stored) == same_images
