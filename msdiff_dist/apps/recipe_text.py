"""Recipe files written by commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from msdiff_dist.config import chosen
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.recipe import Recipe


def recipe_text(recipe: Recipe, title: str, commands: Sequence[str], comments: Mapping[str, str]) -> str:
    """A recipe file with the fields that differ from their defaults.

    Args:
        title: what it is, one line or more.
        commands: what to do with it, in order.
        comments: lines above sections, by section.
    """
    sections: dict[str, Any] = chosen(recipe)
    lines = [
        *(f"# {line}".rstrip() for line in title.splitlines()),
        "#",
        *(f"#   {command}" for command in commands),
        "#",
        "# Fields that are not here have their defaults.",
        *_sections(sections, recipe.model, comments),
    ]
    return "\n".join(lines) + "\n"


def _sections(sections: Mapping[str, Any], model: ModelConfig, comments: Mapping[str, str]) -> Iterator[str]:
    for section, value in sections.items():
        if section in comments:
            yield f"# {comments[section]}"
        if section == "train" and model.num_stages > 1:
            others = ["shared"] * model.share_encoder + [f"stages.{k}" for k in range(1, model.num_stages)]
            yield f"# With freeze: [{', '.join(others)}] only the decoder of stage 0 trains."
        # A section of plain values on one line, others indented, as in the shipped recipes; a name on its own line.
        flow = None if isinstance(value, Mapping) else False
        dumped: str = yaml.safe_dump({section: value}, sort_keys=False, default_flow_style=flow, width=110)
        yield dumped.rstrip()
