"""Several unified models as the stages of one, which either share an encoder or stay whole networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from msdiff_dist.config import differences, to_mapping
from msdiff_dist.convert.model_weights import FROZEN, JoinedSource, ModelWeights
from msdiff_dist.convert.tensor_sources import RenamedSource, TensorSource
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.separate import SeparateConfig


def _held(one: ModelWeights, prefix: str) -> TensorSource | None:
    """The tensors of a frozen network that the model brings, by the beginning of their names."""
    if prefix == "autoencoder/":
        return one.autoencoder_weights.tensors if one.autoencoder_weights else None
    return one.text_encoder_weights.tensors if one.text_encoder_weights else None


def merge(
    models: Sequence[ModelWeights],
    boundaries: Sequence[float],
    *,
    share: bool = True,
    names: Sequence[str] | None = None,
) -> ModelWeights:
    """One model whose stages are unified models, the first nearest the data.

    The autoencoder and the text encoder are those of the first model that has them.

    Models that differ in nothing but widths make a model of their family; others one of the family `separate`. What a
    model's source does not say (`ModelWeights.unstated`) is taken from the others.

    Args:
        boundaries: inner stage boundaries, one fewer than models, in the process's own time.
        share: make the encoders the one shared encoder, if all are equal bit by bit. Otherwise each stage keeps its
            own.
        names: what messages call the models.

    Raises:
        ConfigError: a model is not unified, models differ in process, latents, conditions or channels, or the
            boundaries do not divide time among them.
    """
    names = names or [f"model {i}" for i in range(len(models))]
    if len(models) != len(boundaries) + 1 or len(models) < 2:
        raise ConfigError(
            "--boundaries", list(boundaries), f"do not divide time among {len(models)} models",
            "Give one boundary fewer than models, and at least two models.",
        )  # fmt: skip
    for name, one in zip(names, models, strict=True):
        if one.model.num_stages > 1:
            raise ConfigError(
                name, one.model.num_stages, "stages are more than one, and a stage is made of a unified model",
                "Extract one first: msdiff extract SRC DST --stage K.",
            )  # fmt: skip
    description, assumed = _described(models, boundaries, names)
    alike = all(_alike(one.model, models[0].model) for one in models)
    shared = share and alike and _same_encoders(models)
    model = _merged_model([one.model for one in models], shared) if alike else _separate(models, names)
    # The first model that has it, for each frozen network.
    owners = {
        prefix: next((k for k, one in enumerate(models) if _held(one, prefix) is not None), None) for prefix in FROZEN
    }
    parts, used, left_out = [], {}, {}
    for k, part in enumerate(models):
        # The shared encoder is taken from the first model.
        kept = [n for n in part.tensors.names() if not (shared and k and n.startswith("shared."))]
        parts.append(RenamedSource(part.tensors, {_merged_name(n, k, shared): n for n in kept}))
        # Sources may have the same keys, so the report has the model's number before them.
        for key, ours in part.used.items():
            # A key gives tensors of the network or of a frozen one, never of both.
            owner = next((owners[prefix] for prefix in FROZEN if ours[0].startswith(prefix)), k)
            if owner == k:
                used[f"{k}:{key}"] = [n if n.startswith(FROZEN) else _merged_name(n, k, shared) for n in ours]
            else:
                left_out[f"{k}:{key}"] = f"that of {names[owner or 0]} is kept"
        left_out |= {f"{k}:{key}": reason for key, reason in part.left_out.items()}
    return replace(
        models[0],
        description=replace(description, model=model),
        tensors=JoinedSource(parts),
        autoencoder_weights=next((one.autoencoder_weights for one in models if one.autoencoder_weights), None),
        text_encoder_weights=next((one.text_encoder_weights for one in models if one.text_encoder_weights), None),
        used=used,
        left_out=left_out,
        assumed=assumed,
        notes=[note for one in models for note in one.notes],
        unstated=frozenset.intersection(*(one.unstated for one in models)),
    )


def _described(
    models: Sequence[ModelWeights], boundaries: Sequence[float], names: Sequence[str]
) -> tuple[ModelDescription, list[str]]:
    """The description, still with the first model's network, and the lines of the report about what was assumed.

    Raises:
        ConfigError: two models state different things, or the boundaries do not divide the process's time.
    """
    description = models[0].description
    assumed = []
    for section, what in (("diffusion", "noise schedule and prediction"), ("autoencoder", "latents")):
        stating = [k for k, one in enumerate(models) if section not in one.unstated]
        if not stating:
            continue
        first = models[stating[0]].description
        description = replace(description, **{section: getattr(first, section)})
        for k, one in enumerate(models):
            if k not in stating:
                assumed.append(f"{k}: {what} as in {names[stating[0]]}, since {names[k]} does not say them")
                continue
            for field, here, there in differences(_stated(one.description, section), _stated(first, section)):
                raise ConfigError(
                    names[k], here, f"is its {section}.{field}, and {there!r} that of {names[stating[0]]}",
                    "Take models of one diffusion process, on the same latents.",
                )  # fmt: skip
    # Of an autoencoder the way into latents matters: a decoder may be fine-tuned without a change to them.
    _check_same(models, names, "autoencoder/", ("encoder.", "quant_conv."), "latents")
    _check_same(models, names, "text_encoder/", "", "captions' embeddings")
    for section in ("text_encoder", "context_shape", "sample_size"):
        stated = [(n, getattr(one.description, section)) for n, one in zip(names, models, strict=True)]
        stated = [(name, value) for name, value in stated if value is not None]
        if not stated:
            continue
        description = replace(description, **{section: stated[0][1]})
        for name, value in stated:
            if value == stated[0][1]:
                continue
            if section != "sample_size":
                raise ConfigError(
                    name, to_mapping(value), f"is its {section}, and {to_mapping(stated[0][1])!r} that of the first",
                    "Take models with the same conditions.",
                )  # fmt: skip
            assumed.append(f"sample size {stated[0][1]}, that of {stated[0][0]}; {name} states {value}")
    for k, one in enumerate(models):
        # What a bare network's reader assumed of the process is replaced by what another source states.
        replaced = "diffusion" in one.unstated and any("diffusion" not in other.unstated for other in models)
        assumed += [] if replaced else [f"{k}: {text}" for text in one.assumed]
    extensions = tuple(dict.fromkeys(module for one in models for module in one.description.extensions))
    try:
        description = replace(
            description, stages=StagesConfig(boundaries=tuple(map(float, boundaries))), extensions=extensions
        )
        description.partition()  # raises if the boundaries do not divide the process's time
    except ConfigError as e:
        raise ConfigError("--boundaries", e.value, e.problem, e.remedy) from None
    return description, assumed


def _stated(description: ModelDescription, section: str) -> dict[str, Any]:
    """What a description says in a section, defaults written out, and without the paths of files."""
    if section == "diffusion":
        return {"process": description.diffusion.process, **to_mapping(description.diffusion.settings())}
    return {name: value for name, value in to_mapping(description.autoencoder).items() if name != "path"}


def _check_same(
    models: Sequence[ModelWeights], names: Sequence[str], prefix: str, keys: str | tuple[str, ...], gives: str
) -> None:
    """Raise `ConfigError` unless the frozen networks that the sources hold are equal, up to rounding.

    Args:
        keys: beginnings of the names of the tensors that are compared.
        gives: what such a network makes, for the message.
    """
    held = [
        (name, tensors) for name, one in zip(names, models, strict=True) if (tensors := _held(one, prefix)) is not None
    ]
    for name, tensors in held[1:]:
        first = held[0][1]
        for key in (n for n in first.names() if n.startswith(keys)):
            same = key in tensors.names() and tensors.meta(key).shape == first.meta(key).shape
            # Half-precision copies of the same weights differ by rounding.
            if not (same and torch.allclose(tensors.read(key).float(), first.read(key).float(), rtol=1e-2, atol=1e-3)):
                raise ConfigError(
                    name, prefix + key, f"is another tensor than that of {held[0][0]}, so its {gives} are others",
                    f"Take models of the same {gives}.",
                )  # fmt: skip


def _merged_name(name: str, stage: int, shared: bool) -> str:
    """The name that a unified model's tensor has in the merged model."""
    if name.startswith("stages.0."):
        return (f"stages.{stage}." if shared else f"stages.{stage}.decoder.") + name.removeprefix("stages.0.")
    return name if shared else f"stages.{stage}.encoder." + name.removeprefix("shared.")


def _same_encoders(models: Sequence[ModelWeights]) -> bool:
    """Whether all encoders are equal bit by bit."""
    first, *others = (m.tensors for m in models)
    names = [n for n in first.names() if n.startswith("shared.")]
    return all(
        n in other and other.meta(n).shape == first.meta(n).shape and torch.equal(other.read(n), first.read(n))
        for other in others
        for n in names
    )


def _alike(model: ModelConfig, other: ModelConfig) -> bool:
    """Whether `model` differs from `other` in nothing but what may differ from stage to stage of one family."""
    fields = {f.name for f in dataclasses.fields(other)} - set(other.per_stage)
    return type(model) is type(other) and all(getattr(model, name) == getattr(other, name) for name in fields)


def _merged_model(models: Sequence[ModelConfig], shared: bool) -> ModelConfig:
    first = models[0]
    widths = tuple(m.encoder_width(0) for m in models)
    encoders = widths[0] if len(set(widths)) == 1 else widths
    return first.of_decoders([(m, 0) for m in models], encoder_channels=encoders, share_encoder=shared)


def _separate(models: Sequence[ModelWeights], names: Sequence[str]) -> ModelConfig:
    """The model of whole networks.

    Raises:
        ConfigError: they differ in channels or conditions.
    """
    networks = tuple(replace(one.model.of_stages([0]), attention_backend="auto") for one in models)
    try:
        return SeparateConfig(networks=networks, attention_backend=models[0].model.attention_backend)
    except ConfigError as e:
        # The field is networks[K].NAME.
        place, _, name = e.field.partition(".")
        stage = int(place.removeprefix("networks[").removesuffix("]"))
        raise ConfigError(names[stage], e.value, f"is its {name}: it {e.problem}", e.remedy) from None
