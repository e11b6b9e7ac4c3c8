"""What the formats of the DDPM++ and NCSN++ families share (the EDM and score_sde codes)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.models.song.config import SongConfig


def groups_of(options: ConvertOptions) -> tuple[int, list[str]]:
    """The largest number of groups of a norm, which no shape shows, and the lines of the report on what was assumed."""
    if options.norm_groups is not None:
        return options.norm_groups, []
    return 16, ["groups of the norms: at most 16, as in the multi-stage code; give --norm-groups otherwise"]


@contextmanager
def recognising(format_name: str, network: str) -> Iterator[None]:
    """Raise a clear error if the code inside, which infers a configuration from keys, does not find what it looks for.

    Args:
        format_name: the name of the format, for messages.
        network: what the keys should be of, for messages.

    Raises:
        CheckpointError: a key is missing, or the shapes make no network.
    """
    try:
        yield
    except (KeyError, StopIteration, IndexError) as e:
        raise CheckpointError(
            f"{format_name} keys", str(e), f"is missing: this is no {network}", "Convert another checkpoint."
        ) from None
    except ConfigError as e:
        raise CheckpointError(
            e.field, e.value, f"{e.problem}: this network cannot be built", "Give the right --norm-groups."
        ) from None


def checked_song(weights: ModelWeights, family: str, process: str) -> SongConfig:
    """The model's configuration, if the program to convert to has its family and its process.

    Args:
        family: the only family that the program has.
        process: the only diffusion process that it has.

    Raises:
        CheckpointError: the model is of another family or process, or its stages share no encoder.
    """
    model = weights.model
    if not model.share_encoder:
        raise CheckpointError(
            "share_encoder", False, "every stage has an encoder of its own", "Convert one stage with --stage."
        )
    if not isinstance(model, SongConfig) or model.family != family:
        raise CheckpointError("model.family", model.family, f"the other code has {family}", "Use another --to.")
    if weights.description.diffusion.process != process:
        found = weights.description.diffusion.process
        raise CheckpointError("diffusion.process", found, f"the other code has {process}", "Use another --to.")
    return model
