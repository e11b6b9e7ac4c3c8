"""Predictions for recipes: what fits a GPU, the largest micro batch, and changes with which a recipe fits."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from msdiff_dist.apps.train.prediction import predict
from msdiff_dist.distributed.gpus import GIB, Gpu, parse_gpu
from msdiff_dist.distributed.plan_report import render, size
from msdiff_dist.errors import ConfigError
from msdiff_dist.recipe import Recipe, load_recipe

DEBUG = Path(__file__).parents[4] / "recipes/debug.yaml"
RANKS = 4
KEYS = {"weights", "gradients", "optimizer", "averages", "activations", "buffers", "total"}


def recipe(*changes: str) -> Recipe:
    return load_recipe(DEBUG, ["train.global_batch_size=96", "train.precision=fp32", *changes])


def gpu_of(usable: float) -> Gpu:
    """A GPU with so many bytes for tensors."""
    return parse_gpu(f"memory={usable / GIB},tflops=10,bandwidth=100,reserved=0,fragmentation=0")


def report(*changes: str, usable: float | None = None, ranks: int = RANKS) -> dict[str, Any]:
    return predict(recipe(*changes), ranks, on_gpus=True, gpu=None if usable is None else gpu_of(usable))


def peak(of: dict[str, Any]) -> int:
    return max(int(rank["peak_bytes"]["total"]) for rank in of["ranks"])


def test_every_plan_has_the_memory_of_its_ranks() -> None:
    plan = report()
    for rank in plan["ranks"]:
        parts = dict(rank["peak_bytes"])
        assert set(parts) == KEYS
        assert parts.pop("total") == sum(parts.values())
        assert rank["state_bytes"] == parts["weights"] + parts["optimizer"] + parts["averages"]
    assert (plan["global_batch_size"], plan["lr"]) == (96, recipe().optimizer.lr)
    assert not plan.keys() & {"gpu", "step_seconds", "largest_micro_batch"}


def test_batch_of_a_micro_batch_size() -> None:
    of_micro = recipe("train.global_batch_size=null", "train.micro_batch_size=8", "train.gradient_accumulation_steps=2")
    assert predict(of_micro, RANKS, on_gpus=False)["global_batch_size"] == 8 * 2 * RANKS


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    usable = 1.5 * peak(report())
    largest = report(usable=usable)["largest_micro_batch"]
    assert largest > 96 / RANKS

    def fits(size: int) -> bool:
        changes = ("train.global_batch_size=null", f"train.micro_batch_size={size}")
        return bool(report(*changes, usable=usable)["gpu"]["fits"])

    assert fits(largest)
    assert not fits(largest + 1)


def test_what_fits_needs_no_remedy() -> None:
    plan = report(usable=2 * peak(report()))
    assert plan["gpu"]["fits"]
    assert "remedies" not in plan["gpu"]
    assert plan["gpu"]["images_per_second"] == pytest.approx(96 / plan["step_seconds"])


@pytest.mark.parametrize("by_micro_batch", [False, True])
def test_remedies_help(by_micro_batch: bool) -> None:
    usable = 0.8 * peak(report())
    size = ("train.global_batch_size=null", "train.micro_batch_size=24") if by_micro_batch else ()
    plan = report(*size, usable=usable)
    assert not plan["gpu"]["fits"]
    assert plan["largest_micro_batch"] < 96 / RANKS
    remedies = plan["gpu"]["remedies"]
    assert any("gradient_accumulation_steps=2" in remedy for remedy in remedies)
    assert any("activation_checkpointing" in remedy for remedy in remedies)
    for remedy in remedies:
        ranks = int(remedy.split()[0]) if remedy.endswith("ranks") else RANKS
        changed = report(*size, *([] if remedy.endswith("ranks") else remedy.split()), usable=usable, ranks=ranks)
        assert changed["gpu"]["fits"], remedy
        assert by_micro_batch or changed["global_batch_size"] == 96


def test_nothing_fits_a_tiny_gpu() -> None:
    plan = report(usable=1000)
    assert plan["largest_micro_batch"] == 0
    assert plan["gpu"]["remedies"] == []


def test_every_phase_has_a_report_and_must_fit() -> None:
    changing = ("grow={at: 3, width: 64}", "stages.end={at: [null, 6, null]}")
    plan, plain = report(*changing), report()
    assert plain["phases"] == []
    assert {**plan, "phases": []} == plain, "all stages"
    unified, grown, ended = plan["phases"]
    assert [(p["first"], p["last"], p["about"]) for p in plan["phases"]] == [
        (1, 3, "unified"), (4, 6, "3 stages"), (7, 20, "3 stages without 1"),
    ]  # fmt: skip
    alone = report("model.decoder_channels=[64]", "stages.boundaries=[]", "stages.sampling=uniform")
    assert unified["ranks"] == alone["ranks"]
    assert grown["ranks"] == plain["ranks"]
    assert ended["ranks"] == report("stages.ended=[1]")["ranks"]
    assert not ended["stages"][1]["ranks"]
    # The unified model is wider here, and needs more than the stages.
    usable = (peak(plain) + peak(unified)) / 2
    plan = report(*changing, usable=usable)
    assert [p["gpu"]["fits"] for p in (plan, *plan["phases"])] == [False, False, True, True]
    assert plan["largest_micro_batch"] == report("grow={at: 3, width: 64}", usable=usable)["largest_micro_batch"]
    assert plan["largest_micro_batch"] < 96 / RANKS <= report(usable=usable)["largest_micro_batch"]
    text = io.StringIO()
    Console(file=text, width=150).print(render(plan, "debug"))
    assert "3 stages without 1" in text.getvalue()
    assert f"needs {size(peak(unified))} of" in text.getvalue()


def test_a_gpu_without_bf16() -> None:
    old = dataclasses.replace(parse_gpu("v100-32g"))
    asked = {p: recipe(f"train.precision={p}") for p in ("auto", "fp32", "bf16")}
    auto, fp32 = (predict(asked[p], RANKS, on_gpus=True, gpu=old) for p in ("auto", "fp32"))
    assert auto["ranks"] == fp32["ranks"]
    with pytest.raises(ConfigError, match=r"train.precision = 'bf16': v100-32g does not compute bf16"):
        predict(asked["bf16"], RANKS, on_gpus=True, gpu=old)
