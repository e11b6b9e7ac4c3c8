"""The report on an ablation of known curves, and its scores.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msdiff_dist.apps.ablation.report import write_report
from msdiff_dist.apps.ablation.results import results
from msdiff_dist.apps.ablation.score_file import NAME, ScoreFile, ScoreSet, read_scores, training_compute
from msdiff_dist.errors import ConfigError, RunFolderError
from tests.unit.apps.ablation.made_results import SETS, STEPS, made_ablation


def test_ratios_of_lines_in_the_logarithm_of_compute(tmp_path: Path) -> None:
    config, trials = made_ablation(tmp_path)
    found = results(config, trials)
    assert found.scores == ("loss", "mobilenet/fid", "mobilenet/precision", "mobilenet/recall")
    for score in found.scores:
        for at in found.reached["half"][score]:
            assert (at.ratio, at.low, at.high) == tuple([pytest.approx(0.5)] * 3), (score, at)
        quarter, *others = found.reached["worse"][score]
        assert quarter.ratio == pytest.approx(4)
        assert [(at.ratio, at.above) for at in others] == [(None, pytest.approx(x)) for x in (2.0, 1.0, 1.0)]


def test_files(tmp_path: Path) -> None:
    config, trials = made_ablation(tmp_path)
    markdown = write_report(config, trials, tmp_path)
    assert "| half | 0.50 (0.50 to 0.50) |" in markdown
    assert "> 1.00, not reached (> 1.00)" in markdown
    assert "### FID, mobilenet" in markdown
    assert (tmp_path / "results.md").read_text() == markdown
    assert "&gt; 1.00, not reached (&gt; 1.00)" in (tmp_path / "results.html").read_text()
    found = json.loads((tmp_path / "results.json").read_text())
    precision = found["variants"]["unified"]["scores"]["mobilenet/precision"]
    assert found["scores"]["mobilenet/precision"]["higher_is_better"]
    assert precision["best"] == precision["last"] == max(precision["mean"])
    levels = found["variants"]["half"]["scores"]["mobilenet/precision"]["levels"]
    assert [at["score"] for at in levels] == pytest.approx([*precision["mean"][1:], precision["best"]])


def test_compute_by_noise(tmp_path: Path) -> None:
    config, trials = made_ablation(tmp_path)
    markdown = write_report(config, trials, tmp_path)
    assert "### Compute to the baseline's last held-out loss, by noise" in markdown
    assert "last held-out loss, by noise" in (tmp_path / "results.html").read_text()
    found = json.loads((tmp_path / "results.json").read_text())["variants"]
    ratios = [at["ratio"] for at in found["half"]["tenths"]]
    assert ratios == pytest.approx([0.25 ** (t / 9) for t in range(10)])
    assert [at["above"] for at in found["worse"]["tenths"][1:]] == pytest.approx([1.0] * 9)
    assert len(found["unified"]["seeds"]["0"]["loss_per_tenth"]) == 10
    # Scores that earlier versions took have no tenths.
    for trial in trials:
        file = read_scores(trial.folder)
        for step in STEPS:
            file.add(SETS[0], step, "loss", {"loss": file.values(SETS, step)["loss"]})
        file.write()
    assert "by noise" not in write_report(config, trials, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["variants"]["half"]["tenths"] == []


def test_compute_to_the_last_scores_of_other_baselines(tmp_path: Path) -> None:
    config, trials = made_ablation(tmp_path)
    found = results(replace(config, baselines=("worse",)), trials)
    # It takes four times the compute of `unified` to any score, and eight times that of `half`.
    for score in found.scores:
        assert found.last_of["worse"]["unified"][score].ratio == pytest.approx(1 / 4)
        at = found.last_of["worse"]["half"][score]  # at its first point, up to rounding
        assert (at.ratio or at.below) == pytest.approx(1 / 8)
    markdown = write_report(replace(config, baselines=("worse",)), trials, tmp_path)
    assert "| unified | 0.25 (0.25 to 0.25) |" in markdown
    assert "| worse | 1 |" in markdown
    last = json.loads((tmp_path / "results.json").read_text())["variants"]["unified"]["scores"]["loss"]["last_of"]
    assert last["worse"]["ratio"] == pytest.approx(1 / 4)
    for name in ("unified", "none"):
        with pytest.raises(ConfigError, match=name):
            replace(config, baselines=(name,))


def test_one_seed_and_nothing_scored(tmp_path: Path) -> None:
    config, trials = made_ablation(tmp_path, seeds=(4,))
    markdown = write_report(config, trials, tmp_path)
    assert "| half | 0.50 | 0.50 | 0.50 | 0.50 |" in markdown
    assert "±" not in markdown
    assert "One seed" in markdown
    for trial in trials[1:]:
        (trial.folder / NAME).unlink()
    assert "| half | not yet known |" in write_report(config, trials, tmp_path)
    (trials[0].folder / NAME).unlink()
    assert (
        "Nothing was scored yet" in (write_report(config, trials, tmp_path), (tmp_path / "results.html").read_text())[1]
    )


def test_scores_are_kept_under_what_identifies_them(tmp_path: Path) -> None:
    file = ScoreFile(tmp_path / NAME)
    file.add(SETS[0], 10, "loss", {"loss": 1.5})
    file.petaflops[10] = 3.0
    file.write()
    again = read_scores(tmp_path)
    assert again == file
    assert again.values(SETS, 10) == {"loss": 1.5}
    other = ScoreSet(prefix="", metrics=("loss",), about={"of": "other samples"}, label="held-out loss")
    assert again.values([other], 10) == {}
    assert [again.missing(scores, 10) for scores in (*SETS, other)] == [[], ["fid", "prdc"], ["loss"]]
    for content, problem in (("{", "no JSON"), ('{"format": 9}', "format 2"), ('{"format": 2}', "no scores by step")):
        (tmp_path / NAME).write_text(content)
        with pytest.raises(RunFolderError, match=problem):
            read_scores(tmp_path)
    (tmp_path / NAME).write_text('{"settings": {}, "scores": {"10": 1.0}}')  # as the first format was
    assert read_scores(tmp_path).sets == {}


def test_compute_is_what_the_run_has_counted(tmp_path: Path) -> None:
    assert training_compute(tmp_path, {step: step / 2 for step in STEPS}) == {10: 5.0, 20: 10.0, 40: 20.0, 80: 40.0}
    # A run whose steps cost twice as much from step 21 on, and whose last line was torn by a kill.
    lines = [json.dumps({"step": n, "petaflops": n * 0.5 if n <= 20 else n - 10.0}) for n in range(1, 80)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 80, "petafl']))
    assert training_compute(tmp_path, {step: step / 2 for step in STEPS}) == {10: 5.0, 20: 10.0, 40: 30.0, 80: 40.0}
