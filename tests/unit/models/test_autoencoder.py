"""Latents of every kind of autoencoder, against diffusers' own models."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.autoencoder import AutoencoderConfig, LatentCodec

CPU = torch.device("cpu")
TINY = {
    "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 2,
}  # fmt: skip


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """Folders of a tiny KL and a tiny VQ autoencoder, and the models."""
    torch.manual_seed(0)
    models = {"kl": AutoencoderKL(**TINY).eval(), "vq": VQModel(**TINY, num_vq_embeddings=5).eval()}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    return {kind: (str(tmp_path / kind), model) for kind, model in models.items()}


@pytest.mark.parametrize(("kind", "factor"), [("pixel", 1), ("space_to_depth", 2), ("space_to_depth", 4)])
def test_lossless_kinds_give_the_images_back(images, kind, factor):
    codec = LatentCodec(AutoencoderConfig(kind=kind, factor=factor, scale_factor=0.5), True, CPU)
    latents = codec.encode(images)
    assert latents.shape == (3, 3 * factor**2, 16 // factor, 16 // factor)
    assert torch.equal(codec.to_images(codec.to_latents(latents)), images)
    from_images = LatentCodec(AutoencoderConfig(kind=kind, factor=factor, scale_factor=0.5), False, CPU)
    assert torch.equal(from_images.to_latents(images), codec.to_latents(latents))


@torch.no_grad()
def test_kl_gives_the_posterior_and_vq_what_is_not_yet_quantised(images, saved):
    scaled = images.float() / 127.5 - 1
    path, model = saved["kl"]
    moments = LatentCodec(AutoencoderConfig(kind="kl", path=path), True, CPU).encode(images)
    posterior = model.encode(scaled).latent_dist
    assert torch.allclose(moments, torch.cat([posterior.mean, posterior.logvar], dim=1), atol=1e-5)
    path, model = saved["vq"]
    codec = LatentCodec(AutoencoderConfig(kind="vq", path=path, scale_factor=2.0), True, CPU)
    latents = codec.encode(images)
    assert torch.allclose(latents, model.quant_conv(model.encoder(scaled)), atol=1e-5)
    expected = ((model.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(codec.to_images(2 * latents), expected)


def test_identity_is_that_of_weights_and_settings(saved, tmp_path):
    path, model = saved["kl"]
    one = LatentCodec(AutoencoderConfig(kind="kl", path=path), True, CPU).identity
    assert one == LatentCodec(AutoencoderConfig(kind="kl", path=path, scale_factor=3.0), False, CPU).identity
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    model.save_pretrained(tmp_path / "other")
    other = LatentCodec(AutoencoderConfig(kind="kl", path=str(tmp_path / "other")), True, CPU).identity
    vq = LatentCodec(AutoencoderConfig(kind="vq", path=saved["vq"][0]), True, CPU).identity
    folded = [LatentCodec(AutoencoderConfig(kind="space_to_depth", factor=f), True, CPU).identity for f in (2, 4)]
    assert len({one, other, vq, *folded, LatentCodec(AutoencoderConfig(), True, CPU).identity}) == 6


def test_what_cannot_be_loaded_is_named(saved, images, tmp_path):
    with pytest.raises(ConfigError, match=r"autoencoder\.path.*no AutoencoderKL that can be loaded"):
        LatentCodec(AutoencoderConfig(kind="kl", path=str(tmp_path)), True, CPU).encode(images)
    with pytest.raises(ConfigError, match=r"autoencoder\.path = None"):
        LatentCodec(AutoencoderConfig(kind="vq"), True, CPU).encode(images)
    with pytest.raises(ConfigError, match="takes 3 channels, the images have 1"):
        LatentCodec(AutoencoderConfig(kind="kl", path=saved["kl"][0]), True, CPU).encode(images[:, :1])
