"""Models made of stages of other models: one stage alone, several put together, many grown from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msdiff_dist.checkpoint.convert.model_weights import ModelWeights
from msdiff_dist.checkpoint.convert.sources import RenamedSource
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.ldm.config import LDMConfig


def extract_stage(weights: ModelWeights, stage: int) -> ModelWeights:
    """One stage with the encoder, as a unified model.

    Raises:
        ConfigError: there is no such stage.
    """
    model = weights.model
    if not 0 <= stage < model.num_stages:
        raise ConfigError("--stage", stage, f"the model has stages 0 to {model.num_stages - 1}", "Choose one of them.")
    old = f"stages.{stage}."
    if model.share_encoder:
        names = {k: k for k in weights.tensors.names() if k.startswith("shared.")}
        names |= {_new(k, old, "stages.0."): k for k in weights.tensors.names() if k.startswith(old)}
    else:
        names = {}
        for k in weights.tensors.names():
            if k.startswith(f"{old}encoder."):
                names[_new(k, f"{old}encoder.", "shared.")] = k
            elif k.startswith(f"{old}decoder."):
                names[_new(k, f"{old}decoder.", "stages.0.")] = k
    renamed = {source: new for new, source in names.items()}
    used, left_out = {}, dict(weights.left_out)
    for key, ours in weights.used.items():
        kept = [renamed.get(name, name) for name in ours if name in renamed or name.startswith("autoencoder/")]
        if kept:
            used[key] = kept
        else:
            left_out[key] = f"of another stage than {stage}"
    return replace(
        weights,
        description=replace(weights.description, model=model_of_stages(model, [stage]), stages=StagesConfig()),
        tensors=RenamedSource(weights.tensors, names),
        used=used,
        left_out=left_out,
    )


def model_of_stages(model: ModelConfig, stages: Sequence[int]) -> ModelConfig:
    """The configuration with these stages alone; a single one shares its encoder with nobody, whatever it was."""
    one = len(stages) == 1
    changes: dict[str, Any] = {
        "encoder_channels": model.encoder_width(stages[0]) if one else model.encoder_channels,
        "decoder_channels": tuple(model.decoder_channels[k] for k in stages),
        "share_encoder": one or model.share_encoder,
    }
    if isinstance(model, LDMConfig) and model.decoder_attention is not None:
        places = tuple(model.decoder_attention[k] for k in stages)
        changes["decoder_attention"] = None if set(places) == {model.attention_downsamples} else places
    return replace(model, **changes)


def _new(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old)
