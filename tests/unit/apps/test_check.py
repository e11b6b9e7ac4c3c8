"""The acceptance run: its judgements, and that it sees what is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msdiff_dist.apps.check import families, operators, run
from msdiff_dist.apps.check.findings import Bench, Finding
from msdiff_dist.apps.check.measure import busy_share
from msdiff_dist.errors import ConfigError
from msdiff_dist.models import attention as attention_module


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(device=torch.device("cpu"), small=True, folder=tmp_path)


def test_an_error_within_its_limit_is_ok_and_one_that_is_no_number_is_not() -> None:
    def status(error: float) -> str:
        return Finding.within(
            "group", "name", {"loss": 0.0, "gradients": error}, {"loss": 1.0, "gradients": 1e-3}
        ).status

    assert [status(e) for e in (0.0, 1e-3, 2e-3, math.nan, math.inf)] == ["ok", "ok", "problem", "problem", "problem"]


def test_operators_of_this_cpu_are_right(bench: Bench) -> None:
    assert {f.status for f in operators.operators(bench)} == {"ok"}


def test_a_wrong_operator_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
        out: Tensor = attention_module.attention(q, k, v, "math")
        return out if backend == "math" else out * (1 + 1e-3)

    monkeypatch.setattr(operators, "attention", slightly_wrong)
    wrong = {f.name.split(",")[0] for f in operators.operators(bench) if f.status == "problem"}
    assert wrong == {"sdpa", "auto"}


def test_a_wrong_gradient_of_one_stage_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = families._outcome

    def wrong_at_stage_1(
        case: families._Case, dtype: torch.dtype, device: torch.device, *memory_format: torch.memory_format
    ) -> families._Outcome:
        found = outcome(case, dtype, device, *memory_format)
        factor = 1.0 if dtype == torch.float64 else 1.01
        return families._Outcome(found.loss, found.gradients | {"stage 1": found.gradients["stage 1"] * factor})

    monkeypatch.setattr(families, "_outcome", wrong_at_stage_1)
    monkeypatch.setattr(families, "_RECIPES", {"ldm": families._RECIPES["ldm"]})
    found = [f.status for f in families.families(bench) if "float32" in f.name]
    assert found == ["problem", "problem"], "in both memory formats"


def test_a_group_that_raises_is_a_problem_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(run.GROUPS, "operators", broken)
    monkeypatch.setitem(
        run.GROUPS, "families", lambda bench: iter([Finding(group="families", name="x", status="ok", found="")])
    )
    report = run.run_check(torch.device("cpu"), True, ["operators", "families"], lambda finding: None)
    assert [(f.status, f.found) for f in report.findings] == [("problem", "RuntimeError: no kernel image"), ("ok", "")]
    assert "broken" in report.findings[0].figures["traceback"]
    assert report.status == "problem"


def test_an_unknown_group_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"--only = 'operater'.*Did you mean 'operators'"):
        run.run_check(torch.device("cpu"), True, ["operater"], lambda finding: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_an_absent_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="sees no GPU"):
        run.run_check(torch.device("cuda"), True, [], lambda finding: None)


def test_busy_share_counts_overlapping_spans_once() -> None:
    assert busy_share([]) == 0
    assert busy_share([(0, 1)]) == 1
    assert busy_share([(6, 8), (0, 2), (1, 3), (1, 2)]) == pytest.approx(5 / 8)
