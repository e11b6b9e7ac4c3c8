"""What a recipe says about its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msdiff_dist.data.access import Access
from msdiff_dist.errors import ConfigError


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources that are mixed: its shards, and its weight beside the others'."""

    shards: str | tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.shards:
            raise ConfigError("shards", self.shards, "is empty", "Name a folder of shards.")
        if not 0 < self.weight < float("inf"):
            raise ConfigError("weight", self.weight, "must be above 0", "Remove the source if it is not wanted.")


@dataclass(frozen=True)
class DataConfig:
    """The stream of training samples.

    Attributes:
        shards: WebDataset shards: a folder, a path with braces (`{00000..00007}`) or globs, an address (`https://...`,
            `s3://...`), `pipe:command`, a text file of such (`@list.txt`), or a list of such. An `index.json` beside
            them (`msdiff data` writes it) tells how many samples they hold; shards without one are counted first,
            which for remote ones takes about as long as reading them.
        sources: instead of `shards`: several, mixed by weight. Each is shuffled and begins again by itself.
        allow_pipe: let `pipe:` run commands of this recipe.
        retries: further tries after a connection breaks, with waits that double.
        accept_changes: go on with a run although shards were added, removed or altered since its checkpoint.
        max_bad: damaged shards and samples to leave out, each counted once from the start of the command, before giving
            up. The place of a damaged sample is filled with the next good one of its lane; the rest of a torn shard
            with its samples from the first on.
        lanes: disjoint parts of the stream; a multiple of the world size. Part of the sample order, so fixed for a run.
            A lane reads whole shards, so reading is spread over all lanes only if there are at least as many shards.
        workers: loader processes per rank; 0 reads in the training process. Does not change what is read.
        shuffle: samples in a lane's shuffle window; 0 or 1 keeps the order inside the shards.
        kind: `image` (encoded pictures), `latent` (.npy arrays), or `synthetic` (random numbers, no files).
        image_size: height and width of the pictures.
        channels: 1 (grey) or 3 (RGB).
        flip: mirror half of the pictures left to right; of latents, take the one stored of the mirrored picture.
        num_classes: samples carry a class label (`.cls`) in [0, num_classes); None: labels are not read.
        captions: samples carry a caption (`.txt`).
        latent_shape: (C, H, W) of a latent.
        latent_dtype: floating type in which latents and contexts are handed on.
        latent_moments: shards hold [mean, log variance], (2C, H, W), and each visit draws a new posterior sample.
        latent_field: file extension of latents.
        context_shape: (T, C) of a context embedding, attended to in full, padding too; None: contexts are not read.
        context_field: file extension of contexts.
    """

    shards: str | tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()
    allow_pipe: bool = False
    retries: int = 5
    max_bad: int = 0
    accept_changes: bool = False
    lanes: int = 8
    workers: int = 0
    shuffle: int = 2048
    kind: Literal["image", "latent", "synthetic"] = "image"
    image_size: int | None = None
    channels: int = 3
    flip: bool = False
    num_classes: int | None = None
    captions: bool = False
    latent_shape: tuple[int, int, int] | None = None
    latent_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    latent_moments: bool = False
    latent_field: str = "latent.npy"
    context_shape: tuple[int, int] | None = None
    context_field: str = "context.npy"

    def __post_init__(self) -> None:
        _at_least("lanes", self.lanes, 1)
        _at_least("workers", self.workers, 0)
        _at_least("shuffle", self.shuffle, 0)
        _at_least("retries", self.retries, 0)
        _at_least("max_bad", self.max_bad, 0)
        if self.num_classes is not None:
            _at_least("num_classes", self.num_classes, 1)
        if self.channels not in (1, 3):
            raise ConfigError("channels", self.channels, "must be 1 (grey) or 3 (RGB)", "Set it to 1 or 3.")
        if self.shards and self.sources:
            raise ConfigError("sources", len(self.sources), "stands instead of shards", "Give one of them.")
        if self.kind != "synthetic" and not (self.shards or self.sources):
            raise ConfigError("shards", self.shards, f"is required for kind {self.kind!r}", "Name a folder of shards.")
        for field in ("shards", "sources", "captions") if self.kind == "synthetic" else ():
            if getattr(self, field):
                raise ConfigError(field, getattr(self, field), "has no meaning for kind 'synthetic'", "Remove it.")
        if self.kind == "image":
            if self.image_size is None:
                raise ConfigError("image_size", None, "is required for kind 'image'", "Give the pictures' size.")
            _at_least("image_size", self.image_size, 1)
            for field in ("latent_shape", "latent_moments"):
                if getattr(self, field):
                    raise ConfigError(field, getattr(self, field), "has no meaning for kind 'image'", "Remove it.")
        else:
            if self.latent_shape is None:
                raise ConfigError("latent_shape", None, f"is required for kind {self.kind!r}", "Give it as [C, H, W].")
            if self.image_size is not None:
                raise ConfigError(
                    "image_size", self.image_size, f"has no meaning for kind {self.kind!r}", "Use data.latent_shape."
                )
            if self.flip and self.kind == "synthetic":
                raise ConfigError("flip", True, "has no meaning for kind 'synthetic'", "Remove it.")
        for field in ("latent_shape", "context_shape"):
            shape = getattr(self, field)
            if shape is not None and min(shape) < 1:
                raise ConfigError(field, list(shape), "must have positive sizes", "Correct it.")

    @property
    def mixed(self) -> tuple[SourceConfig, ...]:
        """The sources: `sources`, or `shards` as the only one; none for kind `synthetic`."""
        return self.sources or ((SourceConfig(self.shards),) if self.shards else ())

    @property
    def access(self) -> Access:
        """How shards may be reached."""
        return Access(self.retries, self.allow_pipe)

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample as the loader delivers it."""
        if self.kind == "image":
            assert self.image_size is not None
            return (self.channels, self.image_size, self.image_size)
        assert self.latent_shape is not None
        return self.latent_shape

    @property
    def x_dtype(self) -> str:
        """Name of the torch type of every sample as the loader delivers it."""
        return "uint8" if self.kind == "image" else self.latent_dtype


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(field, value, f"must be at least {least}", f"Set it to {least} or more.")
