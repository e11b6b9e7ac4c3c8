"""Each mistake ends with status 2 and one message that names field, value and remedy, and touches nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import ROOT, Msdiff

pytestmark = pytest.mark.integration

DEBUG = "recipes/debug.yaml"
MISTAKES = {
    "missing recipe": (["recipes/quickstrt.yaml"], ["recipes/quickstrt.yaml", "no such file", "quickstart"]),
    "missing key": ([DEBUG, "optimizer=null"], ["optimizer", "must be a mapping"]),
    "wrong type": ([DEBUG, "train.steps=many"], ["train.steps", "'many'", "must be an integer"]),
    "unknown key": ([DEBUG, "train.stepz=3"], ["train.stepz", "not a known field", "Did you mean 'steps'?"]),
    "not key=value": ([DEBUG, "train.steps"], ["train.steps", "key=value"]),
    "order of boundaries": ([DEBUG, "stages.boundaries=[631,442]"], ["stages.boundaries", "[631.0, 442.0]", "ascend"]),
    "boundary outside": ([DEBUG, "stages.boundaries=[442,2000]"], ["stages.boundaries[1]", "2000", "outside"]),
    "decoders and stages": (
        [DEBUG, "model.decoder_channels=[16,8]"],
        ["model.decoder_channels", "2 decoders", "3 stages"],
    ),
    "lanes": ([DEBUG, "data.lanes=10", "--nproc", "4"], ["data.lanes", "10", "multiple of 4"]),
    "too many ranks": (
        [DEBUG, "train.global_batch_size=6", "data.lanes=8", "--nproc", "8"],
        ["train.global_batch_size", "too small", "8 ranks"],
    ),
    "accumulation": (
        [DEBUG, "train.gradient_accumulation_steps=16"],
        ["train.gradient_accumulation_steps", "16", "at most 8"],
    ),
    "norm groups": ([DEBUG, "model.norm_groups=7"], ["model.norm_groups", "7", "16"]),
    "placement length": ([DEBUG, "parallel.placement=[[0],[1,2]]", "--nproc", "3"], ["parallel.placement", "3 ranks"]),
    "placement without a stage": ([DEBUG, "parallel.placement=[[0],[1]]", "--nproc", "2"], ["parallel.placement", "2"]),
    "zero 0": ([DEBUG, "parallel.zero_shared=0"], ["parallel.zero_shared", "0", "1, 2 or 3"]),
    "zero 3 for stages": ([DEBUG, "parallel.zero_decoders=3"], ["parallel.zero_decoders", "3", "1 or 2"]),
    "no shards": (
        ["recipes/quickstart.yaml", "data.shards=nowhere/{000..003}.tar"],
        ["data.shards", "nowhere", "not found"],
    ),
    "contradicting sizes": ([DEBUG, "train.micro_batch_size=5"], ["train.global_batch_size", "24", "micro_batch_size"]),
    "classes": ([DEBUG, "data.num_classes=5"], ["model.num_classes", "4", "5"]),
    "growing after the end": ([DEBUG, "grow.at=20"], ["grow.at", "20", "train.steps = 20", "at most 19"]),
    "growing into one stage": (
        [DEBUG, "grow.at=3", "stages.boundaries=[]", "model.decoder_channels=[16]"],
        ["grow.at", "one stage", "stages.boundaries"],
    ),
    "growing frozen": ([DEBUG, "grow.at=3", "train.freeze=[shared]"], ["train.freeze", "grow.at", "`msdiff grow`"]),
    "end of a stage too many": (
        [DEBUG, "stages.end.at=[null,null,null,5]"],
        ["stages.end.at", "4 entries", "3 stages", "null"],
    ),
    "end after the end": ([DEBUG, "stages.end.at=[null,20,null]"], ["stages.end.at[1]", "20", "steps 1 to 19"]),
    "end before growing": (
        [DEBUG, "grow.at=5", "stages.end.at=[null,3,null]"],
        ["stages.end.at[1]", "3", "steps 6 to 19"],
    ),
    "end of all stages": ([DEBUG, "stages.end.at=[5,6,7]"], ["stages.end.at", "ends every stage", "null"]),
    "patience without validation": (
        [DEBUG, "stages.end.patience=2"],
        ["stages.end.patience", "2", "held-out loss", "validation"],
    ),
    "no stage has ended": ([DEBUG, "stages.ended=[3]"], ["stages.ended[0]", "3", "no stage", "Count from 0"]),
    "all stages have ended": ([DEBUG, "stages.ended=[0,1,2]"], ["stages.ended", "nothing to train"]),
}


# What a command imports first shows in a process of its own only.
FRESH = """
import sys
from msdiff_dist.cli.main import main
try:
    main()
finally:
    print(*({"deepspeed", "diffusers", "transformers"} & {*sys.modules}))
"""


@pytest.mark.parametrize("name", ["missing recipe", "lanes"])
def test_a_fresh_command_prints_the_error_alone_and_before_heavy_libraries(name: str, tmp_path: Path) -> None:
    args, words = MISTAKES[name]
    command = [sys.executable, "-c", FRESH, "train", *args, "--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == "\n", "libraries that were imported, or what they printed"
    assert ended.stderr.startswith("error"), ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_recipe(name: str, msdiff: Msdiff, tmp_path: Path) -> None:
    args, words = MISTAKES[name]
    ended = msdiff("train", *args, "--run-dir", tmp_path / "run")
    assert ended.status == 2, ended.output
    assert ended.output.startswith("error"), ended.output
    assert ended.output.count("error") == 1, ended.output
    for word in words:
        assert word in ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_xformers_without_a_gpu(msdiff: Msdiff, tmp_path: Path) -> None:
    ended = msdiff("train", DEBUG, "model.attention_backend=xformers", "--run-dir", tmp_path / "run")
    assert ended.status == 2, ended.output
    assert "model.attention_backend = 'xformers': xformers computes on GPUs only" in ended.output
    assert not (tmp_path / "run").exists()


def _quickstart(shards: Path) -> list[str]:
    return ["recipes/quickstart.yaml", f"data.shards={shards}", "train.steps=2", "train.precision=fp32"]


def test_shard_without_the_needed_key(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for tar in digits.glob("*.tar"):
        with tarfile.open(tar) as old, tarfile.open(shards / tar.name, "w", format=tarfile.USTAR_FORMAT) as new:
            for member in old:
                if not member.name.endswith(".cls"):
                    new.addfile(member, old.extractfile(member))
    ended = msdiff("train", *_quickstart(shards), "--nproc", 2, "--run-dir", tmp_path / "run")
    assert ended.status == 2, ended.output
    for word in ("'cls'", ".tar", "is missing", "Use shards that have it"):
        assert word in ended.output


def test_image_of_the_wrong_size(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    ended = msdiff("train", *_quickstart(digits), "data.image_size=32", "--nproc", 2, "--run-dir", tmp_path / "run")
    assert ended.status == 2, ended.output
    for word in ("data.image_size", "32", "16"):
        assert word in ended.output


def test_missing_shard(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "shards")
    victim = sorted((tmp_path / "shards").glob("*.tar"))[3]
    pattern = str(tmp_path / "shards" / "{}.tar").replace(
        "{}", "{" + f"{'0' * len(victim.stem)}..{'0' * (len(victim.stem) - 2)}11" + "}"
    )
    victim.unlink()
    ended = msdiff("train", *_quickstart(Path(pattern)), "--run-dir", tmp_path / "run")
    assert ended.status == 2, ended.output
    assert victim.name in ended.output


def test_folders_that_are_not_this_run(msdiff: Msdiff, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert msdiff("train", DEBUG, "train.steps=1", "--run-dir", run).status == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    other = msdiff("train", DEBUG, "optimizer.eps=0.1", "model.encoder_channels=32", "--run-dir", run)
    assert other.status == 2
    for word in ("optimizer.eps was 1e-08, now 0.1", "model.encoder_channels was 16, now 32", "--run-dir"):
        assert word in other.output
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"cat")
    strange = msdiff("train", DEBUG, "--run-dir", tmp_path / "photos")
    assert strange.status == 2
    assert "cat.png" in strange.output
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_nothing_to_sample_from(msdiff: Msdiff, tmp_path: Path) -> None:
    ended = msdiff("sample", tmp_path / "no_run", "--out", tmp_path / "out")
    assert ended.status == 2
    assert "no_run" in ended.output
    assert not (tmp_path / "out").exists()
