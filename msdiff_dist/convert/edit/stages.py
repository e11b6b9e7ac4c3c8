"""Models made of stages of other models: one stage alone, several put together, many grown from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from msdiff_dist.convert.model_weights import JoinedSource, ModelWeights, empty_model
from msdiff_dist.convert.tensor_sources import RenamedSource, TensorSource
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.models.resizing import Resized


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


def grow(
    weights: ModelWeights,
    boundaries: Sequence[float],
    decoder_channels: Sequence[int],
    decoder_attention: Sequence[Sequence[int]] | None = None,
) -> ModelWeights:
    """A multi-stage model from a unified one: the encoder as it is, each decoder a copy, at its own width.

    At the unified model's width and attention a decoder is the same, bit by bit; else `widths` says what becomes of it.

    Raises:
        ConfigError: the stages do not make a model, or the family's decoders cannot change their width.
    """
    old = weights.model
    if old.num_stages > 1:
        raise ConfigError("SRC", old.num_stages, "stages are more than one", "Grow a unified model, or use --stage.")
    if len(decoder_channels) != len(boundaries) + 1:
        raise ConfigError(
            "--widths", list(decoder_channels), f"are {len(decoder_channels)} for {len(boundaries) + 1} stages",
            "Give one width for each stage.",
        )  # fmt: skip
    resizes = FAMILIES[old.family].resized_decoder is not None
    if not resizes and any(w != old.decoder_channels[0] for w in decoder_channels):
        raise ConfigError(
            "--widths", list(decoder_channels), f"decoders of family {old.family} keep their width when copied",
            f"Use {old.decoder_channels[0]} for every stage.",
        )  # fmt: skip
    model = old.of_widths(decoder_channels, decoder_attention)
    description = replace(
        weights.description, model=model, stages=StagesConfig(boundaries=tuple(map(float, boundaries)))
    )
    description.partition()
    tensors = GrownSource(weights, model)
    return replace(
        weights,
        description=description,
        tensors=tensors,
        used={k: [n for name in names for n in tensors.copies(name)] for k, names in weights.used.items()},
    )


class GrownSource(TensorSource):
    """The tensors of a multi-stage model whose decoders come from the one of a unified model."""

    def __init__(self, unified: ModelWeights, model: ModelConfig) -> None:
        self._old, self._model = unified.tensors, model
        self.files, self.metadata = unified.tensors.files, unified.tensors.metadata
        self._from: dict[str, Resized | None] = {n: Resized(n) for n in self._old.names() if n.startswith("shared.")}
        own = [n.removeprefix("stages.0.") for n in self._old.names() if n.startswith("stages.0.")]
        resized_decoder = FAMILIES[model.family].resized_decoder
        for k in range(model.num_stages):
            decoder: dict[str, Resized | None] = {name: Resized(name) for name in own}
            if resized_decoder is not None:
                decoder = resized_decoder(unified.model, model, k)
            for name, how in decoder.items():
                self._from[f"stages.{k}.{name}"] = how and replace(how, name=f"stages.0.{how.name}")
        self._meta = dict(empty_model(model).named_parameters())
        assert self._meta.keys() == self._from.keys()

    def copies(self, name: str) -> list[str]:
        """The new tensors that come from an old one; parts of the autoencoder stay."""
        return [n for n, how in self._from.items() if how and how.name == name] or [name]

    def names(self) -> list[str]:
        return list(self._from)

    def meta(self, key: str) -> Tensor:
        how = self._from[key]
        return self._meta[key].detach() if how is None else self._meta[key].detach().to(self._old.meta(how.name).dtype)

    def read(self, key: str) -> Tensor:
        how = self._from[key]
        if how is not None:
            return how.apply(self._old.read(how.name))
        _, stage, name = key.split(".", 2)
        out: Tensor = build_parts(self._model, [int(stage)])[1][int(stage)].state_dict()[name]
        return out


def merge(models: Sequence[ModelWeights], boundaries: Sequence[float]) -> ModelWeights:
    """One model from several unified ones, a stage each, the first nearest the data; the first's autoencoder.

    Where all encoders are the same, bit by bit, they become the one shared encoder; else each stage keeps its own.

    Raises:
        ConfigError: the models differ in more than their widths, or their number does not fit the boundaries.
    """
    first = models[0]
    if len(models) != len(boundaries) + 1 or len(models) < 2:
        raise ConfigError(
            "--boundaries", list(boundaries), f"do not divide time among {len(models)} models", "Give one fewer."
        )
    for i, other in enumerate(models):
        if other.description.diffusion != first.description.diffusion or not _alike(other.model, first.model):
            raise ConfigError(
                f"model {i}", other.model.decoder_channels, "is not a unified model like the first, but for its width",
                "Merge models of one family, shape and diffusion process.",
            )  # fmt: skip
    shared = _same_encoders(models)
    parts, used, left_out = [], {}, {}
    for k, part in enumerate(models):
        kept = [n for n in part.tensors.names() if not (shared and k and n.startswith("shared."))]
        parts.append(RenamedSource(part.tensors, {_merged_name(n, k, shared): n for n in kept}))
        for key, names in part.used.items():
            of_network = [_merged_name(n, k, shared) for n in names if not n.startswith("autoencoder/")]
            if of_network or k == 0:
                used[f"{k}:{key}"] = of_network or names
            else:
                left_out[f"{k}:{key}"] = "the first model's autoencoder is kept"
        left_out |= {f"{k}:{key}": why for key, why in part.left_out.items()}
    model = _merged_model([part.model for part in models], shared)
    return replace(
        first,
        description=replace(
            first.description, model=model, stages=StagesConfig(boundaries=tuple(map(float, boundaries)))
        ),
        tensors=JoinedSource(parts),
        used=used,
        left_out=left_out,
        assumed=[f"{k}: {text}" for k, part in enumerate(models) for text in part.assumed],
    )


def _merged_name(name: str, stage: int, shared: bool) -> str:
    if name.startswith("stages.0."):
        return _new(name, "stages.0.", f"stages.{stage}." if shared else f"stages.{stage}.decoder.")
    return name if shared else _new(name, "shared.", f"stages.{stage}.encoder.")


def _same_encoders(models: Sequence[ModelWeights]) -> bool:
    first, *others = (m.tensors for m in models)
    names = [n for n in first.names() if n.startswith("shared.")]
    return all(
        n in other and other.meta(n).shape == first.meta(n).shape and torch.equal(other.read(n), first.read(n))
        for other in others
        for n in names
    )


def _alike(model: ModelConfig, other: ModelConfig) -> bool:
    fields = {f.name for f in dataclasses.fields(other)} - set(other.per_stage)
    return (
        type(model) is type(other)
        and model.num_stages == 1
        and all(getattr(model, name) == getattr(other, name) for name in fields)
    )


def _merged_model(models: Sequence[ModelConfig], shared: bool) -> ModelConfig:
    first = models[0]
    widths = tuple(m.encoder_width(0) for m in models)
    encoders = widths[0] if len(set(widths)) == 1 else widths
    return first.of_decoders([(m, 0) for m in models], encoder_channels=encoders, share_encoder=shared)


def model_of_stages(model: ModelConfig, stages: Sequence[int]) -> ModelConfig:
    """The configuration with these stages alone; a single one shares its encoder with nobody, whatever it was."""
    one = len(stages) == 1
    encoders = model.encoder_width(stages[0]) if one else model.encoder_channels
    parts = [(model, k) for k in stages]
    return model.of_decoders(parts, encoder_channels=encoders, share_encoder=one or model.share_encoder)


def _new(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old)
