"""Family `separate`: whole networks of any architectures as the stages of one model.

The paper's separate system, `share_encoder: false`, has networks that differ in nothing but widths. Here every stage
has a complete `model` section of its own, so that networks which exist already can be trained together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from msdiff_dist.config import Variant
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.families import FAMILIES, Family
from msdiff_dist.models.unet_config import DownBlock, UNetConfig, UpBlock

_COMMON = ("in_channels", "out_channels", "num_classes", "context_channels", "augment_labels")


@dataclass(frozen=True, kw_only=True)
class SeparateConfig(UNetConfig):
    """Whole networks as stages: each stage has a U-Net of its own, of any family and size.

    The networks must have the inputs and outputs of one model: the same channels, classes, width of the context and
    length of the augmentation's description. All else may differ.
    """

    family: Literal["separate"] = "separate"
    """U-Net family."""
    networks: tuple[Annotated[UNetConfig, Variant(FAMILIES, "family", default="ldm")], ...]
    """The network of each stage, stage 0 (nearest the data) first: for each a section like `model`, of one stage."""

    # What the networks have in common, and one entry for each: not fields of a recipe.
    encoder_channels: int | tuple[int, ...] = field(init=False)
    decoder_channels: tuple[int, ...] = field(init=False)
    channel_mult: tuple[int, ...] = field(init=False)
    num_res_blocks: int = field(init=False)
    attention_downsamples: tuple[int, ...] = field(init=False)
    in_channels: int = field(init=False)
    out_channels: int = field(init=False)
    num_classes: int | None = field(init=False)
    dropout: float = field(init=False)
    norm_groups: int = field(init=False)
    share_encoder: bool = field(init=False)

    def __post_init__(self) -> None:
        self._check_networks()
        deepest = max(self.networks, key=lambda network: len(network.channel_mult))
        derived: dict[str, Any] = {name: getattr(deepest, name) for name in self._derived()}
        derived |= {
            "encoder_channels": tuple(network.encoder_width(0) for network in self.networks),
            "decoder_channels": tuple(network.decoder_channels[0] for network in self.networks),
            "share_encoder": False,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def _derived(cls) -> list[str]:
        """Names of the fields that are not a recipe's."""
        return [name for name, f in cls.__dataclass_fields__.items() if not f.init]

    @property
    def context_channels(self) -> int | None:
        return self.networks[0].context_channels

    @property
    def augment_labels(self) -> int:
        return self.networks[0].augment_labels

    def place_of(self, name: str) -> str:
        return "networks" if name in ("encoder_channels", "decoder_channels") else f"networks[0].{name}"

    def emb_channels(self, stage: int) -> int:
        return self.networks[stage].emb_channels(0)

    def down_blocks(self, stage: int) -> list[DownBlock]:
        return self.networks[stage].down_blocks(0)

    def up_blocks(self, stage: int) -> list[UpBlock]:
        return self.networks[stage].up_blocks(0)

    def of_stages(self, stages: Sequence[int]) -> UNetConfig:
        chosen = [replace(self.networks[k], attention_backend=self.attention_backend) for k in stages]
        return chosen[0] if len(chosen) == 1 else replace(self, networks=tuple(self.networks[k] for k in stages))

    def of_widths(self, widths: Sequence[int], attention: Sequence[Sequence[int]] | None = None) -> Self:
        raise ConfigError("--widths", list(widths), "stages that are whole networks keep their widths", "Extract one.")

    def unified(self) -> UNetConfig:  # type: ignore[override]
        return self.of_stages([0])

    def small(self, width: int, context_width: int) -> Self:
        widest = max(network.encoder_width(0) for network in self.networks)

        def scaled(channels: int) -> int:
            return max(4, 4 * round(width * channels / widest / 4))

        networks = (network.small(scaled(network.encoder_width(0)), context_width) for network in self.networks)
        return replace(self, networks=tuple(networks))

    def check_latent_size(self, height: int, width: int) -> None:
        for k, network in enumerate(self.networks):
            try:
                network.check_latent_size(height, width)
            except ConfigError as e:
                raise ConfigError(f"networks[{k}].{e.field}", e.value, e.problem, e.remedy) from None

    def _check_networks(self) -> None:
        if not self.networks:
            raise ConfigError("networks", [], "are none", "Give one network for each stage.")
        for k, network in enumerate(self.networks):
            where = f"networks[{k}]"
            if network.num_stages > 1 or isinstance(network, SeparateConfig):
                raise ConfigError(
                    where, network.num_stages, "has stages of its own", "Give the section of a unified network."
                )
            if network.attention_backend != "auto":
                raise ConfigError(
                    f"{where}.attention_backend", network.attention_backend, "is chosen for all networks at once",
                    "Remove it, and set model.attention_backend.",
                )  # fmt: skip
            for name in _COMMON:
                here, first = getattr(network, name), getattr(self.networks[0], name)
                if here != first:
                    shown = "context_dim" if name == "context_channels" else name
                    raise ConfigError(
                        f"{where}.{shown}", here, f"is {first} in the first network, and stages are one model",
                        "Take networks with the same inputs and outputs.",
                    )  # fmt: skip


# No encoder or decoder of its own: a stage is built by the family of its network.
FAMILIES.add("separate", Family(config=SeparateConfig))
