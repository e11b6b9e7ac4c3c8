"""tools/score_agreement.py on planted scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

TOOL = Path(__file__).parents[3] / "tools/score_agreement.py"


def agreement(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def results(path: Path, scores: dict[str, np.ndarray], higher: tuple[str, ...] = (), held_out: str = "a") -> Path:
    """A results.json: scores [variants, seeds, points]."""
    variants, seeds, points = scores["loss"].shape
    numbers: dict[str, Any] = {k: np.where(np.isnan(v), None, v.astype(object)).tolist() for k, v in scores.items()}
    content = {
        "scores": {name: {"higher_is_better": name in higher, "about": {"of": held_out}} for name in scores},
        "variants": {
            f"v{v}": {
                "seeds": {
                    str(s): {"steps": list(range(points)), "scores": {k: numbers[k][v][s] for k in scores}}
                    for s in range(seeds)
                }
            }
            for v in range(variants)
        },
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def rows(output: str) -> list[dict[str, str]]:
    head, _, *lines = ([cell.strip() for cell in line[2:-2].split(" | ")] for line in output.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_correlations_are_scipys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    loss = rng.random((2, 3, 4))
    recall = -loss + 0.4 * rng.random((2, 3, 4))
    scores = {"loss": loss, "m/fid": np.exp(9 * loss), "m/recall": recall, "m/kid": rng.random((2, 3, 4))}
    scores["m/kid"][0, 0, 1] = np.nan
    file = results(tmp_path / "a" / "results.json", scores, higher=("m/recall",))
    ended = agreement(file, "--plot", tmp_path / "plot.png")
    assert ended.returncode == 0, ended.stderr
    fid, rec, kid = rows(ended.stdout)
    assert [fid[k] for k in ("score", "runs", "checkpoints", "all", "95 % interval", "last", "seeds", "v0", "v1")] == [
        "m/fid", "6", "24", "1.00", "1.00 to 1.00", "1.00", "1.00 to 1.00", "1.00", "1.00",
    ]  # fmt: skip
    expected = spearmanr(loss.ravel(), -recall.ravel()).statistic
    assert rec["all"] == f"{expected:.2f}"
    assert rec["last"] == f"{spearmanr(loss[..., -1].ravel(), -recall[..., -1].ravel()).statistic:.2f}"
    assert rec["v1"] == f"{spearmanr(loss[1].ravel(), -recall[1].ravel()).statistic:.2f}"
    of_seeds = [spearmanr(loss[:, s].ravel(), -recall[:, s].ravel()).statistic for s in range(3)]
    assert rec["seeds"] == f"{min(of_seeds):.2f} to {max(of_seeds):.2f}"
    low, high = (float(end) for end in rec["95 % interval"].split(" to "))
    assert low < expected < high < 1
    known = ~np.isnan(scores["m/kid"])
    assert kid["checkpoints"] == "23"
    assert kid["all"] == f"{spearmanr(loss[known], scores['m/kid'][known]).statistic:.2f}"
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_files_are_put_together_where_they_compare(tmp_path: Path) -> None:
    loss = np.arange(8.0).reshape(1, 2, 4)
    files = [
        results(tmp_path / name / "results.json", {"loss": loss, "m/fid": loss}, held_out=of)
        for name, of in (("a", "x"), ("b", "x"), ("c", "y"))
    ]
    together, apart = rows(agreement(*files).stdout)
    assert (together["runs"], together["a v0"], together["b v0"], together["c v0"]) == ("4", "1.00", "1.00", "")
    assert (apart["runs"], apart["c v0"]) == ("2", "1.00")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "is no result of an ablation"),
        ("[]", "no JSON object"),
        ('{"scores": {"loss": {}}, "variants": {}}', "no two scores"),
    ],
)
def test_other_files_are_refused(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    ended = agreement(tmp_path / "results.json")
    assert (ended.returncode, problem in ended.stderr) == (2, True), ended.stderr
