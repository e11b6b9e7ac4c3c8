"""Sampling with a known network: batches, stages, guidance, and the same images as diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.sampling import (
    Condition,
    SamplerConfig,
    image_generators,
    sample,
    sampler_times,
)
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import ConfigError

PROCESS = build_process(DiffusionConfig())
PARTITION = build_partition(StagesConfig(boundaries=(442, 631)), PROCESS)
SHAPE = (2, 4, 4)
SAMPLERS = [
    SamplerConfig(name="ddim"),
    SamplerConfig(name="ddim", eta=1.0, clip=True),
    SamplerConfig(name="dpmpp_2m"),
    SamplerConfig(name="ddpm"),
]


def network(x, t, stage, label, context):
    """Some smooth function of every input."""
    out = torch.sin(x + 0.001 * t.view(-1, 1, 1, 1)) + 0.1 * stage
    if label is not None:
        out = out + 0.1 * label.view(-1, 1, 1, 1)
    return out if context is None else out * context.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("config", SAMPLERS)
def test_images_do_not_depend_on_the_split_into_batches(config: SamplerConfig) -> None:
    whole = sample(network, PROCESS, PARTITION, config, seed=3, index_n=range(6), shape=SHAPE)
    parts = [sample(network, PROCESS, PARTITION, config, seed=3, index_n=i, shape=SHAPE) for i in ([4, 5], [0])]
    torch.testing.assert_close(torch.cat(parts), whole[[4, 5, 0]])
    assert not torch.equal(whole, sample(network, PROCESS, PARTITION, config, seed=4, index_n=range(6), shape=SHAPE))


@pytest.mark.parametrize("config", SAMPLERS)
def test_each_call_gets_the_stage_of_its_time(config: SamplerConfig) -> None:
    calls = []

    def spy(x, t, stage, label, context):
        assert x.shape == (3, *SHAPE)
        calls.append((t.unique().item(), stage))
        return torch.zeros_like(x)

    seen: list[tuple[float, int]] = []

    def see(t: float, stage: int, x0: torch.Tensor) -> None:
        seen.append((t, stage))
        assert x0.shape == (3, *SHAPE)

    sample(spy, PROCESS, PARTITION, config, seed=0, index_n=[0, 1, 2], shape=SHAPE, seen=see)
    assert seen == calls == sampler_times(PROCESS, PARTITION, config)
    assert [stage for _, stage in calls] == PARTITION.stage_of(np.array([t for t, _ in calls])).tolist()
    assert {stage for _, stage in calls} == {0, 1, 2}


@pytest.mark.parametrize(
    ("config", "reference", "options"),
    [
        (SamplerConfig(name="ddim", last="clean"), diffusers.DDIMScheduler, {"set_alpha_to_one": True}),
        (SamplerConfig(name="ddim"), diffusers.DDIMScheduler, {"set_alpha_to_one": False}),
        (SamplerConfig(name="ddim", eta=1.0), diffusers.DDIMScheduler, {"set_alpha_to_one": False}),
        (
            SamplerConfig(name="ddim", eta=1.0, clip=True, last="clean", spacing="trailing"),
            diffusers.DDIMScheduler,
            {},
        ),
        (SamplerConfig(name="ddim", steps=1000), diffusers.DDIMScheduler, {"steps_offset": 0}),
        (
            SamplerConfig(name="dpmpp_2m", steps=20, spacing="trailing", last="clean", restart=False),
            diffusers.DPMSolverMultistepScheduler,
            {},
        ),
        *(
            (
                SamplerConfig(name="dpmpp_2m", steps=steps, spacing="trailing", restart=False),
                diffusers.DPMSolverMultistepScheduler,
                {"final_sigmas_type": "sigma_min"},
            )
            for steps in (8, 20)
        ),
        (SamplerConfig(name="ddpm", spacing="trailing"), diffusers.DDPMScheduler, {}),
    ],
)
def test_same_images_as_diffusers_on_the_full_schedule(config: SamplerConfig, reference: type, options: dict) -> None:
    if config.name != "dpmpp_2m":
        options = {"clip_sample": config.clip} | options
    options = {"steps_offset": int(config.spacing is None)} | options  # LDM's, for spacing "leading"
    spacing = config.spacing or "leading"
    scheduler = reference(1000, 0.0015, 0.0195, "scaled_linear", timestep_spacing=spacing, **options)
    scheduler.set_timesteps(config.steps)
    generators, noise = image_generators(0, [0, 1]), {"eta": config.eta} if config.eta else {}
    x = torch.stack([torch.randn(SHAPE, generator=g) for g in generators])
    for t in scheduler.timesteps:
        stage = int(PARTITION.stage_of(np.array(int(t))))
        output = network(x, torch.full((2,), float(t)), stage, None, None)
        x = scheduler.step(output, t, x, generator=generators, **noise).prev_sample
    ours = sample(network, PROCESS, PARTITION, config, seed=0, index_n=[0, 1], shape=SHAPE)
    torch.testing.assert_close(ours, x, atol=2e-4, rtol=2e-4)


def test_guidance_extrapolates_from_the_unconditional_output() -> None:
    """The network's output is its label, so guidance acts like the label u + g (c - u)."""

    def constant(x, t, stage, label, context):
        return label.view(-1, 1, 1, 1).expand_as(x).float()

    arguments = {"seed": 0, "index_n": [0, 1], "shape": SHAPE}
    null = Condition(torch.tensor([10, 10]))
    config = SamplerConfig(name="ddim", steps=5, guidance_scale=3.0)
    guided = sample(
        constant, PROCESS, PARTITION, config, condition=Condition(torch.tensor([1, 2])), unconditional=null, **arguments
    )
    plain = sample(
        constant,
        PROCESS,
        PARTITION,
        SamplerConfig(name="ddim", steps=5),
        condition=Condition(torch.tensor([-17, -14])),
        **arguments,
    )
    torch.testing.assert_close(guided, plain)
    with pytest.raises(ConfigError, match="guidance_scale"):
        sample(constant, PROCESS, PARTITION, config, condition=null, **arguments)
