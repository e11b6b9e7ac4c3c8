"""All errors of a file at once: each with its line, none twice, and none that only follows from another."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msdiff_dist.errors import ConfigError, ConfigErrors
from msdiff_dist.launch.cluster import load_cluster
from msdiff_dist.launch.launcher import runs_of
from msdiff_dist.recipe import load_recipe

GOOD = """\
name: tiny
data:
  kind: synthetic
  lanes: 12
  latent_shape: [2, 8, 8]
  num_classes: 3
stages: {boundaries: [442, 631]}
model:
  in_channels: 2
  out_channels: 2
  encoder_channels: 8
  decoder_channels: [12, 8, 4]
  channel_mult: [1, 2]
  num_res_blocks: 1
  attention_downsamples: [2]
  num_heads: 2
  norm_groups: 4
  num_classes: 3
optimizer:
  lr: 1e-4
train:
  steps: 10
  global_batch_size: 24
  condition_dropout: 0.1
"""


def refused(read: Callable[[], object]) -> list[tuple[str | None, str, str]]:
    """(place, field, message) of each error, with the name of the file alone in its place."""
    with pytest.raises(ConfigError) as caught:
        read()
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.errors) + (len(caught.value.errors) > 1)
    found = [(e.place and e.place.rsplit("/", 1)[-1], e.field, str(e)) for e in caught.value.errors]
    assert len({(field, message) for _, field, message in found}) == len(found), "an error is named twice"
    return found


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def changed(*changes: tuple[str, str]) -> str:
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_recipe_that_the_others_are_made_of_is_good(tmp_path: Path) -> None:
    load_recipe(written(tmp_path, GOOD))


def test_errors_of_every_kind_are_found_at_once(tmp_path: Path) -> None:
    text = changed(
        ("lanes: 12", "lanes: 0"),
        ("boundaries: [442, 631]", "boundaries: [442, late]"),
        ("num_res_blocks: 1", "num_res_block: 1"),
        ("lr: 1e-4", "lr: fast\n  betas: [0.9, 1.5]"),
        ("steps: 10", "steps: 10\n  steps: 20"),
        ("global_batch_size: 24", "global_batch_size: ${oc.env:A_VARIABLE_OF_NOBODY}"),
        ("condition_dropout: 0.1", "condition_dropout: 2"),
    )
    overrides = ["train.threads=-1", "checkpoint.every=x", "preview.num=0", "nonsense", "model.decoder_channels=[1"]
    found = refused(lambda: load_recipe(written(tmp_path, text), overrides))
    line = {n: f"recipe.yaml:{i}" for i, text in enumerate(text.splitlines(), 1) for n in text.split(":")[:1]}
    assert [(place, field) for place, field, _ in found] == [
        (line["  lanes"], "data.lanes"),
        (line["stages"], "stages.boundaries[1]"),
        (line["  num_res_block"], "model.num_res_block"),
        (line["  lr"], "optimizer.lr"),
        (line["  betas"], "optimizer.betas"),
        (line["  steps"], "train.steps"),
        (line["  global_batch_size"], "train.global_batch_size"),
        (line["  condition_dropout"], "train.condition_dropout"),
        (None, "override"),
        (None, "override"),
        ("on the command line", "train.threads"),
        ("on the command line", "checkpoint.every"),
        ("on the command line", "preview.num"),
    ]
    messages = "\n".join(message for *_, message in found)
    steps = int(line["  steps"].rsplit(":", 1)[1])
    assert f"given twice, on lines {steps - 1} and {steps}" in messages
    assert "the environment variable A_VARIABLE_OF_NOBODY is not set" in messages
    assert "Did you mean 'num_res_blocks'?" in messages


def test_sections_without_errors_are_compared_with_each_other(tmp_path: Path) -> None:
    text = changed(
        ("lr: 1e-4", "lr: 0"),
        ("in_channels: 2", "in_channels: 4"),
        ("boundaries: [442, 631]", "boundaries: [442]"),
        ("latent_shape: [2, 8, 8]\n  num_classes: 3", "latent_shape: [2, 8, 8]\n  num_classes: 4"),
    )
    found = refused(lambda: load_recipe(written(tmp_path, text)))
    assert {field for _, field, _ in found} == {
        "model.in_channels", "model.decoder_channels", "model.num_classes", "optimizer.lr",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        # Missing because it is misspelt; unknown because the section is.
        ([("  steps: 10", "  stepps: 10")], ["train.stepps"]),
        ([("optimizer:", "optimiser:")], ["optimiser"]),
        # What the kind would need, or forbid, is not known.
        ([("kind: synthetic", "kind: syntetic"), ("  latent_shape: [2, 8, 8]\n", "")], ["data.kind"]),
        # The schedule of an unknown process, the fields of an unknown family.
        ([("name: tiny", "name: tiny\ndiffusion: {process: vpp, vp: {beta_min: -1}}")], ["diffusion.process"]),
        ([("  in_channels: 2", "  family: lmd\n  in_channels: 2")], ["model.family"]),
        # The data have classes and the model has none: what is dropped is a question for later.
        ([("norm_groups: 4\n  num_classes: 3", "norm_groups: 4")], ["model.num_classes"]),
        # Widths of which nothing can be said while one of them is 0.
        ([("encoder_channels: 8", "encoder_channels: 0")], ["model.encoder_channels"]),
        # An error within an error.
        ([("train:", "trian:")], ["trian"]),
    ],
)
def test_nothing_is_said_that_only_follows(tmp_path: Path, changes: list[tuple[str, str]], fields: list[str]) -> None:
    found = refused(lambda: load_recipe(written(tmp_path, changed(*changes))))
    assert [field for _, field, _ in found] == fields


def test_one_error_looks_as_it_did_and_has_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, changed(("lanes: 12", "lanes: 0")))
    ((_, _, message),) = refused(lambda: load_recipe(path))
    assert message == f"{path}:4: data.lanes = 0: must be at least 1. Set it to 1 or more."


def test_what_is_missing_is_placed_in_its_section(tmp_path: Path) -> None:
    text = changed(("name: tiny\n", ""), ("  lr: 1e-4\n", "  betas: [0.9, 0.99]\n"))
    assert [e[:2] for e in refused(lambda: load_recipe(written(tmp_path, text)))] == [
        ("recipe.yaml", "name"),
        ("recipe.yaml:18", "optimizer.lr"),
    ]


def test_merged_mappings_and_lists_have_the_lines_of_their_own_values(tmp_path: Path) -> None:
    text = changed(
        ("optimizer:\n  lr: 1e-4", "lr_schedule: &some\n  warmup_steps: -1\nema:\n  <<: *some\noptimizer:\n  lr: 1e-4"),
    )
    found = refused(lambda: load_recipe(written(tmp_path, text), ["model.decoder_channels=[12,8,-4]"]))
    assert [e[:2] for e in found] == [
        ("recipe.yaml:20", "lr_schedule.warmup_steps"),
        ("recipe.yaml:20", "ema.warmup_steps"),
        ("on the command line", "model.decoder_channels"),
    ]
    text = changed(("stages: {boundaries: [442, 631]}", "stages:\n  boundaries:\n    - 442\n    - 631.5"))
    found = refused(lambda: load_recipe(written(tmp_path, text)))
    assert [e[:2] for e in found] == [("recipe.yaml:10", "stages.boundaries[1]")]


def test_an_override_stands_for_what_it_replaces(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    for override in ("stages.boundaries=[442,631.5]", "stages={boundaries: [442, 631.5]}"):
        assert [e[:2] for e in refused(lambda: load_recipe(path, [override]))] == [  # noqa: B023
            ("on the command line", "stages.boundaries[1]")
        ]


def test_cluster_files(tmp_path: Path) -> None:
    path = written(tmp_path, "shared: /\nnodes: two\ngpus_per_node: -1\ntme: 1\nsbatch:\n  begin: 16:30\n", "gpu.yaml")
    found = refused(lambda: load_cluster(str(path), {"time": "soon"}))
    assert [e[:2] for e in found] == [
        ("gpu.yaml:2", "nodes"),
        ("gpu.yaml:3", "gpus_per_node"),
        ("gpu.yaml:4", "tme"),
        ("gpu.yaml:6", "sbatch.begin"),
        ("", "--time"),
    ]


def test_sweeps_name_the_line_of_the_sweep(tmp_path: Path) -> None:
    written(tmp_path, changed(("lanes: 12", "lanes: 0")))
    sweep = "recipe: recipe.yaml\ngrid:\n  optimizer.lr: [1e-4, -1]\nruns:\n  - train.steps: 0\n  - train.setps: 2\n"
    path = written(tmp_path, sweep, "sweep.yaml")
    found = refused(lambda: runs_of(path, [], None))
    assert [e[:2] for e in found] == [
        ("recipe.yaml:4", "data.lanes"),
        ("sweep.yaml:3", "optimizer.lr"),
        ("sweep.yaml:5", "train.steps"),
        ("sweep.yaml:6", "train.setps"),
    ]
    path.write_text("recipe: recipe.yaml\ngird: {}\ngrid: {optimizer.lr: []}\nmax_parallel: 0\n")
    assert [e[0] for e in refused(lambda: runs_of(path, [], None))] == ["sweep.yaml:2", "sweep.yaml:3", "sweep.yaml:4"]


def test_several_errors_cross_processes_whole() -> None:
    errors: list[Any] = [ConfigError("a", 1, "is wrong", "Mend it."), ConfigError("b", 2, "is wrong", "Mend it.")]
    errors[0].place = "recipe.yaml:3"
    several = ConfigErrors(errors)
    again = pickle.loads(pickle.dumps(several))
    assert (again.field, again.value, again.problem, again.remedy) == ("a", 1, "is wrong", "Mend it.")
    assert (
        str(again)
        == str(several)
        == ("2 errors\n  recipe.yaml:3: a = 1: is wrong. Mend it.\n  b = 2: is wrong. Mend it.")
    )
