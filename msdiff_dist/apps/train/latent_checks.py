"""Checks that shards of latents fit the recipe: the networks that encoded them, the scale and the shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from msdiff_dist.data.access import beside
from msdiff_dist.data.make.manifest import NULL_CONTEXT, Manifest, load_null_context
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.text_encoder import open_text_encoder
from msdiff_dist.recipe import Recipe


def check_latents(recipe: Recipe, manifests: Mapping[str, Manifest]) -> Tensor | None:
    """Compare the manifests beside the shards with the recipe. Shards without a manifest are not checked.

    Args:
        manifests: manifests by address.

    Returns:
        The context [T, D] that stands for "no caption": the embedding of the empty caption if the recipe has a
        text_encoder, else None, which means zeros.

    Raises:
        DataError: a number or shape differs, or the embedding of the empty caption is missing.
        ConfigError: the recipe's networks are not those that encoded the shards, or cannot be loaded.
    """
    null_context, found = None, list(manifests.items())
    for _, manifest in found:
        _check_numbers(recipe, manifest)
    if found:
        own, known = recipe.autoencoder, [(at, m.autoencoder.identity, m.autoencoder.name) for at, m in found]
        field, name = ("autoencoder.path", own.path) if own.path else ("autoencoder.kind", own.kind)
        _check_identity(field, name, LatentCodec(own, True, torch.device("cpu")).identity, known)
    if recipe.text_encoder and recipe.data.context_shape and recipe.data.kind == "latent":
        if not found or any(m.text_encoder is None for _, m in found):
            raise DataError(
                "data.shards", recipe.data.shards, "have no manifest with the embedding of the empty caption",
                "Encode them with `msdiff data encode`, or remove text_encoder.",
            )  # fmt: skip
        identity = open_text_encoder(recipe.text_encoder, torch.device("cpu")).identity
        known = [(at, m.text_encoder.identity, m.text_encoder.name) for at, m in found if m.text_encoder]
        _check_identity("text_encoder.name", recipe.text_encoder.name, identity, known)
        at, manifest = found[0]
        null_context = load_null_context(str(beside(at, NULL_CONTEXT)), manifest, recipe.data.access)
    return null_context


def _check_numbers(recipe: Recipe, manifest: Manifest) -> None:
    data = recipe.data
    for field, wanted, stored in (
        ("data.latent_shape", data.latent_shape, manifest.shape),
        ("data.latent_moments", data.latent_moments, manifest.moments),
        ("data.context_shape", data.context_shape, manifest.context_shape if data.context_shape else None),
        ("data.flip", data.flip, manifest.flip and data.flip),
    ):
        if wanted != stored:
            raise DataError(field, wanted, f"the manifest of the latents says {stored}", "Correct it, or encode again.")
    scale = recipe.autoencoder.scale_factor
    if not math.isclose(scale, manifest.scale_factor, rel_tol=1e-6):
        raise DataError(
            "autoencoder.scale_factor", scale, f"the manifest of the latents says {manifest.scale_factor}",
            f"Set it to {manifest.scale_factor}, or encode again.",
        )  # fmt: skip


def _check_identity(field: str, name: str, identity: str, stored: list[tuple[str, str, str]]) -> None:
    for address, other, other_name in stored:
        if other != identity:
            problem = f"is {identity}, but {address} was made by {other} ({other_name})"
            raise ConfigError(field, name, problem, "Name the one that made them, or encode again.")
