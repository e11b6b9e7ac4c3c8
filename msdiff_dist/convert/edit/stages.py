"""Edits of a model's stages: extract one, grow several from a unified model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from msdiff_dist.convert.model_weights import FROZEN, ModelWeights, empty_model
from msdiff_dist.convert.tensor_sources import RenamedSource, TensorSource
from msdiff_dist.diffusion.config import StagesConfig, of_stage
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.growing import grown_from
from msdiff_dist.models.multistage_unet import build_parts


def extract_stage(weights: ModelWeights, stage: int) -> ModelWeights:
    """One stage with its encoder, as a unified model.

    Raises:
        ConfigError: the model has no such stage.
    """
    model = weights.model
    if not 0 <= stage < model.num_stages:
        raise ConfigError("--stage", stage, f"the model has stages 0 to {model.num_stages - 1}", "Choose one of them.")
    names = stage_names(weights, stage)
    renamed = {source: new for new, source in names.items()}
    # The report is about the source's keys: follow each through the new names.
    used, left_out = {}, dict(weights.left_out)
    for key, ours in weights.used.items():
        kept = [renamed.get(name, name) for name in ours if name in renamed or name.startswith(FROZEN)]
        if kept:
            used[key] = kept
        else:
            left_out[key] = f"of another stage than {stage}"
    return replace(
        weights,
        description=replace(
            weights.description,
            model=model.of_stages([stage]),
            stages=StagesConfig(),
            diffusion=of_stage(weights.description.diffusion, weights.description.stages, stage),
        ),
        tensors=RenamedSource(weights.tensors, names),
        used=used,
        left_out=left_out,
    )


def stage_names(weights: ModelWeights, stage: int) -> dict[str, str]:
    """For each tensor of a stage's unified model, its name in the model of all stages."""
    old = f"stages.{stage}."
    if weights.model.share_encoder:
        names = {k: k for k in weights.tensors.names() if k.startswith("shared.")}
        return names | {_replaced(k, old, "stages.0."): k for k in weights.tensors.names() if k.startswith(old)}
    names = {}  # every stage has an encoder of its own, which becomes the shared one of the single stage
    for k in weights.tensors.names():
        if k.startswith(f"{old}encoder."):
            names[_replaced(k, f"{old}encoder.", "shared.")] = k
        elif k.startswith(f"{old}decoder."):
            names[_replaced(k, f"{old}decoder.", "stages.0.")] = k
    return names


def grow(
    weights: ModelWeights,
    boundaries: Sequence[float],
    decoder_channels: Sequence[int],
    decoder_attention: Sequence[Sequence[int]] | None = None,
) -> ModelWeights:
    """A multi-stage model from a unified one: the same encoder, and a copy of the decoder for each stage.

    A decoder of the unified model's width and attention is the same bit by bit. Another one is made by the family's
    `resized_decoder`.

    Args:
        boundaries: inner stage boundaries, in the process's own time.
        decoder_channels: width of each decoder, stage 0 first.
        decoder_attention: downsampling factors with attention for each decoder; None keeps the unified model's.

    Raises:
        ConfigError: the stages do not make a model, or the family's decoders cannot change their width.
    """
    old = weights.model
    if old.num_stages > 1:
        raise ConfigError(
            "SRC", old.num_stages, "stages are more than one", "Extract one first: msdiff extract SRC DST --stage K."
        )
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
    description.partition()  # raises if the boundaries do not divide the process's time
    tensors = GrownSource(weights, model)
    return replace(
        weights,
        description=description,
        tensors=tensors,
        used={k: [n for name in names for n in tensors.copies(name)] for k, names in weights.used.items()},
    )


class GrownSource(TensorSource):
    """The tensors of a multi-stage model whose decoders are made from a unified model's one.

    Args:
        unified: the model to start from.
        model: the configuration of the multi-stage model.
    """

    def __init__(self, unified: ModelWeights, model: ModelConfig) -> None:
        self._old, self._model = unified.tensors, model
        self.files, self.metadata = unified.tensors.files, unified.tensors.metadata
        # For each new tensor, the old tensor and its change of size; None for one that the old model does not have.
        self._from = grown_from(unified.model, model)
        self._meta = dict(empty_model(model).named_parameters())
        assert self._meta.keys() == self._from.keys()

    def copies(self, name: str) -> list[str]:
        """Names of the new tensors that come from the old tensor `name`; the autoencoder's tensors keep their names."""
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
        # A new tensor has the values of a newly made decoder, in which attention changes nothing at first.
        _, stage, name = key.split(".", 2)
        out: Tensor = build_parts(self._model, [int(stage)])[1][int(stage)].state_dict()[name]
        return out


def _replaced(key: str, old: str, new: str) -> str:
    """`key`, which begins with `old`, with `new` in its place."""
    return new + key.removeprefix(old)
