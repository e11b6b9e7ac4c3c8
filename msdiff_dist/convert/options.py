"""The user's choices in a conversion: answers to what the files do not say, and which weights to take."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from msdiff_dist.bounds import check_between, check_number
from msdiff_dist.convert.networks import Wanted
from msdiff_dist.errors import CheckpointError, ConfigError

OptionName = Literal[
    "weights", "key", "config", "num_heads", "head_channels", "norm_groups", "boundaries", "prediction_type",
    "scale_factor", "null_class", "model_ema",
]  # fmt: skip
"""An option that a format may take. `stage` is none of them: it applies to every format that is read."""

FLAGS: dict[OptionName, str] = {
    "weights": "--weights",
    "key": "--key",
    "config": "--config",
    "num_heads": "--heads",
    "head_channels": "--head-channels",
    "norm_groups": "--norm-groups",
    "boundaries": "--boundaries",
    "prediction_type": "--prediction",
    "scale_factor": "--scale-factor",
    "null_class": "--no-null-class",
    "model_ema": "--no-model-ema",
}
"""What each option is called on the command line."""


@dataclass(frozen=True)
class HeadsRule:
    """Attention heads, which no shape shows: a number of heads, or a number of channels for each head."""

    num_heads: int | None
    num_head_channels: int | None
    why: str
    """The number and its origin, for messages and the report."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Answers to questions that a checkpoint leaves open.

    None means that the reader takes the published models' answer, and lists it in the report as an assumption.

    Args:
        weights: `ema` (averaged) or `raw` (last) weights of a checkpoint that holds both; `auto` takes the averaged
            ones where there are any.
        config: the original program's configuration file. Its values are used, and compared with the tensors.
        stage: the one stage to convert, as a unified model; None converts all.
        num_heads: number of attention heads, which no tensor's shape shows.
        head_channels: channels of each attention head; excludes `num_heads`.
        norm_groups: the largest number of groups of a norm, which no tensor's shape shows.
        boundaries: inner stage boundaries, in the process's own time.
        prediction_type: what the network predicts.
        scale_factor: the factor that latents are multiplied by before they enter the network.
        null_class: whether the other format's table of classes ends in the row of the dropped class. If not, a row of
            zeros is added on reading, and the last row removed on writing.
        key: place of the network in a file that holds several, such as `state_dict.ema`.
        model_ema: whether LDM's files are written with the weights a second time, as averages.
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
    key: str | None = None
    model_ema: bool = True

    def __post_init__(self) -> None:
        if self.num_heads is not None and self.head_channels is not None:
            raise ConfigError("--heads", self.num_heads, "stands beside --head-channels", "Give one of the two.")
        for option, count in (
            ("--heads", self.num_heads), ("--head-channels", self.head_channels), ("--norm-groups", self.norm_groups),
        ):  # fmt: skip
            check_between(option, count, 1, 2**31)
        check_between("--stage", self.stage, 0, 2**31)
        check_between("--scale-factor", self.scale_factor, 1e-6, 1e6)

    def given(self) -> dict[OptionName, Any]:
        """The options of formats that differ from their defaults, with their values."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in changed.items() if name in FLAGS}

    def wanted(self, format_name: str) -> Wanted:
        """Which network of a file to take, of the given format."""
        return Wanted(weights=self.weights, key=self.key, format=format_name)

    def heads(self) -> HeadsRule | None:
        """The rule for attention heads that `num_heads` or `head_channels` gives; None where neither is given."""
        if self.num_heads is None and self.head_channels is None:
            return None
        return HeadsRule(self.num_heads, self.head_channels, "as given on the command line")


def refuse_unused(options: ConvertOptions, used: tuple[OptionName, ...], what: str) -> None:
    """Raise if an option of a reader is given that `what`, which was found in a container, does not use.

    Raises:
        ConfigError: naming the option.
    """
    of_writers = ("null_class", "model_ema")
    for name, value in options.given().items():
        if name not in (*used, *of_writers):
            taken = ", ".join(FLAGS[n] for n in used if n in FLAGS)
            raise ConfigError(FLAGS[name], value, f"is not used for {what}", f"Remove it; {taken} can be given.")


def given_boundaries(
    given: tuple[float, ...] | None, num_stages: int, paper: tuple[float, ...]
) -> tuple[tuple[float, ...], list[str]]:
    """The inner stage boundaries, and the lines of the report about what was assumed for them.

    Args:
        given: boundaries from the command line or a configuration file.
        paper: the published boundaries for models of this kind, assumed where the number of stages fits them.

    Raises:
        CheckpointError: none are given and the number of stages is not the paper's, or their number does not fit.
    """
    if num_stages == 1:
        if given:
            raise CheckpointError(
                "--boundaries", given, "the checkpoint has one stage",
                "Remove --boundaries, or name a source for each stage, and the result last.",
            )  # fmt: skip
        return (), []
    if given is None and num_stages == len(paper) + 1:
        listed = " and ".join(f"{b:g}" for b in paper)
        return paper, [f"stage boundaries: {listed}, the paper's; give --boundaries otherwise"]
    if given is None or len(given) != num_stages - 1:
        raise CheckpointError(
            "--boundaries", given, f"the checkpoint has {num_stages} stages",
            f"Give their {num_stages - 1} inner boundaries, as in --boundaries {','.join(f'{b:g}' for b in paper)}.",
        )  # fmt: skip
    return given, []


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse text such as `256,192,128`; empty text is an empty tuple.

    Raises:
        ConfigError: it is no list of whole numbers; the error names `option`.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise ConfigError(option, text, "is no list of whole numbers", "Write it as 256,192,128.") from None


def parse_boundaries(text: str | None) -> tuple[float, ...] | None:
    """Parse the value of --boundaries, such as `442,631`; None stays None.

    Raises:
        ConfigError: it is no list of numbers.
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError("--boundaries", text, "is no list of numbers", "Write it as 442,631.") from None
    for number in numbers:
        check_number("--boundaries", number)
    return numbers
