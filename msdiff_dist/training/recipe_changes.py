"""Which recipe fields may change when a run is resumed, and the run's record of those that did.

A change takes effect at the step from which the run goes on: that step's checkpoint is the last thing that the old
value had a part in. RUN/recipe_changes.jsonl has one line for each, and RUN/recipe.yaml what is in force now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.config import differences
from msdiff_dist.files.atomic import atomic_write

FILE = "recipe_changes.jsonl"


@dataclass(frozen=True)
class Fields:
    """Rows of the table in docs/guides/resume.md: fields (a name with a dot at its end is a whole section), and what a
    change of them does, or why they cannot change."""

    names: tuple[str, ...]
    about: str

    def cover(self, field: str) -> bool:
        """Whether a dotted field is one of them, or inside one."""
        return any(field == name or field.startswith(f"{name.removesuffix('.')}.") for name in self.names)


MAY_CHANGE: tuple[Fields, ...] = (
    Fields(
        ("optimizer.lr", "optimizer.lr_per", "optimizer.weight_decay", "optimizer.grad_clip"),
        "holds from the next step on; the moments stay",
    ),
    Fields(
        ("lr_schedule.", "train.steps"),
        "a step's rate follows from the schedule, `train.steps` and its number, counted from the run's start",
    ),
    Fields(
        ("ema.decay", "ema.halflife_images", "ema.warmup", "ema.warmup_ratio"),
        "holds for the updates to come; the average so far stays",
    ),
    Fields(("train.condition_dropout",), "holds from the next step on; which samples drop what is drawn anew"),
    Fields(
        ("grow.at", "stages.end"),
        "at which step stages change; a step that has passed is refused, and what has grown or ended stays so",
    ),
    Fields(
        ("diffusion.discrete.min_snr_gamma", "diffusion.vp.min_snr_gamma", "diffusion.edm.min_snr_gamma"),
        "weighs the losses to come; the smoothed loss, which `checkpoint.keep_best` compares, mixes both for about 100 "
        "steps",
    ),
    Fields(("diffusion.vp.t_end",), "where samplers stop; trains the same"),
    Fields(
        ("checkpoint.", "preview.", "metrics.", "evaluation.", "validation.every", "validation.weights",
         "ema.power.snapshot_every"),
        "what is saved, drawn and written; trains the same",
    ),
    Fields(
        ("train.global_batch_size", "train.micro_batch_size", "train.gradient_accumulation_steps"),
        "how the batch is given and divided; its size must stay",
    ),
    Fields(
        ("data.shards", "data.workers", "data.retries", "data.max_bad", "data.allow_pipe", "data.accept_changes"),
        "where the shards lie and how they are read; what they hold must stay, unless `data.accept_changes: true`",
    ),
    Fields(
        ("parallel.", "activation_checkpointing.", "model.attention_backend", "train.channels_last", "train.compile",
         "train.threads", "train.device", "train.timeout_s", "train.start_timeout_s", "encode.", "extensions"),
        "where and how the run computes, up to the rounding of sums",
    ),
)  # fmt: skip
"""Fields that may change when a run is resumed."""

MUST_STAY: tuple[Fields, ...] = (
    Fields(("model.", "stages.boundaries", "grow.width", "grow.attention"), "the weights belong to them"),
    Fields(
        (
            "diffusion.process",
            "diffusion.times.",
            "train.loss",
            "stages.sampling",
            "stages.objectives",
            "stages.batch",
            "stages.importance_weights",
            "stages.min_samples_per_step",
            "stages.adaptive.",
        ),
        "another objective, or other steps of the decoders, is another training",
    ),
    Fields(
        ("optimizer.name", "optimizer.betas", "optimizer.eps", "optimizer.momentum"),
        "the moments were made with them",
    ),
    Fields(("ema.power.lengths",), "such an average holds all steps since the first"),
    Fields(("train.precision",), "the run keeps what its first start chose"),
    Fields(("train.freeze", "stages.ended"), "what trains has moments and averages from its first step on"),
    Fields(
        ("train.seed", "data.lanes", "data.shuffle", "data.sources"),
        "they decide the order of samples, and a checkpoint's position in the data is a number in that order. The end "
        "of an epoch is no better place for a change: a batch may hold samples of two epochs",
    ),
    Fields(("guide.",), "the projector's weights and moments belong to its teacher, and to the steps that trained it"),
    Fields(("validation.fraction", "validation.shards"), "what is held out must never have been trained on"),
    Fields(("data.flip", "data.crop", "augmentation."), "what is trained is a function of seed, step and index alone"),
)
"""Examples of all the others, for the documentation: what is not in `MAY_CHANGE` must stay as it is."""


def may_change(field: str) -> bool:
    """Whether a run may be resumed with another value of a dotted recipe field."""
    return any(fields.cover(field) for fields in MAY_CHANGE)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of one field: `step` steps had been taken with `old`, and those after it are taken with `new`.

    Attributes:
        time: when the run first went on with it, seconds since 1970.
    """

    step: int
    field: str
    old: Any
    new: Any
    time: float

    def __str__(self) -> str:
        return f"{self.field} {_shown(self.old)} -> {_shown(self.new)}"


def read_changes(run: Path) -> list[Change]:
    """The changes of the recipe of the run in folder `run`, oldest first."""
    path = run / FILE
    return [Change(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def write_changes(run: Path, changes: Sequence[Change]) -> None:
    """Replace the record of changes; without any, there is no file."""
    if changes or (run / FILE).exists():
        atomic_write(run / FILE, "".join(json.dumps(asdict(change)) + "\n" for change in changes))


def changes_at(
    step: int, recorded: Sequence[Change], stored: Mapping[str, Any], recipe: Mapping[str, Any], now: float
) -> list[Change]:
    """The record of a run that goes on after `step` steps with `recipe`.

    No step taken later than `step` is part of the run any more. So changes recorded there are undone in `stored`, which
    gives the recipe that `step` was taken with, and are found again if `recipe` still has them. That holds whether or
    not a kill came between writing the record and the recipe.

    Args:
        recorded: the record so far.
        stored: the recipe in the run folder.
        now: the time to record of changes that are new.
    """
    kept = [change for change in recorded if change.step < step]
    in_force = dict(stored)
    for change in reversed(recorded[len(kept) :]):
        in_force = _with(in_force, change.field.split("."), change.old)
    since = {(c.step, c.field, json.dumps(c.old), json.dumps(c.new)): c.time for c in recorded}
    found = [
        Change(step=step, field=f, old=a, new=b, time=since.get((step, f, json.dumps(a), json.dumps(b)), now))
        for f, a, b in differences(in_force, recipe)
    ]
    return [*kept, *found] if step else []  # before the first step nothing was trained with the old values


def _with(mapping: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested mappings with another value at a path."""
    first, *rest = path
    return {**mapping, first: _with(mapping.get(first) or {}, rest, value) if rest else value}


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
