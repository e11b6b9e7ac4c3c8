"""Which fields may change in a run, and the record of those that did, whatever a kill or a lost checkpoint does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msdiff_dist.errors import RunFolderError
from msdiff_dist.recipe import Recipe, comparable_mapping, load_recipe, recipe_mapping
from msdiff_dist.training.recipe_changes import MAY_CHANGE, MUST_STAY, may_change, read_changes
from msdiff_dist.training.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
BASE: dict[str, Any] = {"name": "a", "optimizer": {"lr": 1, "eps": 1}, "train": {"steps": 9, "threads": 0}}


def recipe(lr: int, **train: int) -> dict[str, Any]:
    return BASE | {"optimizer": {"lr": lr, "eps": 1}, "train": BASE["train"] | train}


def start(path: Path, mapping: dict[str, Any], step: int) -> list[str]:
    """What a start of a run that goes on at `step` says of changes."""
    folder = RunFolder(path)
    folder.open(mapping)
    changes = folder.go_on(mapping, step)
    folder.close()
    assert folder.stored_recipe() == mapping
    return [str(change) for change in changes]


def record(path: Path) -> list[tuple[int, str, Any, Any]]:
    return [(c.step, c.field, c.old, c.new) for c in read_changes(path)]


def test_each_change_is_recorded_once_with_its_step(tmp_path: Path) -> None:
    assert start(tmp_path, recipe(1), 0) == []
    assert start(tmp_path, recipe(2), 0) == [], "nothing was trained with the old value"
    assert start(tmp_path, recipe(3, threads=2), 40) == ["optimizer.lr 2 -> 3", "train.threads 0 -> 2"]
    assert start(tmp_path, recipe(3, threads=2), 60) == []
    assert start(tmp_path, recipe(1, threads=2), 60) == ["optimizer.lr 3 -> 1"]
    assert record(tmp_path) == [
        (40, "optimizer.lr", 2, 3),
        (40, "train.threads", 0, 2),
        (60, "optimizer.lr", 3, 1),
    ]


def test_a_start_that_was_killed_before_its_first_checkpoint_leaves_no_trace(tmp_path: Path) -> None:
    start(tmp_path, recipe(1), 0)
    assert start(tmp_path, recipe(2), 40) == ["optimizer.lr 1 -> 2"]
    first = read_changes(tmp_path)
    assert start(tmp_path, recipe(2), 40) == ["optimizer.lr 1 -> 2"]
    assert read_changes(tmp_path) == first, "not even the time is another"
    assert start(tmp_path, recipe(3), 40) == ["optimizer.lr 1 -> 3"]
    assert record(tmp_path) == [(40, "optimizer.lr", 1, 3)]
    assert start(tmp_path, recipe(1), 40) == []
    assert record(tmp_path) == []


def test_a_kill_between_record_and_recipe(tmp_path: Path) -> None:
    start(tmp_path, recipe(1), 0)
    before = (tmp_path / "recipe.yaml").read_text()
    start(tmp_path, recipe(2), 40)
    (tmp_path / "recipe.yaml").write_text(before)  # as it was when the record had been written
    assert start(tmp_path, recipe(2), 40) == ["optimizer.lr 1 -> 2"]
    assert record(tmp_path) == [(40, "optimizer.lr", 1, 2)]
    (tmp_path / "recipe.yaml").write_text(before)
    assert start(tmp_path, recipe(1), 40) == []
    assert record(tmp_path) == []


def test_a_run_that_goes_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    """Steps past it are trained again with the recipe of now, so changes in between happen where it is."""
    start(tmp_path, recipe(1), 0)
    start(tmp_path, recipe(2), 20)
    start(tmp_path, recipe(3), 40)
    start(tmp_path, recipe(4), 60)
    assert start(tmp_path, recipe(4), 30) == ["optimizer.lr 2 -> 4"]
    assert record(tmp_path) == [(20, "optimizer.lr", 1, 2), (30, "optimizer.lr", 2, 4)]


def test_what_must_stay_is_refused_with_every_field_and_the_way_out(tmp_path: Path) -> None:
    start(tmp_path, recipe(1), 0)
    other = recipe(2) | {"name": "b", "optimizer": {"lr": 2, "eps": 3}}
    with pytest.raises(RunFolderError, match=r"name was 'a', now 'b'; optimizer\.eps was 1, now 3\).*--branch NEW_RUN"):
        RunFolder(tmp_path).open(other)


def test_a_run_of_a_version_without_a_field_is_resumed(tmp_path: Path) -> None:
    base = load_recipe(ROOT / "recipes/debug.yaml")
    stored = recipe_mapping(base)
    del stored["train"]["tf32"]  # as before there was this field
    folder = RunFolder(tmp_path)
    folder.open(stored)
    folder.close()
    RunFolder(tmp_path, comparable_mapping).check(recipe_mapping(base))
    with pytest.raises(RunFolderError, match=r"train\.tf32 was False, now True"):
        RunFolder(tmp_path, comparable_mapping).check(
            recipe_mapping(load_recipe(ROOT / "recipes/debug.yaml", ["train.tf32=true"]))
        )


def test_a_loss_weight_may_change_where_the_process_has_no_section(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, comparable_mapping)
    before, now = (
        recipe_mapping(load_recipe(ROOT / "recipes/debug.yaml", o))
        for o in (["diffusion.discrete=null"], ["diffusion.discrete={min_snr_gamma: 5}"])
    )
    folder.open(before)
    folder.go_on(before, 0)
    assert [str(c) for c in folder.go_on(now, 7)] == ["diffusion.discrete.min_snr_gamma null -> 5.0"]
    folder.close()


def _exists(name: str) -> bool:
    """Whether a field or section of a recipe has that name."""
    places: list[Any] = [recipe_mapping(load_recipe(ROOT / "recipes" / f"{r}.yaml")) for r in ("debug",)]
    if name.split(".")[0] in Recipe.__dataclass_fields__ and name.count(".") + (not name.endswith(".")) < 2:
        return True
    section, *rest = name.removesuffix(".").split(".")
    for place in places:
        inner = place.get(section)
        for part in rest:
            inner = inner.get(part, KeyError) if isinstance(inner, dict) else None
        if inner is not KeyError:
            return True
    return False


def test_every_named_field_exists_and_is_on_its_side() -> None:
    for fields in (*MAY_CHANGE, *MUST_STAY):
        for name in fields.names:
            assert _exists(name), name
            inside = f"{name}field" if name.endswith(".") else name
            assert may_change(inside) == (fields in MAY_CHANGE), name


def _written(name: str) -> str:
    return f"`{name}*`" if name.endswith(".") else f"`{name}`"


def test_the_documented_table_is_the_codes() -> None:
    page = (ROOT / "docs/guides/resume.md").read_text()
    for title, side in (("may change", MAY_CHANGE), ("must stay", MUST_STAY)):
        rows = [f"| {', '.join(map(_written, fields.names))} | {fields.about} |" for fields in side]
        table = "\n".join([f"| {title} | |", "|---|---|", *rows])
        assert table in page, f"docs/guides/resume.md should have\n{table}"
