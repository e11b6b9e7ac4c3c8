"""Context of prompts, and models that take none."""

from __future__ import annotations

import json

import pytest
import torch

from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.prompts import Prompter
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models import LDMConfig
from msdiff_dist.models.text_encoder import TextEncoderConfig, open_text_encoder

CPU = torch.device("cpu")


@pytest.fixture
def tower(tmp_path):
    path = tmp_path / "prompt_tower.json"
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2}
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    return TextEncoderConfig(name=str(path))


def prompter_of(context_dim=8, **fields):
    model = LDMConfig(encoder_channels=8, decoder_channels=(8,), norm_groups=4, num_heads=2, context_dim=context_dim)
    return Prompter(ModelDescription(model=model, **fields), CPU)


def test_prompts_take_turns_by_number(tower):
    prompter = prompter_of(text_encoder=tower, context_shape=(8, 8))
    context, null = prompter([1, 2, 5], ["a", "b b", "c"])
    expected, _ = open_text_encoder(tower, CPU)(["b b", "c", "c", "", "", ""])
    assert torch.allclose(torch.cat([context, null]), expected, atol=1e-6)
    assert torch.equal(prompter([0, 1], ())[0], null[:2])


def test_models_without_text_refuse_prompts(tower):
    assert prompter_of(None)([0], ()) == (None, None)
    context, null = prompter_of(context_shape=(3, 8))([0, 1], ())
    assert torch.equal(context, torch.zeros(2, 3, 8))
    assert torch.equal(null, context)
    with pytest.raises(ConfigError, match=r"--prompt = 'x': the model takes no text"):
        prompter_of(None)([0], ["x"])
    with pytest.raises(ConfigError, match="not trained with a text_encoder"):
        prompter_of(context_shape=(3, 8))([0], ["x"])
    with pytest.raises(ConfigError, match=r"embeds as \[8, 8\], the model was trained on \[7, 8\]"):
        prompter_of(text_encoder=tower, context_shape=(7, 8))([0], ["x"])
