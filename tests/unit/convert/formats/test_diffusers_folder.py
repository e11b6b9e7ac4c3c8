"""Pipelines in diffusers compute and sample as this package does, and come back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.formats.diffusers_folder import read_diffusers
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.diffusion.processes.vp import VPConfig
from msdiff_dist.diffusion.sampling import Condition, image_generators, sample
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models import MultistageUNet, build_model
from msdiff_dist.models.autoencoder import AutoencoderConfig, LatentCodec
from msdiff_dist.models.ldm.config import LDMConfig
from tests.unit.convert.convert_helpers import export_tensors, files_below, inputs, randomise, same_tensors

BASE: dict[str, Any] = {
    "encoder_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_downsamples": (2,),
    "num_head_channels": 32,
}  # fmt: skip
STAGED = LDMConfig(**BASE, decoder_channels=(64, 32, 32), decoder_attention=((2,), (), (1, 2)))
MODELS = {
    "stages": STAGED,
    "classes": LDMConfig(**BASE, decoder_channels=(32, 64), num_classes=3, use_scale_shift_norm=True),
    "resampling blocks": LDMConfig(**BASE, decoder_channels=(64,), resblock_updown=True),
    "text": LDMConfig(**BASE, decoder_channels=(32, 32), context_dim=8),
    "classes as context": LDMConfig(
        **BASE, decoder_channels=(32,), context_dim=8, num_classes=3, class_conditioning="context"
    ),
    "8 heads": LDMConfig(
        **{**BASE, "num_head_channels": None, "num_heads": 8, "attention_downsamples": (1, 2)}, decoder_channels=(32,)
    ),
    "first level twice as wide": LDMConfig(**{**BASE, "channel_mult": (2, 2)}, decoder_channels=(32,)),
}


def pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_models_that_bring_their_own_class(tmp_path: Path, make_export: Any, config: LDMConfig) -> None:
    export = make_export(config)
    report = convert(export, tmp_path / "theirs", "msdiff", "diffusers")
    assert "no stock diffusers class" in report["remarks"][0]
    unet = pipeline(tmp_path / "theirs").unet
    assert type(unet).__name__ == "MultistageUNet2DModel"
    x, t, conditions = inputs(config, batch=6)
    bounds = json.loads((export / "config.json").read_text())["stages"]["boundaries"]
    stage = torch.bucketize(t.double(), torch.tensor(bounds, dtype=torch.float64), right=True)
    assert len(stage.unique()) == config.num_stages
    expected = randomise(build_model(config))(x, t, stage, **conditions)
    names = {"label": "class_labels", "context": "encoder_hidden_states"}
    output = unet(x, t, **{names[k]: v for k, v in conditions.items()}).sample
    assert torch.allclose(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [*MODELS.values(), LDMConfig(**BASE, decoder_channels=(32,))])
def test_there_and_back_is_bitwise(tmp_path: Path, make_export: Any, config: LDMConfig) -> None:
    export = make_export(config, dtype=torch.float16)
    convert(export, tmp_path / "theirs", "msdiff", "diffusers")
    convert(tmp_path / "theirs", tmp_path / "back", "diffusers", "msdiff")
    assert same_tensors(export_tensors(export), export_tensors(tmp_path / "back"))
    mine, back = (json.loads((f / "config.json").read_text()) for f in (export, tmp_path / "back"))
    assert mine == back


def sampled(
    model: MultistageUNet,
    sampler: SamplerConfig,
    label: torch.Tensor | None,
    n: int,
    boundaries: tuple[float, ...] = (442.0, 631.0),
) -> torch.Tensor:
    process = build_process(DiffusionConfig(process="discrete", section=DiscreteConfig()))
    return sample(
        lambda x, t, stage, label, context: model.stages[stage](*model.shared(x, t, context, label)),
        process,
        build_partition(StagesConfig(boundaries=boundaries), process),
        sampler,
        seed=0,
        index_n=range(n),
        shape=(3, 8, 8),
        condition=Condition(label_n=label),
        unconditional=None if label is None else Condition(label_n=torch.full_like(label, 2)),
    )


def starting_noise(n: int) -> torch.Tensor:
    return torch.stack([torch.randn(3, 8, 8, generator=g) for g in image_generators(0, range(n))])


@torch.no_grad()
@pytest.mark.parametrize(("name", "steps", "scale"), [("ddim", 10, 1.0), ("ddim", 4, 2.0), ("dpmpp_2m", 7, 1.0)])
def test_the_pipeline_samples_as_we_do(tmp_path: Path, make_export: Any, name: Any, steps: int, scale: float) -> None:
    from diffusers import DPMSolverMultistepScheduler

    config = LDMConfig(**BASE, decoder_channels=(64, 32, 32), num_classes=2)
    convert(make_export(config), tmp_path / "theirs", "msdiff", "diffusers")
    model, label = randomise(build_model(config)), torch.tensor([0, 1])
    assert isinstance(model, MultistageUNet)
    latents = sampled(model, SamplerConfig(name=name, steps=steps, guidance_scale=scale), label, 2)
    expected = LatentCodec(AutoencoderConfig(), False, torch.device("cpu")).to_images(latents)

    pipe = pipeline(tmp_path / "theirs")
    if name == "dpmpp_2m":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
    call = {"num_inference_steps": steps, "class_labels": label, "guidance_scale": scale, "latents": starting_noise(2)}
    found = pipe(**call, output_type="latent").images
    assert (found - latents).abs().max() <= 1e-5 * latents.abs().max()
    images = pipe(**call, output_type="pt").images
    assert (images - expected / 255).abs().max() <= 0.5 / 255 + 1e-4  # ours are rounded to whole levels


@torch.no_grad()
def test_the_pipeline_begins_anew_near_the_data_as_we_do(tmp_path: Path, make_export: Any) -> None:
    """A boundary at 100, where twelve steps even in t grow longer in log-SNR."""
    from diffusers import DPMSolverMultistepScheduler

    config, stages = LDMConfig(**BASE, decoder_channels=(64, 32, 32)), StagesConfig(boundaries=(100.0, 442.0))
    convert(make_export(config, stages=stages), tmp_path / "theirs", "msdiff", "diffusers")
    model = randomise(build_model(config))
    assert isinstance(model, MultistageUNet)
    latents, continued = (
        sampled(model, SamplerConfig(name="dpmpp_2m", steps=12, restart=restart), None, 2, stages.boundaries)
        for restart in (True, False)
    )
    pipe = pipeline(tmp_path / "theirs")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
    found = pipe(batch_size=2, num_inference_steps=12, latents=starting_noise(2), output_type="latent").images
    assert (found - latents).abs().max() <= 1e-5 * latents.abs().max()
    assert (found - continued).abs().max() > 1e-3 * latents.abs().max()


def test_the_stock_pipeline_of_a_unified_model(tmp_path: Path, make_export: Any) -> None:
    from diffusers import DDIMPipeline

    convert(make_export(LDMConfig(**BASE, decoder_channels=(32,))), tmp_path / "theirs", "msdiff", "diffusers")
    assert files_below(tmp_path / "theirs").count("multistage_pipeline.py") == 0
    pipe = DDIMPipeline.from_pretrained(tmp_path / "theirs")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


def test_stages_one_by_one_are_stock_networks(tmp_path: Path, make_export: Any) -> None:
    from diffusers import UNet2DModel

    export = make_export(LDMConfig(**BASE, decoder_channels=(64, 32, 32)))
    convert(export, tmp_path / "one", "msdiff", "diffusers", ConvertOptions(stage=2))
    unet = UNet2DModel.from_pretrained(tmp_path / "one", subfolder="unet")
    ours = export_tensors(export)
    assert torch.equal(unet.conv_out.weight, ours["stages.2.out.2.weight"])
    report = json.loads((tmp_path / "one" / "conversion_report.json").read_text())
    assert report["keys"]["stages.0.out.2.weight"] == {"left_out": "of another stage than 2"}
    assert report["keys"]["stages.2.out.2.weight"] == {"to": ["unet/conv_out.weight"]}


def test_latents_are_decoded_by_the_pipeline(tmp_path: Path, make_export: Any) -> None:
    from diffusers import VQModel

    vae = randomise(VQModel(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=8))  # fmt: skip
    export = make_export(STAGED, autoencoder=AutoencoderConfig(kind="vq", path="autoencoder", scale_factor=0.5))
    vae.save_pretrained(export / "autoencoder")
    convert(export, tmp_path / "theirs", "msdiff", "diffusers")
    pipe = pipeline(tmp_path / "theirs")
    x = randomise(torch.nn.Conv2d(3, 1, 8)).weight * 10
    expected = (vae.decode(x / 0.5).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pipe._decode(x), expected)
    assert pipe(num_inference_steps=1).images[0].size == (16, 16)
    convert(tmp_path / "theirs", tmp_path / "back", "diffusers", "msdiff")
    mine, back = (json.loads((f / "config.json").read_text()) for f in (export, tmp_path / "back"))
    assert mine["autoencoder"] == back["autoencoder"]
    codec = open_weights(tmp_path / "back").description.autoencoder
    assert codec.path == str(tmp_path / "back" / "autoencoder")
    found = LatentCodec(codec, False, torch.device("cpu")).to_images(x)
    assert (found / 255 - expected).abs().max() <= 0.5 / 255 + 1e-4


def test_space_to_depth_is_undone_by_the_pipeline(tmp_path: Path, make_export: Any) -> None:
    config = LDMConfig(**BASE, decoder_channels=(64,), in_channels=12, out_channels=12)
    codec = AutoencoderConfig(kind="space_to_depth", factor=2)
    convert(make_export(config, autoencoder=codec), tmp_path / "theirs", "msdiff", "diffusers")
    assert pipeline(tmp_path / "theirs")(num_inference_steps=1).images[0].size == (16, 16)


def test_schedules_go_through(tmp_path: Path, make_export: Any) -> None:
    discrete = DiscreteConfig(timesteps=500, schedule="cosine", prediction_type="v_prediction")
    export = make_export(
        STAGED,
        diffusion=DiffusionConfig(process="discrete", section=discrete),
        stages=StagesConfig(boundaries=(100.0, 200.0)),
    )
    convert(export, tmp_path / "theirs", "msdiff", "diffusers")
    scheduler = pipeline(tmp_path / "theirs").scheduler
    ours = build_process(DiffusionConfig(process="discrete", section=discrete)).alphas_cumprod  # type: ignore[attr-defined]
    assert torch.allclose(scheduler.alphas_cumprod.double(), torch.from_numpy(ours), atol=1e-6)
    found = read_diffusers(tmp_path / "theirs", ConvertOptions())
    assert found.description.diffusion.section == discrete
    assert found.description.stages.boundaries == (100.0, 200.0)


def test_boundaries_that_do_not_fit_the_stages(tmp_path: Path, make_export: Any) -> None:
    convert(make_export(STAGED), tmp_path / "three", "msdiff", "diffusers")
    convert(make_export(LDMConfig(**BASE, decoder_channels=(32,)), "b"), tmp_path / "one", "msdiff", "diffusers")
    found = read_diffusers(tmp_path / "three", ConvertOptions(boundaries=(400.0, 600.0)))
    assert found.description.stages.boundaries == (400.0, 600.0)
    for folder, named in (("three", "has 3 stages"), ("one", "has one stage")):
        with pytest.raises(CheckpointError, match=rf"--boundaries.*{named}"):
            read_diffusers(tmp_path / folder, ConvertOptions(boundaries=(500.0,)))


def test_continuous_processes_are_refused(tmp_path: Path, make_export: Any) -> None:
    diffusion = DiffusionConfig(process="vp", section=VPConfig())
    export = make_export(STAGED, diffusion=diffusion, stages=StagesConfig(boundaries=(0.4, 0.6)))
    with pytest.raises(CheckpointError, match=r"diffusion\.process"):
        convert(export, tmp_path / "theirs", "msdiff", "diffusers")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
    ],
)
def test_schedulers_that_we_lack(tmp_path: Path, make_export: Any, change: dict[str, Any], named: str) -> None:
    convert(make_export(STAGED), tmp_path / "theirs", "msdiff", "diffusers")
    path = tmp_path / "theirs" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=named):
        read_diffusers(tmp_path / "theirs", ConvertOptions())


def test_other_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    torch.save({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="FluxTransformer2DModel"):
        read_diffusers(tmp_path, ConvertOptions())


def stock() -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


WAYS_TO_SAVE: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "torch": {"safe_serialization": False},
    "fp16 safetensors": {"variant": "fp16"},
    "fp16 torch": {"variant": "fp16", "safe_serialization": False},
    "shards": {"max_shard_size": "200KB"},
    "shards, torch": {"max_shard_size": "200KB", "safe_serialization": False},
    "shards, fp16": {"max_shard_size": "200KB", "variant": "fp16"},
}


@pytest.mark.parametrize("way", WAYS_TO_SAVE)
def test_every_way_in_which_diffusers_saves_weights(way: str, tmp_path: Path) -> None:
    unet = stock()
    unet.save_pretrained(tmp_path / "unet", **WAYS_TO_SAVE[way])
    found = read_diffusers(tmp_path / "unet", ConvertOptions())
    assert sum(found.tensors.meta(n).numel() for n in found.tensors.names()) == sum(
        p.numel() for p in unet.parameters()
    )
    convert(tmp_path / "unet", tmp_path / "ours", "diffusers", "msdiff", ConvertOptions())
    convert(tmp_path / "ours", tmp_path / "theirs", "msdiff", "diffusers", ConvertOptions())
    again = type(unet).from_pretrained(tmp_path / "theirs/unet")
    assert all(torch.equal(again.state_dict()[n], p) for n, p in unet.state_dict().items())


def test_averaged_weights_of_a_training_script_are_taken_where_there_are_any(tmp_path: Path) -> None:
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    unet = stock()
    ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
    first = {n: p.detach().clone() for n, p in unet.state_dict().items()}
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(1)
    ema.save_pretrained(tmp_path / "checkpoint-500/unet_ema")
    unet.save_pretrained(tmp_path / "checkpoint-500/unet")
    for weights, expected in (("auto", first), ("ema", first), ("raw", unet.state_dict())):
        out = tmp_path / weights
        convert(tmp_path / "checkpoint-500", out, "diffusers", "msdiff", ConvertOptions(weights=weights))
        convert(out, out / "theirs", "msdiff", "diffusers", ConvertOptions())
        found = UNet2DModel.from_pretrained(out / "theirs/unet").state_dict()
        assert all(torch.equal(found[n], value) for n, value in expected.items())
    convert(tmp_path / "checkpoint-500/unet_ema", tmp_path / "alone", "diffusers", "msdiff", ConvertOptions())
    assert same_tensors(export_tensors(tmp_path / "alone"), export_tensors(tmp_path / "auto"))


def test_weights_without_average_are_told_from_those_with(tmp_path: Path) -> None:
    unet = stock()
    unet.save_pretrained(tmp_path / "unet")
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(1)
    unet.save_pretrained(tmp_path / "unet", variant="non_ema")
    first = {}
    for weights in ("auto", "raw"):
        convert(tmp_path / "unet", tmp_path / weights, "diffusers", "msdiff", ConvertOptions(weights=weights))
        first[weights] = next(iter(export_tensors(tmp_path / weights).values()))
    assert torch.equal(first["auto"] + 1, first["raw"])
    with pytest.raises(CheckpointError, match="no unet_ema folder"):
        read_diffusers(tmp_path / "unet", ConvertOptions(weights="ema"))


def test_a_folder_without_an_index_takes_the_scheduler_that_lies_in_it(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    stock().save_pretrained(tmp_path / "unet")
    DDIMScheduler(beta_start=0.002, beta_end=0.03, prediction_type="v_prediction").save_pretrained(
        tmp_path / "scheduler"
    )
    found = read_diffusers(tmp_path, ConvertOptions()).description.diffusion.section
    assert isinstance(found, DiscreteConfig)
    assert (found.schedule, found.beta_start, found.prediction_type) == ("linear", 0.002, "v_prediction")
