"""What the conversions of the DDPM++ and NCSN++ families share."""

from __future__ import annotations

from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import CheckpointError
from msdiff_dist.models.song.config import SongConfig


def groups_of(options: ConvertOptions) -> tuple[int, list[str]]:
    """Groups of the norms, which no shape tells, and what was assumed for them."""
    if options.norm_groups is not None:
        return options.norm_groups, []
    return 16, ["groups of the norms: at most 16, as in the multi-stage code; give --norm-groups otherwise"]


def given_boundaries(
    options: ConvertOptions, num_stages: int, paper: tuple[float, ...]
) -> tuple[tuple[float, ...], list[str]]:
    """The inner stage boundaries, and what was assumed for them.

    Raises:
        CheckpointError: nothing says them.
    """
    given = options.boundaries
    if num_stages == 1:
        return (), []
    if given is None and num_stages == len(paper) + 1:
        said = " and ".join(f"{b:g}" for b in paper)
        return paper, [f"stage boundaries: {said}, the paper's; give --boundaries otherwise"]
    if given is None or len(given) != num_stages - 1:
        raise CheckpointError(
            "--boundaries", given, f"the checkpoint has {num_stages} stages",
            f"Give their {num_stages - 1} inner boundaries, separated by commas.",
        )  # fmt: skip
    return given, []


def checked_song(weights: ModelWeights, family: str, process: str) -> SongConfig:
    """The model, if the other program has its family and its process.

    Raises:
        CheckpointError: it has not.
    """
    model = weights.model
    if not isinstance(model, SongConfig) or model.family != family:
        raise CheckpointError("model.family", model.family, f"the other code has {family}", "Use another --to.")
    if weights.description.diffusion.process != process:
        found = weights.description.diffusion.process
        raise CheckpointError("diffusion.process", found, f"the other code has {process}", "Use another --to.")
    if not model.share_encoder:
        raise CheckpointError(
            "share_encoder", False, "every stage has an encoder of its own", "Convert one stage with --stage."
        )
    return model
