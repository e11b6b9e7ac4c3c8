"""The `data` section of a recipe: which shards to read, and what their samples look like."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from msdiff_dist.bounds import check_between, check_bytes, check_name
from msdiff_dist.data.access import Access
from msdiff_dist.data.image_files import ImageReading
from msdiff_dist.errors import ConfigError

_BOUNDS = {
    "lanes": (1, 2**20),
    "workers": (0, 1024),
    "shuffle": (0, 2**40),
    "retries": (0, 1000),
    "max_bad": (0, 2**63 - 1),
    "num_classes": (1, 2**31),
    "image_size": (1, 2**31),
}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several mixed sources: its shards and its weight."""

    shards: str | tuple[str, ...]
    """WebDataset shards of this source, as in `data.shards`."""
    weight: float = 1.0
    """Relative share of the samples that this source gives."""

    def __post_init__(self) -> None:
        _check_shards(self.shards)
        if not 0 < self.weight < float("inf"):
            raise ConfigError("weight", self.weight, "must be above 0", "Remove the source if it is not wanted.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The stream of training samples."""

    shards: str | tuple[str, ...] = ()
    """WebDataset shards: a folder, a path with braces (`{00000..00007}`) or globs, an address (`https://...`,
    `s3://...`), `pipe:command`, a text file of such (`@list.txt`), or a list of such. An `index.json` beside them,
    which `msdiff data` writes, says how many samples they hold; shards without one are counted first, which for remote
    ones takes about as long as reading them."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sets of shards, mixed by weight, instead of `shards`. Each has its own order and its own epochs."""
    allow_pipe: bool = False
    """Whether `pipe:` addresses may run the shell commands they name."""
    retries: int = 5
    """How often a failed connection is tried again; the wait before each further try doubles."""
    max_bad: int = 0
    """How many corrupt shards and samples are skipped before the command fails; each counts once per command. A corrupt
    sample is replaced by the next good one of its lane. A shard that is cut short repeats its samples from the first
    on."""
    accept_changes: bool = False
    """Whether to resume although shards were added, removed or altered since the checkpoint."""
    lanes: int = 8
    """Number of lanes, to which whole shards are dealt; a multiple of the number of ranks. It decides the order of
    samples, so it is fixed for a run. Reading is spread over all lanes only if there are at least as many shards."""
    workers: int = 0
    """Loader processes per rank; 0 reads in the training process. It does not change what is read."""
    shuffle: int = 2048
    """Samples in the window inside which a lane shuffles; 0 or 1 keeps the order of the shards."""
    kind: Literal["image", "latent", "synthetic"] = "image"
    """What the shards hold: `image` (encoded images) or `latent` (.npy arrays); `synthetic` needs no shards and draws
    random numbers."""
    image_size: int | None = None
    """Height and width of the images, in pixels."""
    channels: int = 3
    """Channels of the images: 1 (grey) or 3 (RGB)."""
    resize: Literal["cover", "pad"] | None = None
    """How images of other sizes become squares of `image_size`: `cover` scales the shorter side to it and crops the
    longer, `pad` scales the longer side and puts black on both sides of the shorter. null: such images are refused."""
    crop: Literal["center", "random"] = "center"
    """Where `resize: cover` crops; `random` draws a place at every visit of the sample."""
    orientation: Literal["exif", "stored"] = "exif"
    """Turn images as their EXIF data says (`exif`), or take them as stored."""
    transparency: Literal["white", "black", "refuse"] = "white"
    """Colour put behind transparent pixels; `refuse`: an image with such pixels is an error."""
    animation: Literal["first", "refuse"] = "first"
    """Take the first frame of an animated image, or refuse it."""
    flip: bool = False
    """Mirror half of the images left to right; for latents, take the stored latent of the mirrored image."""
    num_classes: int | None = None
    """Number of classes: samples carry a label (`.cls`) in [0, num_classes). null: labels are not read."""
    captions: bool = False
    """Samples carry a caption (`.txt`)."""
    latent_shape: tuple[int, int, int] | None = None
    """Shape [C, H, W] of a latent."""
    latent_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Floating type of latents and contexts on their way to the network."""
    latent_moments: bool = False
    """Shards hold [mean, log variance] of the autoencoder's posterior, [2C, H, W], and each visit draws a new sample of
    it."""
    latent_field: str = "latent.npy"
    """File extension of latents inside the shards."""
    context_shape: tuple[int, int] | None = None
    """Shape [T, C] of a context embedding; all T tokens are attended to, padding too. null: contexts are not read."""
    context_field: str = "context.npy"
    """File extension of contexts inside the shards."""

    def __post_init__(self) -> None:
        for field, (least, most) in _BOUNDS.items():
            check_between(field, getattr(self, field), least, most)
        if self.shards:
            _check_shards(self.shards)
        for field in ("latent_field", "context_field"):
            check_name(field, getattr(self, field), "a member of a shard")
        if self.crop == "random" and self.resize != "cover":
            raise ConfigError("crop", self.crop, "has no effect without `resize: cover`", "Set data.resize to `cover`.")
        if self.channels not in (1, 3):
            raise ConfigError("channels", self.channels, "must be 1 (grey) or 3 (RGB)", "Set it to 1 or 3.")
        if self.shards and self.sources:
            raise ConfigError("sources", len(self.sources), "cannot stand beside data.shards", "Remove one of the two.")
        if self.kind != "synthetic" and not (self.shards or self.sources):
            raise ConfigError("shards", self.shards, f"is required for kind {self.kind!r}", "Name a folder of shards.")
        for field in ("shards", "sources", "captions") if self.kind == "synthetic" else ():
            if getattr(self, field):
                raise ConfigError(field, getattr(self, field), "has no meaning for kind 'synthetic'", "Remove it.")
        if self.kind == "image":
            if self.image_size is None:
                raise ConfigError("image_size", None, "is required for kind 'image'", "Set it to the images' size.")
            for field in ("latent_shape", "latent_moments"):
                if getattr(self, field):
                    raise ConfigError(field, getattr(self, field), "has no meaning for kind 'image'", "Remove it.")
        else:
            if self.latent_shape is None:
                raise ConfigError("latent_shape", None, f"is required for kind {self.kind!r}", "Set it to [C, H, W].")
            if self.image_size is not None:
                raise ConfigError(
                    "image_size", self.image_size, f"has no meaning for kind {self.kind!r}", "Use data.latent_shape."
                )
            if self.resize is not None:
                raise ConfigError("resize", self.resize, f"has no meaning for kind {self.kind!r}", "Remove it.")
            if self.flip and self.kind == "synthetic":
                raise ConfigError("flip", True, "has no meaning for kind 'synthetic'", "Remove it.")
        for field in ("latent_shape", "context_shape"):
            shape = getattr(self, field)
            if shape is not None and min(shape) < 1:
                raise ConfigError(field, list(shape), "must have positive sizes", "Correct it.")
            check_bytes(field, list(shape or ()), 4 * math.prod(shape or (0,)), "one sample")
        if self.kind == "image":
            check_bytes("image_size", self.image_size, 4 * math.prod(self.x_shape), "one image")

    @property
    def mixed(self) -> tuple[SourceConfig, ...]:
        """The sources: `sources`, or `shards` as the only one; none for kind `synthetic`."""
        return self.sources or ((SourceConfig(shards=self.shards),) if self.shards else ())

    def validated_on(self, shards: str | tuple[str, ...]) -> DataConfig:
        """The same kind of samples, read from other shards and whole."""
        return replace(self, shards=shards, sources=(), max_bad=0)

    @property
    def access(self) -> Access:
        """The settings for opening shards."""
        return Access(self.retries, self.allow_pipe)

    @property
    def reading(self) -> ImageReading:
        """How image files are read."""
        return ImageReading(orientation=self.orientation, transparency=self.transparency, animation=self.animation)

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample that the loader yields."""
        if self.kind == "image":
            assert self.image_size is not None
            return (self.channels, self.image_size, self.image_size)
        assert self.latent_shape is not None
        return self.latent_shape

    @property
    def x_dtype(self) -> str:
        """Name of the torch dtype of every sample that the loader yields."""
        return "uint8" if self.kind == "image" else self.latent_dtype

    @property
    def sample_bytes(self) -> int:
        """Bytes of the tensors of one sample."""
        sizes = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
        context = math.prod(self.context_shape) * sizes[self.latent_dtype] if self.context_shape else 0
        label = 0 if self.num_classes is None else 8
        return math.prod(self.x_shape) * sizes[self.x_dtype] + context + label


def _check_shards(shards: str | tuple[str, ...]) -> None:
    if not shards or not all(pattern.strip() for pattern in ((shards,) if isinstance(shards, str) else shards)):
        raise ConfigError("shards", shards, "is empty", "Name a folder of shards.")
