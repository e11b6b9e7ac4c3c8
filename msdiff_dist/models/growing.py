"""Which parameter of a unified model each parameter of the multi-stage model is made from that grows out of it.

The encoder is copied. Each decoder is the unified model's: copied where width and attention are the same, else made by
the family's `resized_decoder`. Without a shared encoder every stage gets a copy of it.
"""

from __future__ import annotations

from dataclasses import replace

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.freezing import parameter_names
from msdiff_dist.models.resizing import Resized


def grown_from(unified: ModelConfig, model: ModelConfig) -> dict[str, Resized | None]:
    """For each parameter of `model`, the parameter of `unified` and its change of size; None for one that is new.

    Args:
        model: of the same family, with an encoder (or encoders) of the unified model's width.

    Raises:
        ConfigError: the family cannot resize its decoders, or not to this width.
    """
    old = parameter_names(unified)
    encoder = [name for name in old if name.startswith("shared.")]
    places = [""] if model.share_encoder else [f"stages.{k}.encoder." for k in range(model.num_stages)]
    found: dict[str, Resized | None] = {
        (place or "shared.") + name.removeprefix("shared."): Resized(name) for place in places for name in encoder
    }
    decoder = [name.removeprefix("stages.0.") for name in old if name.startswith("stages.0.")]
    for k in range(model.num_stages):
        place = f"stages.{k}." if model.share_encoder else f"stages.{k}.decoder."
        for name, how in _decoder(unified, model, k, decoder).items():
            found[place + name] = how and replace(how, name=f"stages.0.{how.name}")
    return found


def _decoder(unified: ModelConfig, model: ModelConfig, stage: int, names: list[str]) -> dict[str, Resized | None]:
    resized = FAMILIES[model.family].resized_decoder
    if resized is not None:
        return resized(unified, model, stage)
    was, now = unified.decoder_channels[0], model.decoder_channels[stage]
    if was != now:
        problem = f"decoders of family {model.family} keep their width when copied, and stage {stage} has {now}"
        raise ConfigError("width", was, problem, "Use one width for all decoders.")
    return {name: Resized(name) for name in names}
