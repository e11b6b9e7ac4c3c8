"""What holds for the models of all families: stages, features, first weights, conditions."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from msdiff_dist.errors import ConfigError
from msdiff_dist.models import LDMConfig, ModelConfig, MultistageUNet, SongConfig, build_model, build_parts

SHARED = LDMConfig(
    encoder_channels=16,
    decoder_channels=(24, 16, 8),
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamples=(2,),
    decoder_attention=((2,), (1, 2), ()),
    num_head_channels=8,
    norm_groups=8,
)
TEXT = dataclasses.replace(SHARED, context_dim=12)
CLASSES = dataclasses.replace(SHARED, num_classes=4)
CLASS_TOKEN = dataclasses.replace(TEXT, num_classes=4, class_conditioning="context")
SONG = SongConfig(
    encoder_channels=16, decoder_channels=(24, 16, 8), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,)
)
CONFIGS: dict[str, ModelConfig] = {
    "shared": SHARED,
    "unified": dataclasses.replace(SHARED, decoder_channels=(24,), decoder_attention=None),
    "separate": dataclasses.replace(SHARED, share_encoder=False),
    "separate tailored widths": dataclasses.replace(
        SHARED, share_encoder=False, encoder_channels=(24, 16, 8), num_classes=4
    ),
    "text": TEXT,
    "classes": CLASSES,
    "class token": CLASS_TOKEN,
    "separate class token": dataclasses.replace(CLASS_TOKEN, share_encoder=False),
    "text and classes": dataclasses.replace(TEXT, num_classes=4, use_linear_in_transformer=True),
    "scale-shift, resblock_updown": dataclasses.replace(SHARED, use_scale_shift_norm=True, resblock_updown=True),
    "ddpmpp": SONG,
    "ncsnpp": dataclasses.replace(SONG, family="ncsnpp", num_classes=4),
    "ncsnpp_vp": dataclasses.replace(SONG, family="ncsnpp_vp"),
    "ncsnpp_vp separate": dataclasses.replace(
        SONG, family="ncsnpp_vp", share_encoder=False, encoder_channels=(24, 16, 8), num_classes=4, augment_labels=9
    ),
    "ddpmpp classes augmented": dataclasses.replace(SONG, num_classes=4, augment_labels=9),
}


def busy(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same module with no parameter left at zero, so that every branch counts."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    return module


def inputs(config: ModelConfig, n: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    batch = {
        "x_BCHW": torch.randn(n, 3, 8, 8, generator=g),
        "t_B": torch.randint(0, 1000, (n,), generator=g),
        "stage_B": torch.arange(n) * 2 % config.num_stages,
    }
    if config.takes_context:
        assert config.context_channels is not None
        batch["context"] = torch.randn(n, 5, config.context_channels, generator=g)
    if config.takes_label:
        batch["label"] = torch.arange(n) % 5
    if config.augment_labels:
        batch["augment"] = torch.randn(n, config.augment_labels, generator=g)
    return batch


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def test_mixed_batch_equals_one_sample_at_a_time(config: ModelConfig) -> None:
    model, batch = busy(build_model(config)), inputs(config)
    together = model(**batch)
    alone = torch.cat([model(**{k: v[i : i + 1] for k, v in batch.items()}) for i in range(6)])
    assert together.shape == (6, 3, 8, 8)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_stages_differ(config: ModelConfig) -> None:
    model, batch = busy(build_model(config)), inputs(config)
    outputs = [model(**{**batch, "stage_B": torch.full((6,), k)}) for k in range(config.num_stages)]
    for a, b in itertools.pairwise(outputs):
        assert (a - b).abs().max() > 1e-3


def test_features_are_flat_and_batch_first(config: ModelConfig) -> None:
    batch = inputs(config)
    stage_B = batch.pop("stage_B")
    features = build_model(config).shared(**batch)
    assert isinstance(features, tuple)
    assert all(f.shape[0] == len(stage_B) for f in features)


def test_gradients_through_detached_features_equal_full_autograd(config: ModelConfig) -> None:
    model, batch = busy(build_model(config)), inputs(config)
    weight = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    (model(**batch) * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    stage_B = batch.pop("stage_B")
    features = model.shared(**batch)
    gradients = [torch.zeros_like(f) if f.requires_grad else None for f in features]
    for k in stage_B.unique().tolist():
        rows = stage_B == k
        leaves = [f.detach()[rows].requires_grad_(f.requires_grad) for f in features]
        (model.stages[k](*leaves) * weight[rows]).sum().backward()
        for gradient, leaf in zip(gradients, leaves, strict=True):
            if gradient is not None and leaf.grad is not None:
                gradient[rows] = leaf.grad
    roots = [(f, g) for f, g in zip(features, gradients, strict=True) if g is not None]
    if roots:
        torch.autograd.backward(*zip(*roots, strict=True))

    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_equal_the_whole_model_whatever_else_is_built(config: ModelConfig) -> None:
    torch.manual_seed(3)
    model = build_model(config, seed=7)
    for k in range(config.num_stages):
        torch.manual_seed(k)
        before = torch.get_rng_state()
        shared, stages = build_parts(config, [k], seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        assert list(stages) == [k]
        for built, whole in ((shared, model.shared), (stages[k], model.stages[k])):
            assert built.state_dict().keys() == whole.state_dict().keys()
            assert all(torch.equal(v, whole.state_dict()[name]) for name, v in built.state_dict().items())


def test_seed_and_stage_change_the_first_weights() -> None:
    config = dataclasses.replace(SHARED, decoder_channels=(16, 16), decoder_attention=None)
    weights = [
        build_model(config, seed).stages[k].output_blocks[0][0].in_layers[2].weight for seed in (0, 1) for k in (0, 1)
    ]
    assert len({w.sum().item() for w in weights}) == 4


def test_a_fresh_model_outputs_nothing_and_its_residual_branches_are_silent(config: ModelConfig) -> None:
    model = build_model(config)
    bound = 0 if isinstance(config, LDMConfig) else 1e-4
    assert model(**inputs(config)).abs().max() <= bound
    for name, p in model.named_parameters():
        if "out_layers.3" in name or "proj_out" in name or "out_conv" in name:
            assert p.abs().max() <= bound, name


def test_dropped_label_differs_from_every_class() -> None:
    model, batch = busy(build_model(CLASSES)), inputs(CLASSES, 5)
    batch = {k: v[:1].expand(5, *v.shape[1:]) for k, v in batch.items()} | {"label": torch.arange(5)}
    outputs = model(**batch)
    assert torch.pdist(outputs.flatten(1)).min() > 1e-3


def test_bfloat16_weights_take_float32_inputs() -> None:
    model = busy(build_model(CLASS_TOKEN)).bfloat16()
    reference = busy(build_model(CLASS_TOKEN))
    batch = inputs(CLASS_TOKEN)
    output = model(**batch)
    assert output.dtype == torch.bfloat16
    exact = reference(**batch)
    assert (output - exact).norm() < 0.05 * exact.norm()


def test_conditions_must_match_the_configuration() -> None:
    batch = inputs(SHARED)
    for config in (TEXT, CLASSES):
        with pytest.raises(ConfigError, match="needs"):
            build_model(config)(**batch)
    with pytest.raises(ConfigError, match="takes no label"):
        build_model(SHARED)(**batch, label=torch.zeros(6, dtype=torch.int64))


def test_channels_last_gives_the_same(config: ModelConfig) -> None:
    model, batch = busy(build_model(config)), inputs(config)
    assert isinstance(model, MultistageUNet)
    expected = model(**batch)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(**batch), expected, rtol=1e-4, atol=1e-4)
