"""Recomputed activations give the same losses and gradients, and take less memory."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from msdiff_dist.models import LDMConfig, ModelConfig, MultistageUNet, SongConfig, build_model
from msdiff_dist.models.activation_checkpointing import ActivationCheckpointingConfig, checkpoint_activations

CONFIG = LDMConfig(
    encoder_channels=16,
    decoder_channels=(16, 8),
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamples=(2,),
    num_head_channels=8,
    norm_groups=8,
    context_dim=12,
    num_classes=3,
    dropout=0.3,
)
SEPARATE = dataclasses.replace(CONFIG, share_encoder=False)
SONG = SongConfig(
    family="ncsnpp_vp",
    encoder_channels=16,
    decoder_channels=(16, 8),
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamples=(2,),
    num_classes=3,
    dropout=0.3,
)


def busy_model(config: ModelConfig) -> MultistageUNet:
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model


def loss_and_gradients(model: MultistageUNet) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    x, context, label = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 12), torch.arange(4)
    takes_context = not isinstance(getattr(model.shared, "config", None), SongConfig)
    loss = model(x, torch.arange(4) * 300, torch.arange(4) % 2, context if takes_context else None, label)
    loss = loss.square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [CONFIG, SEPARATE, SONG], ids=["shared", "separate", "song"])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize(("encoder", "decoders"), [(True, False), (False, True), (True, True)])
def test_same_loss_and_gradients_dropout_included(
    config: ModelConfig, offload: bool, encoder: bool, decoders: bool
) -> None:
    plain, wrapped = busy_model(config), busy_model(config)
    for part in (wrapped.shared, *wrapped.stages):
        checkpoint_activations(
            part, ActivationCheckpointingConfig(encoder=encoder, decoders=decoders, offload_to_cpu=offload)
        )
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    expected_loss, expected = loss_and_gradients(plain)
    loss, gradients = loss_and_gradients(wrapped)
    assert torch.equal(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", [CONFIG, SEPARATE, SONG], ids=["shared", "separate", "song"])
def test_only_the_asked_part_is_wrapped(config: ModelConfig) -> None:
    for encoder, decoders in ((True, False), (False, True), (False, False)):
        model = build_model(config)
        checkpoint_activations(model, ActivationCheckpointingConfig(encoder=encoder, decoders=decoders))
        wrapped = {n for n, m in model.named_modules() if isinstance(m.__dict__.get("forward"), functools.partial)}
        assert any("input_blocks" in name for name in wrapped) == encoder
        assert any("middle_block" in name for name in wrapped) == encoder
        assert any("output_blocks" in name for name in wrapped) == decoders


def test_keeps_fewer_activations() -> None:
    def saved_bytes(model: MultistageUNet) -> int:
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = model(torch.randn(4, 3, 16, 16), torch.arange(4), torch.zeros(4, dtype=torch.int64))
        del output
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in parameters)

    config = dataclasses.replace(CONFIG, context_dim=None, num_classes=None)
    plain, wrapped = build_model(config), build_model(config)
    checkpoint_activations(wrapped, ActivationCheckpointingConfig(encoder=True, decoders=True))
    assert saved_bytes(wrapped) < saved_bytes(plain) / 2
