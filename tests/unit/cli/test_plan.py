"""`msdiff plan` on shipped recipes: balance, shares of work, placements by hand, refusals."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from msdiff_dist.cli.main import app
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.errors import ConfigError, PlacementError, UserError
from msdiff_dist.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "recipes"


def run(*arguments: str, looking: bool = False) -> str:
    """The output of `msdiff plan`, without looking at data unless asked to: shipped recipes name shards to be made."""
    result = CliRunner().invoke(app, ["plan", *arguments, *([] if looking else ["--no-data"])], catch_exceptions=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def report(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("world_size", [3, 13, 1024])
def test_paper_recipe_balances(world_size: int) -> None:
    recipe, batch = str(RECIPES / "celebahq256_ldm_3stage.yaml"), 48 * world_size
    plan = report(recipe, f"train.global_batch_size={batch}", "--world-size", str(world_size))
    assert plan["world_size"] == world_size
    assert plan["balance"] >= 0.95
    assert [s["work_share"] for s in plan["stages"]] == pytest.approx([0.461, 0.322, 0.217], abs=1e-3)
    assert sorted({r for s in plan["stages"] for r in s["ranks"]}) == list(range(world_size))
    assert plan["global_batch_size"] == batch
    for k in range(3):
        assert sum(r["samples"].get(str(k), 0) for r in plan["ranks"]) == batch // 3
    assert all(r["state_bytes"] > 0 for r in plan["ranks"])
    assert plan["bytes_per_step"]["routed"] > 0
    assert bool(plan["warnings"]) == (96 % world_size != 0)


def test_without_a_number_of_ranks_it_plans_for_this_machine() -> None:
    result = CliRunner().invoke(app, ["plan", str(RECIPES / "quickstart.yaml"), "--no-data", "--json"])
    here = max(1, torch.cuda.device_count())
    assert json.loads(result.stdout)["world_size"] == here
    (line,) = result.stderr.splitlines()
    assert "this machine's " + ("GPU" if torch.cuda.is_available() else "CPU") in line
    assert "msdiff train quickstart.yaml" in line
    assert result.stdout.strip() == run(str(RECIPES / "quickstart.yaml"), "--world-size", str(here), "--json").strip()
    with pytest.raises(ConfigError, match=r"Give --world-size, or both --nodes and --gpus-per-node"):
        run(str(RECIPES / "quickstart.yaml"), "--nodes", "2")


def test_work_follows_the_timesteps_where_sampling_is_uniform() -> None:
    recipe = str(RECIPES / "celebahq256_ldm_3stage.yaml")
    plan = report(recipe, "stages.sampling=uniform", "train.global_batch_size=1000", "--world-size", "2")
    assert [s["work_share"] for s in plan["stages"]] == pytest.approx([0.59, 0.18, 0.23], abs=0.006)


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [
        # 2112.10752, Tables 12 and 15
        ("celebahq256_ldm_unified", 48, 9.6e-5),
        ("celebahq256_ldm_3stage", 48, 9.6e-5),
        ("celebahq256_ldm_3stage_official_attention", 48, 9.6e-5),
        ("ffhq256_ldm_unified", 42, 8.4e-5),
        ("ffhq256_ldm_3stage", 42, 8.4e-5),
        ("cin256_ldm_unified", 1200, 1e-4),
        ("cin256_ldm_3stage", 1200, 1e-4),
    ],
)
def test_batch_and_rate_of_ldms_recipes_are_its_own_on_any_number_of_ranks(name: str, batch: int, rate: float) -> None:
    for ranks in ("1", "8"):
        plan = report(str(RECIPES / f"{name}.yaml"), "--world-size", ranks)
        assert (plan["global_batch_size"], plan["lr"]) == (batch, pytest.approx(rate))


def test_a_rate_for_each_sample_grows_with_the_global_batch_and_is_shown() -> None:
    recipe = str(RECIPES / "celebahq256_ldm_3stage.yaml")
    for size in ("train.global_batch_size=384", "train.micro_batch_size=24"):
        changes = (size, *(["train.global_batch_size=null"] if "micro" in size else []))
        changes += ("train.gradient_accumulation_steps=2",)
        assert report(recipe, *changes, "--world-size", "8")["lr"] == pytest.approx(384 * 2e-6)
        printed = run(recipe, *changes, "--world-size", "8")
        assert "global batch 384" in printed
        assert "learning rate 0.000768 = 2e-06 a sample x 384" in printed
    assert "learning rate 0.002\n" in run(str(RECIPES / "quickstart.yaml"), "--world-size", "2")


def test_explicit_placement_and_tables() -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    explicit = "parallel.placement=[[0],[0,1],[2]]"
    assert [r["stages"] for r in report(recipe, explicit, "--world-size", "3")["ranks"]] == [[0], [0, 1], [2]]
    assert "balance" in run(recipe, explicit, "--world-size", "3")


def test_impossible_plans_are_refused() -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    with pytest.raises(PlacementError, match=r"parallel.placement = .* 2 ranks and there are 3"):
        run(recipe, "parallel.placement=[[0],[1,2]]", "--world-size", "3")
    with pytest.raises(PlacementError, match=r"train.global_batch_size = \d+: is too small"):
        run(recipe, "--world-size", "5000")
    with pytest.raises(ConfigError, match=r"parallel.zero_decoders = 3"):
        run(recipe, "parallel.zero_decoders=3", "--world-size", "3")
    with pytest.raises(ConfigError, match=r"train.micro_batch_size = 0: must be at least 1"):
        run(recipe, "train.micro_batch_size=0", "train.global_batch_size=null", "--world-size", "3")


def test_batches_of_one_stage() -> None:
    recipe = [str(RECIPES / "quickstart.yaml"), "stages.batch=one_stage", "--world-size", "3"]
    plan = report(*recipe)
    assert plan["balance"] == pytest.approx(1)
    assert {tuple(rank["stages"]) for rank in plan["ranks"]} == {(0, 1, 2)}
    apart = report(*recipe, "parallel.placement=[[0],[1],[2]]")
    assert apart["balance"] == pytest.approx(1 / 3)
    assert any("33.3% of the ranks' time is used" in warning for warning in apart["warnings"])
    assert all(rank["peak_bytes"]["activations"] > 0 for rank in apart["ranks"]), "each has batches of its stage"
    with pytest.raises(ConfigError, match=r"parallel.zero_shared = 3: needs samples on every rank"):
        run(*recipe, "parallel.placement=[[0],[1],[2]]", "parallel.zero_shared=3")
    with pytest.raises(PlacementError, match=r"gives stage 0 \d+ samples in a micro batch and 60 ranks"):
        run(*recipe[:2], "--world-size", "60", "train.global_batch_size=48")


def test_decoders_that_would_never_step_are_refused() -> None:
    recipe = str(RECIPES / "cifar10_edm_3stage.yaml")
    with pytest.raises(ConfigError, match=r"stages.min_samples_per_step = 1000000000: stage 0 gets about \d+ samples"):
        run(recipe, "stages.min_samples_per_step=1000000000", "--world-size", "8")
    waiting, plain = (
        report(recipe, f"stages.min_samples_per_step={n}", "--world-size", "2")["ranks"][1]["peak_bytes"]["gradients"]
        for n in (100, 1)
    )
    assert waiting > plain


def test_plan_for_a_gpu() -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    plan = report(recipe, "--nodes", "2", "--gpus-per-node", "2", "--gpu", "rtx4090")
    assert plan["gpu"]["fits"]
    assert plan["largest_micro_batch"] > 72 / 4
    assert plan["step_seconds"] > max(rank["compute_seconds"] for rank in plan["ranks"]) > 0
    assert plan["lr"] == load_recipe(recipe).optimizer.lr
    printed = run(recipe, "--world-size", "4", "--gpu", "memory=1.6,tflops=10,bandwidth=100")
    assert "does not fit" in printed
    with pytest.raises(ConfigError, match=r"--gpu = 'h100': no GPU of this name is known"):
        run(recipe, "--world-size", "4", "--gpu", "h100")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", out, shards=12)
    return out


def quickstart(shards: Path) -> list[str]:
    return [str(RECIPES / "quickstart.yaml"), f"data.shards={shards}"]


def test_it_looks_at_the_data(digits: Path) -> None:
    arguments = [*quickstart(digits), "--world-size", "2"]
    index = json.loads((digits / "index.json").read_text())
    samples = sum(shard["nsamples"] for shard in index["shardlist"])
    assert json.loads(run(*arguments, "--json", looking=True))["data"] == {
        "kind": "image", "sources": 1, "shards": 12, "samples": samples,
    }  # fmt: skip
    assert f"data: {samples:,} samples in 12 shards" in run(*arguments, looking=True)
    assert "data: not looked at (--no-data)" in run(*arguments)
    assert report(*arguments)["data"] is None
    # Lanes that do not fit the ranks are a warning, as without data.
    assert "multiple" in " ".join(run(*quickstart(digits), "--world-size", "5", looking=True).split())
    synthetic = str(RECIPES / "debug.yaml")
    assert "random numbers" in run(synthetic, "--world-size", "2", looking=True)


def without(extension: str, shards: Path) -> None:
    """Remove the files of one extension from every shard, and the index, which has other sizes."""
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as old:
            kept = [(member, old.extractfile(member)) for member in old if not member.name.endswith(extension)]
            contents = [(member, stream.read() if stream else b"") for member, stream in kept]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
            for member, content in contents:
                new.addfile(member, io.BytesIO(content))
    (shards / "index.json").unlink()


def first_of(shards: Path) -> Path:
    return min(shards.glob("*.tar"))


def foreign_index(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    for shard in index["shardlist"]:
        shard["filesize"] += 512
    (shards / "index.json").write_text(json.dumps(index))


def no_tar_file(shards: Path) -> None:
    (shards / "index.json").unlink()
    first_of(shards).write_bytes(b"x" * 4096)


def no_shards(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        path.unlink()


FAULTS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no folder": (shutil.rmtree, [], "data.shards"),
    "no shards": (no_shards, [], "data.shards"),
    "a shard is missing": (
        lambda shards: first_of(shards).unlink(), ["data.shards={}/{{00000..00011}}.tar"], "not found",
    ),
    "a shard is cut short": (lambda shards: first_of(shards).write_bytes(b""), [], "has 0 bytes"),
    "a shard is no tar file": (no_tar_file, [], "tar file"),
    "a foreign index": (foreign_index, [], "index.json says"),
    "other sizes": (lambda shards: None, ["data.image_size=32"], "data.image_size"),
    "no classes": (lambda shards: without(".cls", shards), [], "'cls'"),
    "no captions": (lambda shards: without(".txt", shards), ["data.captions=true"], "'txt'"),
    "no samples": (lambda shards: without("", shards), [], "hold no samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_training_would_refuse_of_the_data(name: str, digits: Path, tmp_path: Path) -> None:
    damage, changes, words = FAULTS[name]
    shards, out = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(digits, shards)
    damage(shards)
    arguments = [*quickstart(shards), *(change.format(shards) for change in changes)]
    errors = []
    for command in (["plan", *arguments, "--world-size", "1"], ["train", *arguments, "--run-dir", str(out)]):
        with pytest.raises(UserError) as caught:
            CliRunner().invoke(app, command, catch_exceptions=False)
        errors.append(caught.value)
    planned, trained = errors
    assert words in str(planned)
    assert str(planned) == f"{trained} On a machine without the data, plan with --no-data."
    assert not out.exists()
    run(*arguments, "--world-size", "1")  # without data there is nothing to refuse


def test_corrupt_samples_may_be_skipped(digits: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    without(".cls", shards)
    run(*quickstart(shards), "data.max_bad=10", "--world-size", "1", looking=True)
