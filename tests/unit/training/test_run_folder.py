"""The run folder's claims, locks and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msdiff_dist.errors import RunFolderError
from msdiff_dist.training.run_folder import RunFolder

RECIPE = {"name": "a", "optimizer": {"eps": 0.1}, "parallel": {"zero_shared": 1}, "train": {"steps": 5}}


def test_the_same_recipe_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(RECIPE)
    folder.close()
    RunFolder(folder.path).check(RECIPE | {"parallel": {"zero_shared": 2}, "train": {"steps": 9}})
    with pytest.raises(RunFolderError, match=r"optimizer\.eps was 0\.1, now 0\.2"):
        RunFolder(folder.path).check(RECIPE | {"optimizer": {"eps": 0.2}})


def test_one_user_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.open(RECIPE)
    with pytest.raises(RunFolderError, match="in use"):
        second.open(RECIPE)
    first.close()
    second.open(RECIPE)
    second.close()


def test_what_a_killed_preview_left_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.samples / ".weights_00000010").mkdir(parents=True)
    (folder.samples / ".step_00000010.png").write_text("")
    (folder.samples / "step_00000005.png").write_text("")
    folder.recipe_file.write_text("name: a\n")
    folder.open({"name": "a"})
    folder.close()
    assert [p.name for p in folder.samples.iterdir()] == ["step_00000005.png"]


def test_a_folder_whose_first_start_was_killed(tmp_path: Path) -> None:
    left = (".lock", ".recipe.yaml.0123abcd.partial")
    for name in left:
        (tmp_path / name).write_text("")
    folder = RunFolder(tmp_path)
    folder.open(RECIPE)
    folder.close()
    assert folder.recipe_file.exists()
    assert not (tmp_path / left[1]).exists()


def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").open(RECIPE)


def test_metrics_are_cut_at_the_checkpoint_and_at_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": s}) for s in range(1, 6)]
    folder.metrics_file.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    folder.cut_metrics(3)
    assert [json.loads(x)["step"] for x in folder.metrics_file.read_text().splitlines()] == [1, 2, 3]
