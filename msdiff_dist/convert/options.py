"""What a conversion needs to be told, beyond what the files say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msdiff_dist.convert.formats.ldm_architecture import HeadsRule
from msdiff_dist.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Answers to questions that a checkpoint leaves open; None takes the published models' answer, and says so.

    Args:
        weights: `ema` or `raw` of a checkpoint that holds both; `auto` is the average where there is one.
        config: the original program's YAML, which then decides and is compared with the tensors.
        stage: convert this stage alone, as a unified model.
        num_heads, head_channels: attention heads by number, or by channels each.
        boundaries: inner stage boundaries.
        norm_groups: the most groups of a norm, in families whose shapes do not tell.
        prediction_type, scale_factor: what the network predicts, and the factor on latents.
        null_class: the table of classes ends in the row of the dropped class; without, a row of zeros is added (or
            the last one dropped, on the way out).
    """

    weights: Literal["auto", "ema", "raw"] = "auto"
    config: Path | None = None
    stage: int | None = None
    num_heads: int | None = None
    head_channels: int | None = None
    norm_groups: int | None = None
    boundaries: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    scale_factor: float | None = None
    null_class: bool = True

    def __post_init__(self) -> None:
        if self.num_heads is not None and self.head_channels is not None:
            raise ConfigError("--heads", self.num_heads, "stands beside --head-channels", "Give one of the two.")

    def heads(self) -> HeadsRule | None:
        """The heads as asked for, or None."""
        if self.num_heads is None and self.head_channels is None:
            return None
        return HeadsRule(self.num_heads, self.head_channels, "as given on the command line")


def given_boundaries(
    given: tuple[float, ...] | None, num_stages: int, paper: tuple[float, ...]
) -> tuple[tuple[float, ...], list[str]]:
    """The inner stage boundaries, and what was assumed for them.

    Args:
        given: by the command line or a file. paper: the paper's for models of this kind.

    Raises:
        CheckpointError: nothing says them.
    """
    if num_stages == 1:
        return (), []
    if given is None and num_stages == len(paper) + 1:
        said = " and ".join(f"{b:g}" for b in paper)
        return paper, [f"stage boundaries: {said}, the paper's; give --boundaries otherwise"]
    if given is None or len(given) != num_stages - 1:
        raise CheckpointError(
            "--boundaries", given, f"the checkpoint has {num_stages} stages",
            f"Give their {num_stages - 1} inner boundaries, as in --boundaries {','.join(f'{b:g}' for b in paper)}.",
        )  # fmt: skip
    return given, []


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """`256,192,128` as whole numbers.

    Raises:
        ConfigError: it is something else, naming the option.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise ConfigError(option, text, "is no list of whole numbers", "Write it as 256,192,128.") from None


def parse_boundaries(text: str | None) -> tuple[float, ...] | None:
    """`442,631` as numbers.

    Raises:
        ConfigError: it is something else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError("--boundaries", text, "is no list of numbers", "Write it as 442,631.") from None
