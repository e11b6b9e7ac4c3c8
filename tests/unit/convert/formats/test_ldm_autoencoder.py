"""LDM's autoencoders compute the same as diffusers' own network with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msdiff_dist.convert.formats.ldm_autoencoder import read_first_stage, write_first_stage
from msdiff_dist.convert.key_map import TheirsFromOurs
from msdiff_dist.convert.model_weights import AutoencoderWeights
from msdiff_dist.convert.tensor_sources import MemorySource
from msdiff_dist.errors import CheckpointError
from tests.unit.convert.convert_helpers import randomise

COMMON: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 3}
PLAIN = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
ATTENDING = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")


def autoencoder(kind: str, blocks: tuple, **options: Any) -> Any:
    from diffusers import AutoencoderKL, VQModel

    own = {"num_vq_embeddings": 16, "vq_embed_dim": 2} if kind == "VQModel" else {}
    down, up = blocks
    cls = VQModel if kind == "VQModel" else AutoencoderKL
    return randomise(cls(down_block_types=down, up_block_types=up, **COMMON, **own, **options))


def as_ldm(model: Any, kind: str) -> dict[str, Tensor]:
    weights = AutoencoderWeights(kind, {**model.config, "_class_name": kind}, MemorySource(model.state_dict()))
    theirs = TheirsFromOurs(weights.tensors, write_first_stage(weights))
    return {k: theirs.read(k) for k in theirs.names()}


@pytest.mark.parametrize("blocks", [PLAIN, ATTENDING], ids=["plain", "attending"])
@pytest.mark.parametrize("kind", ["VQModel", "AutoencoderKL"])
def test_the_same_network_comes_back(kind: str, blocks: tuple, tmp_path: Path) -> None:
    model = autoencoder(kind, blocks)
    state = as_ldm(model, kind)
    assert state["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert "decoder.up.1.upsample.conv.weight" in state
    found = read_first_stage(MemorySource(state | {"loss.logvar": torch.zeros(1)}), {})
    assert found is not None
    assert list(found.left_out) == ["loss.logvar"]
    assert found.weights.class_name == kind
    rebuilt = type(model).from_config(found.weights.config).eval()
    rebuilt.load_state_dict({k: found.weights.tensors.read(k) for k in found.weights.tensors.names()})
    z = torch.randn(1, 2 if kind == "VQModel" else 3, 4, 4)
    assert torch.equal(rebuilt.decode(z).sample, model.decode(z).sample)


def test_no_attention_in_the_middle() -> None:
    model = autoencoder("AutoencoderKL", PLAIN, mid_block_add_attention=False)
    found = read_first_stage(MemorySource(as_ldm(model, "AutoencoderKL")), {})
    assert found is not None
    assert found.weights.config["mid_block_add_attention"] is False


def test_no_first_stage() -> None:
    assert read_first_stage(MemorySource({}), {}) is None


@pytest.mark.parametrize("change", ["missing", "over"])
def test_other_autoencoders_are_refused(change: str) -> None:
    state = as_ldm(autoencoder("AutoencoderKL", PLAIN), "AutoencoderKL")
    if change == "missing":
        del state["encoder.mid.block_1.norm1.weight"]
    else:
        state["encoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"first_stage_model\.encoder"):
        read_first_stage(MemorySource(state), {})
