"""Folders with a record of what they are being filled with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msdiff_dist.errors import DataError
from msdiff_dist.files.folder_claim import FolderClaim
from msdiff_dist.files.work_share import Part

SETTINGS = {"seed": 0, "sampler": {"steps": 3}, "prompts": ("a", "b")}


@pytest.fixture
def claim(tmp_path: Path) -> FolderClaim:
    out = tmp_path / "out"
    return FolderClaim(folder=out, record=out / "made_of.json", locks=out / ".parts", content="images", error=DataError)


def test_the_same_settings_resume_and_others_are_named(claim: FolderClaim) -> None:
    with claim.held(SETTINGS, Part()):
        (claim.folder / "0").write_text("x")
    assert json.loads(claim.record.read_text()) == {**SETTINGS, "prompts": ["a", "b"]}
    with claim.held(SETTINGS, Part()):
        assert (claim.folder / "0").exists()
    changed = {**SETTINGS, "sampler": {"steps": 4}, "extra": "long" * 100}
    with pytest.raises(DataError, match=r"--out.*images made otherwise \(sampler\.steps was 3, now 4; extra") as caught:
        claim.held(changed, Part()).__enter__()
    assert len(caught.value.problem) < 250
    assert (claim.folder / "0").read_text() == "x"


def test_a_folder_of_something_else(claim: FolderClaim, tmp_path: Path) -> None:
    claim.folder.mkdir()
    (claim.folder / "mine").write_text("x")
    with pytest.raises(DataError, match="holds something else"):
        claim.held(SETTINGS, Part()).__enter__()
    assert [p.name for p in claim.folder.iterdir()] == ["mine"]
    (claim.folder / "mine").unlink()
    with claim.held(SETTINGS, Part(), {"0"}):
        for name in ("0", ".0.0123abcd.partial"):
            (claim.folder / name).write_text("")
    with claim.held(SETTINGS, Part(), {"0"}):
        pass
    with pytest.raises(DataError, match=r"holds \.0\.0123abcd\.partial too"):
        claim.held(SETTINGS, Part(), {"1"}).__enter__()


def test_a_claim_killed_while_it_was_made(claim: FolderClaim) -> None:
    claim.folder.mkdir()
    (claim.folder / ".made_of.json.0123abcd.partial").write_text('{"se')
    with claim.held(SETTINGS, Part(), {"0"}):
        pass
    assert sorted(p.name for p in claim.folder.iterdir()) == [".parts", "made_of.json"]


def test_parts_at_work(claim: FolderClaim) -> None:
    with claim.held(SETTINGS, Part(0, 2)):
        for other in (Part(0, 2), Part(0, 3), Part()):
            with pytest.raises(DataError, match="by another process"):
                claim.held(SETTINGS, other).__enter__()
        with claim.held(SETTINGS, Part(1, 2)):
            pass


def test_places_that_cannot_be_written(claim: FolderClaim) -> None:
    claim.folder.write_text("a file")
    with pytest.raises(DataError, match=r"--out.*cannot be written"):
        claim.held(SETTINGS, Part()).__enter__()
    claim.folder.unlink()
    with pytest.raises(DataError, match=r"cannot be written \(No space"), claim.held(SETTINGS, Part()):
        raise OSError(28, "No space left on device")
