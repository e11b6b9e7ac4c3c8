"""The text encoder against open_clip's own models."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from open_clip.transformer import text_global_pool

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.text_encoder import TextEncoderConfig, open_text_encoder

CAPTIONS = ["", "a red apple", "two very big dogs!", "x " * 40]
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
OTHERS = {
    "clip": {},
    "bidirectional": {"no_causal_mask": True, "pad_id": 0},
    "with_cls": {"embed_cls": True},
    "gelu_norm": {"mlp_ratio": 2.0, "ls_init_value": 0.1},
}


@pytest.fixture(params=list(OTHERS))
def tower(request, tmp_path):
    """The file of a tiny model and the library's own instance of it."""
    name = f"tiny_{request.param}"
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXT | OTHERS[request.param],
    }
    if request.param != "clip":
        config["custom_text"] = True
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(7)
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return TextEncoderConfig(name=str(path), pretrained=str(tmp_path / "weights.pt")), model


def encoder_of(config, **changes):
    return open_text_encoder(TextEncoderConfig(**{**vars(config), **changes}), torch.device("cpu"))


def tokens_of(config):
    return open_clip.get_tokenizer(config.name.rsplit("/", 1)[-1].removesuffix(".json"))(CAPTIONS)


def test_last_layer_pools_to_the_librarys_embedding(tower):
    config, model = tower
    context, _ = encoder_of(config, layer="last")(CAPTIONS)
    tokens = tokens_of(config)
    text = model.text if hasattr(model, "text") else model
    if getattr(text, "cls_emb", None) is not None:
        with torch.no_grad():
            expected = text.transformer(*text._embeds(tokens))[:, :-1]
        assert torch.allclose(context, text.ln_final(expected), atol=1e-6)
        return
    pooled = text_global_pool(context, tokens, pool_type="argmax") @ text.text_projection
    assert torch.allclose(pooled, model.encode_text(tokens), atol=1e-6)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize(("layer", "block"), [("last", -1), ("penultimate", -2)])
def test_hidden_states_are_the_librarys(tower, layer, block, final_norm):
    config, model = tower
    text = model.text if hasattr(model, "text") else model
    seen = []
    text.transformer.resblocks[block].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model.encode_text(tokens_of(config))
    (hidden,) = seen
    assert hidden.shape[0] == len(CAPTIONS), "batch first"
    if getattr(text, "cls_emb", None) is not None:
        hidden = hidden[:, :-1]
    encoder = encoder_of(config, layer=layer, final_norm=final_norm)
    context, mask = encoder(CAPTIONS)
    assert context.shape == (4, *encoder.context_shape) == (4, 12, 32)
    assert torch.allclose(context, text.ln_final(hidden) if final_norm else hidden, atol=1e-6)
    assert torch.allclose(encoder(CAPTIONS[1:2])[0], context[1:2], atol=1e-5), "not a matter of the batch"
    assert mask.sum(1).tolist() == [2, 5, 7, 12]
    assert mask[:, 0].all()


def test_random_weights_are_fixed_by_the_seed(tower):
    config, _ = tower
    state = torch.random.get_rng_state()
    one, again = encoder_of(config, pretrained=None), encoder_of(config, pretrained=None)
    other = encoder_of(config, pretrained=None, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one(CAPTIONS)[0], again(CAPTIONS)[0])
    assert one.identity == again.identity
    assert len({one.identity, other.identity, encoder_of(config).identity}) == 3
    assert one.identity != encoder_of(config, pretrained=None, layer="last").identity
    assert one.identity != encoder_of(config, pretrained=None, final_norm=False).identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ViT-B-23"}, r"text_encoder\.name = 'ViT-B-23': is not a model.*ViT-B-32"),
        ({"name": "none.json"}, r"text_encoder\.name.*does not exist"),
        ({"pretrained": "nobody"}, r"text_encoder\.pretrained = 'nobody': cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        open_text_encoder(TextEncoderConfig(**{"name": "ViT-B-32", **changes}), torch.device("cpu"))
