"""Configuration of families `ddpmpp`, `ncsnpp` and `ncsnpp_vp`: fields, variants and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msdiff_dist.bounds import check_between
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.unet_config import UNetConfig

SongFamily = Literal["ddpmpp", "ncsnpp", "ncsnpp_vp"]


@dataclass(frozen=True, kw_only=True)
class SongVariant:
    """What distinguishes the three families.

    Args:
        embedding: kind of time embedding: sines of fixed ("positional") or of random ("fourier") frequencies.
        resample_filter: taps of the filter with which resolution is halved and doubled, applied along each axis.
        input_pyramid: each level of the encoder also reads the input image, halved to that level's resolution.
        shared_middle: the blocks at the lowest resolution belong to the encoder; otherwise each decoder has its own.
    """

    embedding: Literal["positional", "fourier"]
    resample_filter: tuple[int, ...]
    input_pyramid: bool
    shared_middle: bool


VARIANTS: dict[SongFamily, SongVariant] = {
    "ddpmpp": SongVariant(embedding="positional", resample_filter=(1, 1), input_pyramid=False, shared_middle=False),
    "ncsnpp": SongVariant(embedding="fourier", resample_filter=(1, 3, 3, 1), input_pyramid=True, shared_middle=False),
    "ncsnpp_vp": SongVariant(
        embedding="positional", resample_filter=(1, 3, 3, 1), input_pyramid=True, shared_middle=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class SongConfig(UNetConfig):
    """The U-Net of score-based diffusion (2011.13456), as EDM builds it (2206.00364), with a decoder per stage."""

    family: SongFamily = "ddpmpp"
    """U-Net family: `ddpmpp` and `ncsnpp` are EDM's two; `ncsnpp_vp` is NCSN++ as it is trained on the VP-SDE."""
    augment_labels: int = 0
    """Length of the vector that describes how a sample was augmented (9 for EDM's augmentation); 0: no such input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("augment_labels", self.augment_labels, 0, 1000)
        self._check_norm_groups()

    @property
    def variant(self) -> SongVariant:
        return VARIANTS[self.family]

    def groups(self, channels: int) -> int:
        """Number of groups of a GroupNorm over `channels`: at least four channels are in each."""
        return min(self.norm_groups, channels // 4)

    def _check_norm_groups(self) -> None:
        # The number of groups depends on the width, so inputs of blocks, which are sums of widths, are checked as well.
        inputs = [(up.in_channels, f"decoder {k}") for k in range(self.num_stages) for up in self.up_blocks(k)]
        widths = [*self._block_widths(), *inputs]
        for channels, place in widths:
            if channels < 4:
                field = "encoder_channels" if place == "the encoder" else "decoder_channels"
                problem = f"{place} is {channels} channels wide, and the groups of a GroupNorm have at least 4"
                raise ConfigError(field, getattr(self, field), problem, "Use widths of 4 or more.")
            if channels % self.groups(channels):
                candidates = range(min(self.norm_groups, max(c // 4 for c, _ in widths)), 0, -1)
                fitting = next(g for g in candidates if all(c % min(g, c // 4) == 0 for c, _ in widths))
                raise ConfigError(
                    "norm_groups",
                    self.norm_groups,
                    f"does not divide the {channels} channels that a GroupNorm of {place} normalises",
                    f"Set norm_groups to {fitting}, or use other widths.",
                )
