"""What only the DDPM++ and NCSN++ families have; the rest is tested for all families alike."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from msdiff_dist.config import from_mapping, to_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.models import LDMConfig, ModelConfig, SongConfig, build_model
from msdiff_dist.models.flops import costs
from msdiff_dist.models.song.blocks import Filter, PyramidStep, SongBlock, TimeFrequencies

TAPS = [(1, 1), (1, 3, 3, 1)]
DPM = SongConfig(
    family="ncsnpp_vp",
    encoder_channels=128,
    decoder_channels=(192, 128, 16),
    channel_mult=(1, 2, 2, 2),
    num_res_blocks=8,
    attention_downsamples=(2,),
    norm_groups=16,
)
EDM = dataclasses.replace(DPM, family="ddpmpp", channel_mult=(2, 2, 2), num_res_blocks=4)


def pixel(x: torch.Tensor, row: int, column: int) -> float:
    inside = 0 <= row < x.shape[0] and 0 <= column < x.shape[1]
    return float(x[row, column]) if inside else 0.0


@pytest.mark.parametrize("taps", TAPS)
def test_filter_halves_and_doubles_as_a_loop_over_pixels(taps: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    halved, doubled, offset = Filter(taps).halved(x), Filter(taps).doubled(x), len(taps) // 2 - 1
    assert (halved.shape, doubled.shape) == ((2, 3, 3, 4), (2, 3, 12, 16))
    weights = [(i, j, a * b / sum(taps) ** 2) for i, a in enumerate(taps) for j, b in enumerate(taps)]
    for r in range(3):
        for c in range(4):
            expected = sum(w * pixel(x[1, 2], 2 * r + i - offset, 2 * c + j - offset) for i, j, w in weights)
            assert float(halved[1, 2, r, c]) == pytest.approx(expected, abs=1e-6)
    spread = torch.zeros(12, 16)
    spread[::2, ::2] = x[1, 2]
    for r in range(12):
        for c in range(16):
            expected = sum(4 * w * pixel(spread, r + offset - i, c + offset - j) for i, j, w in weights)
            assert float(doubled[1, 2, r, c]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("taps", TAPS)
def test_filter_keeps_a_constant_image_inside(taps: tuple[int, ...]) -> None:
    x = torch.full((1, 2, 8, 8), 3.0)
    for y in (Filter(taps).halved(x), Filter(taps).doubled(x)):
        torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.full_like(y[:, :, 2:-2, 2:-2], 3.0))


def test_pyramid_step_is_filter_then_convolution_at_every_other_pixel() -> None:
    step = PyramidStep(dataclasses.replace(EDM, family="ncsnpp"), 3, 5)
    image, h = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    padded = nn.functional.pad(image, [2] * 4)
    blurred = torch.stack([step.filter(padded[:, [c]], padding=0)[:, 0] for c in range(3)], dim=1)
    full = nn.functional.conv2d(blurred, step.conv.weight, step.conv.bias)
    torch.testing.assert_close(step(image, h), (full[:, :, ::2, ::2] + h) / math.sqrt(2), rtol=1e-5, atol=1e-5)


def test_time_frequencies() -> None:
    t = torch.tensor([0.0, 1.0, 250.5])
    positional = TimeFrequencies("positional", 8)(t)
    for i, frequency in enumerate([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4]):
        torch.testing.assert_close(positional[:, i], torch.sin(t * frequency), rtol=0, atol=1e-4)
        torch.testing.assert_close(positional[:, 4 + i], torch.cos(t * frequency), rtol=0, atol=1e-4)
    fourier = TimeFrequencies("fourier", 4096)
    assert float(fourier.frequencies.std()) == pytest.approx(2 * math.pi * 16, rel=0.05)
    assert torch.equal(TimeFrequencies("fourier", 4096).frequencies, fourier.frequencies), "the same in every model"
    torch.testing.assert_close((fourier(t) ** 2).sum(1), torch.full((3,), 2048.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["ddpmpp", "ncsnpp", "ncsnpp_vp"])
def test_attention_is_where_the_published_networks_have_it(family: Any) -> None:
    """After every block of an encoder's level, after the last of a decoder's, and after the first middle block."""
    config = dataclasses.replace(EDM, family=family, encoder_channels=16, decoder_channels=(16,))
    model = build_model(config)
    encoder, decoder = model.shared, model.stages[0]
    has = [b.attention is not None for b in encoder.input_blocks if b.resample is None]
    assert has == [False] * 4 + [True] * 4 + [False] * 4
    assert [g[0].attention is not None for g in decoder.output_blocks] == [i == 9 for i in range(15)]
    middle = (encoder if family == "ncsnpp_vp" else decoder).middle_block
    assert [b.attention is not None for b in middle] == [True, False]
    assert not any(isinstance(b, SongBlock) and b.attention for g in decoder.output_blocks for b in g[1:])


@pytest.mark.parametrize(
    ("config", "total", "decoders", "gmacs"),
    [
        (DPM, 237_169_337, [126.00, 64.04, 3.65], [30.98, 18.58, 7.15]),
        (dataclasses.replace(DPM, decoder_channels=(128,)), 107_521_411, [64.04], [18.58]),
        (EDM, 128_792_233, [68.28, 36.10, 4.77], [35.75, 21.19, 7.73]),
        (dataclasses.replace(EDM, decoder_channels=(128,)), 55_732_739, [36.10], [21.19]),
        (dataclasses.replace(EDM, decoder_channels=(128,), family="ncsnpp"), 56_395_523, [36.10], [21.24]),
    ],
    ids=["dpm", "dpm unified", "edm", "edm unified", "ncsnpp"],
)
def test_models_of_the_paper_have_their_known_sizes(
    config: SongConfig, total: int, decoders: list[float], gmacs: list[float]
) -> None:
    counted = costs(config, (32, 32))
    assert counted.total_params == total
    assert [d.params / 1e6 for d in counted.decoders] == pytest.approx(decoders, abs=0.005)
    assert [(counted.encoder.macs + d.macs) / 1e9 for d in counted.decoders] == pytest.approx(gmacs, abs=0.005)


def test_a_dropped_class_and_no_augmentation_leave_the_embedding_alone() -> None:
    config = dataclasses.replace(EDM, encoder_channels=8, decoder_channels=(8,), num_classes=3, augment_labels=9)
    encoder = build_model(config).shared
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.5])
    dropped, zeros = torch.full((2,), 3), torch.zeros(2, 9)
    plain = encoder(x, t, None, dropped)
    assert all(torch.equal(a, b) for a, b in zip(plain, encoder(x, t, None, dropped, zeros), strict=True))
    expected = encoder.time_embed(encoder.frequencies(t) + encoder.label_emb.bias)
    torch.testing.assert_close(plain[0], expected)
    assert not torch.allclose(plain[0], encoder(x, t, None, dropped, torch.ones(2, 9))[0])


def test_bfloat16_weights_keep_an_exact_time() -> None:
    """Time 999 in bfloat16 would be 1000: the angles are computed in float32."""
    config = dataclasses.replace(DPM, encoder_channels=16, decoder_channels=(16,), num_res_blocks=1)
    model = build_model(config)
    reference, x, t = build_model(config), torch.randn(2, 3, 16, 16), torch.tensor([999.0, 333.3])
    exact, output = reference.shared(x, t)[0], model.bfloat16().shared(x, t)[0]
    assert output.dtype == torch.bfloat16
    assert (output - exact).norm() < 0.02 * exact.norm()


GOOD: dict[str, Any] = {"family": "ncsnpp", "encoder_channels": 32, "decoder_channels": [48, 16]}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"family": "ncsnp"}, "model.family", ["ncsnpp"]),
        ({"num_head_channels": 8}, "model.num_head_channels", ["not a known field"]),
        ({"decoder_channels": [48, 2]}, "model.decoder_channels", ["at least 4"]),
        ({"encoder_channels": 36, "norm_groups": 32}, "model.norm_groups", ["144 channels", "norm_groups to"]),
        ({"augment_labels": -1}, "model.augment_labels", ["negative"]),
        ({"attention_downsamples": [16]}, "model.attention_downsamples", ["[1, 2, 4, 8]"]),
    ],
)
def test_bad_configurations_are_refused_by_field(changes: dict[str, Any], field: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        from_mapping(ModelConfig, GOOD | changes, "model")
    assert refused.value.field == field
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_the_family_chooses_the_dataclass() -> None:
    song = from_mapping(ModelConfig, GOOD | {"norm_groups": 8}, "model")
    assert isinstance(song, SongConfig)
    assert from_mapping(ModelConfig, to_mapping(song), "model") == song
    ldm = {"encoder_channels": 32, "decoder_channels": [32], "num_head_channels": 8}
    assert isinstance(from_mapping(ModelConfig, ldm, "model"), LDMConfig), "the default"
    with pytest.raises(ConfigError, match="must be a mapping"):
        from_mapping(ModelConfig, "ldm", "model")


@pytest.mark.parametrize(("encoder", "decoder"), [(32, 16), (128, 16), (36, 12), (20, 44)])
def test_the_suggested_number_of_groups_fits(encoder: int, decoder: int) -> None:
    fields = {"encoder_channels": encoder, "decoder_channels": (decoder,), "channel_mult": (1, 2, 3)}
    try:
        config = SongConfig(**fields)
    except ConfigError as e:
        config = SongConfig(**fields, norm_groups=int(e.remedy.split("norm_groups to ")[1].split(",")[0]))
    with torch.device("meta"):
        model = build_model(config)
        assert model.stages[0](*model.shared(torch.empty(1, 3, 8, 8), torch.empty(1))).shape == (1, 3, 8, 8)
