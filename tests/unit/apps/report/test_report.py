"""The report on runs: all is in it, nothing is loaded, no name is markup, and what is broken is named."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msdiff_dist.apps.report.charts import charts_of
from msdiff_dist.apps.report.nearest import _median_distance
from msdiff_dist.apps.report.pictures import sample_grids
from msdiff_dist.apps.report.run_data import MOST_POINTS, read_run
from msdiff_dist.apps.report.serve import ReportServer
from msdiff_dist.apps.report.tables import differing, plan_tables
from msdiff_dist.apps.report.write import Drawn, Request, report, report_at_end
from msdiff_dist.apps.train.costs import model_petaflops_after, step_petaflops
from msdiff_dist.apps.train.plan import plan_phases, plan_run
from msdiff_dist.errors import ConfigError, RunFolderError
from msdiff_dist.training.stage_ends import StageEnds
from tests.unit.apps.report.made_run import BATCH, STEPS, make_run, metrics

CPU = torch.device("cpu")


class Page(HTMLParser):
    """Elements of a page and its texts outside of scripts and styles."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else [] if self._inside else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0], parse_constant=pytest.fail)
        return found


def page_on(*folders: Path) -> Page:
    return Page(report(Request(folders, CPU)))


def test_it_shows_everything_that_a_run_folder_has(tmp_path: Path) -> None:
    page = page_on(make_run(tmp_path / "run"))
    sections = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert sections == {"summary", "plan", "loss", "speed", "optimizer", "samples", "evaluations", "history"}
    titles = {chart["title"] for chart in page.data["charts"]}
    assert titles >= {
        "Loss", "Loss per stage", "Held-out loss per stage", "Held-out loss by noise", "Throughput",
        "Time of a step by phase, on rank 0", "Learning rate", "Gradient norm, before clipping",
    }  # fmt: skip
    grids = [a for tag, a in page.elements if tag == "img"]
    assert [a["data-label"] for a in grids] == ["step 4", "step 8", "step 12"]
    for words in (
        "quickstart", "12.5", "11.25 to 13.75", "says little", "boundaries 442 | 631", "optimizer.lr 0.002 -> 0.001",
        f"{BATCH} samples a step", "step 12", "Planned balance",
    ):  # fmt: skip
        assert words in page.text, words
    assert "could not be shown" not in page.text


def test_it_loads_nothing(tmp_path: Path) -> None:
    page = page_on(make_run(tmp_path / "run"))
    loading = ("src", "href", "srcset", "action", "data", "poster")
    named = [attributes[key] or "" for _, attributes in page.elements for key in loading if key in attributes]
    assert named
    assert all(address.startswith(("#", "data:")) for address in named)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "a&b</script><script>alert(1)", "'\"{{ 7*7 }}"])
def test_names_are_texts(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / name.replace("/", "\u2215"))
    changed = json.dumps({"step": 3, "field": "x", "old": None, "new": name, "time": 0.0})
    (folder / "recipe_changes.jsonl").write_text(changed + "\n")
    page, plain = page_on(folder), page_on(make_run(tmp_path / "plain"))
    assert " ".join(name.split()) in page.text
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert len(page.scripts) == len(plain.scripts)


def test_what_is_broken_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.dumps(metrics(step)) for step in range(1, STEPS + 1)]
    lines[2] = json.dumps({**metrics(3), "loss": float("nan"), "lr": float("inf"), "seconds": None})
    (run / "metrics.jsonl").write_text("\n".join(lines)[:-40])
    (run / "evaluations.jsonl").write_text('{"metrics": {"fid": NaN}, "step": 5}\n{"torn')
    (run / "samples/step_00000008.png").write_bytes((run / "samples/step_00000008.png").read_bytes()[:50])
    (run / "recipe_changes.jsonl").write_text("[]\n")
    page = page_on(run)
    for words in (
        "metrics.jsonl: 1 lines are torn", "1 steps have a loss that is no finite number",
        "evaluations.jsonl: 1 lines are torn", "step_00000008.png is not a readable image",
        "recipe_changes.jsonl cannot be read",
    ):  # fmt: skip
        assert words in page.text, words
    loss = page.data["sources"]["run0"]["loss"]
    assert loss[2] is None
    assert len(loss) == STEPS - 1
    assert [a["data-label"] for tag, a in page.elements if tag == "img"] == ["step 4", "step 12"]


@pytest.mark.parametrize("recipe", ["name: [", "name: mine\nmodel: 3\n", ""])
def test_without_a_readable_recipe_the_metrics_are_shown(tmp_path: Path, recipe: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(recipe)
    page = page_on(run)
    assert "could not be shown" in page.text
    assert {"Loss", "Loss per stage"} <= {chart["title"] for chart in page.data["charts"]}


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "evaluations.jsonl", "recipe_changes.jsonl"):
        (run / name).unlink()
    page = page_on(run)
    assert "There is no metrics.jsonl." in page.text
    assert page.data["charts"] == []


def test_a_corrupt_checkpoint_costs_the_strip_alone(tmp_path: Path) -> None:
    page = page_on(make_run(tmp_path / "run", "preview.every=5"))
    assert "No image was sampled: " in page.text
    assert "Loss" in {chart["title"] for chart in page.data["charts"]}


def test_a_checkpoint_is_sampled_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "preview.every=5")
    kept: dict[Path, Drawn] = {}
    first = Page(report(Request([run], CPU), kept))
    (sampled,) = kept.values()
    (run / f"checkpoints/step_{STEPS:08d}/checkpoint.json").unlink()  # else what is said would be another thing
    assert sampled.problem
    second = Page(report(Request([run], CPU), kept))
    assert first.text.count(sampled.problem) == second.text.count(sampled.problem) == 1
    later = run / f"checkpoints/step_{STEPS + 1:08d}"
    later.mkdir()
    report(Request([run], CPU), kept)
    assert list(kept)[1:] == [later]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no run folder"):
        report(Request([tmp_path], CPU))


def test_columns_are_those_of_the_metrics(tmp_path: Path) -> None:
    source = charts_of([read_run(make_run(tmp_path / "run"), "run")]).sources
    assert source["run0"]["loss"] == pytest.approx([1 / step for step in range(1, STEPS + 1)], rel=1e-5)
    assert source["run0"]["pflop"] == pytest.approx([1e-4 * step for step in range(1, STEPS + 1)], rel=1e-5)
    assert source["run0"]["seconds_optimizer"] == pytest.approx([0.8] * STEPS)  # on top of data and compute
    assert source["run0"]["below_optimizer"] == pytest.approx([0.6] * STEPS)
    assert source["held0"]["step"] == [4, 8, 12]
    assert source["held0"]["raw"] == pytest.approx([0.75, 0.375, 0.25])
    assert source["bins0"]["at12"] == [0.3, 0.2, 0.1]


def test_long_runs_are_averaged(tmp_path: Path) -> None:
    steps = 2 * MOST_POINTS + 1
    source = charts_of([read_run(make_run(tmp_path / "run", steps=steps), "run")]).sources["run0"]
    assert len(source["loss"]) <= MOST_POINTS
    groups = np.split(1 / np.arange(1, steps + 1), range(3, steps, 3))
    assert source["loss"] == pytest.approx([float(group.mean()) for group in groups], rel=1e-5)


def test_ranks_of_the_metrics_are_shown_where_there_are_any(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [{**metrics(s), "busy_seconds": [1.0, 3.0, 2.0], "memory_bytes": 2**31, "mfu": 0.25} for s in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    charts = charts_of([read_run(run, "run")])
    assert charts.sources["run0"]["slowest"] == [1, 1]
    assert charts.sources["run0"]["busy_mean"] == [2, 2]
    assert charts.sources["run0"]["memory"] == [2, 2]
    assert {"Slowest rank", "Memory of the fullest rank", "Model FLOP/s utilization"} <= {
        chart.title for chart in charts.charts
    }


def test_plan_and_compute(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", world_size=4), "run")
    assert run.recipe
    placement, compute = plan_tables(run)
    plan = plan_run(run.recipe, 4)
    shown = np.zeros(plan.placement.num_stages)
    for name, *cells, _ in placement.rows:
        first, _, last = name.partition(" to ")
        shown += [(int(last or first) - int(first) + 1) * int(cell or 0) for cell in cells]
    assert shown.tolist() == list(plan.quotas.quotas_K)
    assert float(compute.rows[-1][4]) == pytest.approx(STEPS * step_petaflops(plan.quotas, plan.cost_K), rel=1e-3)
    assert sum(float(row[4]) for row in compute.rows[:-1]) == pytest.approx(float(compute.rows[-1][4]), rel=1e-3)


def test_plan_and_compute_of_each_phase(tmp_path: Path) -> None:
    # Stage 0 ends at a step that the recipe does not know: patience decided it.
    end = ["stages.end.patience=1", "validation={fraction: 0.1, every: 2}"]
    folder = make_run(tmp_path / "run", "train.steps=40", "grow.at=4", *end, world_size=4)
    index = folder / f"checkpoints/step_{STEPS:08d}/checkpoint.json"
    ends = StageEnds(ended={0: 10}, lowest_K=(1.0, 1.0, 1.0), waited_K=(1, 0, 0))
    index.write_text(json.dumps({**json.loads(index.read_text()), "stage_ends": ends.stored()}))
    run = read_run(folder, "run")
    assert run.recipe
    *placements, compute = plan_tables(run)
    planned = plan_phases(run.recipe, 4, ends=ends)
    assert [table.title.partition(" in a step")[2] for table in placements] == [
        " of steps 1 to 4: unified", " of steps 5 to 10: 3 stages", " of steps 11 to 40: 3 stages without 0",
    ]  # fmt: skip
    assert [table.head[1:-1] for table in placements] == [["unified"], *[["stage 0", "stage 1", "stage 2"]] * 2]
    for table, (_, plan) in zip(placements, planned, strict=True):
        assert f"balance {plan.placement.balance(plan.cost_K):.3f}" in table.notes[0]
    assert all(not row[1] for row in placements[2].rows)
    assert [row[0] for row in compute.rows] == ["unified", "stage 0", "stage 1", "stage 2", "all"]
    assert float(compute.rows[-1][4]) == pytest.approx(model_petaflops_after(planned, STEPS), rel=1e-3)
    unified, _, _, _, whole = (float(row[1].rstrip(" %")) for row in compute.rows)
    assert (unified, whole) == (pytest.approx(100 * 4 / STEPS, abs=0.1), 100)
    assert "3 stages without 0" in page_on(folder).text


def test_differences_between_runs(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "optimizer.lr=0.5", "name=other", world_size=2)
    table = differing([read_run(a, "a"), read_run(b, "b")])
    assert table
    assert table.head == ["field", "a", "b"]
    assert table.rows == [["optimizer.lr", "0.002", "0.5"]]
    page = page_on(a, b)
    assert "optimizer.lr" in page.text
    assert {"Loss of stage 0", "Loss of stage 2"} <= {chart["title"] for chart in page.data["charts"]}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = page_on(make_run(tmp_path / "x/run"), make_run(tmp_path / "y/run"))
    assert {"x/run", "y/run"} <= {line["label"] for chart in page.data["charts"] for line in chart["series"]}


def test_large_grids_become_smaller(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    for step in range(20, 100):
        (run / f"samples/step_{step:08d}.png").symlink_to(tmp_path / "noise.png")
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=1)
    for step in range(21, 99):
        (run / f"samples/step_{step:08d}.png").unlink()
    grids = sample_grids(read_run(run, "run"), [])
    assert [grid.label for grid in grids] == ["step 4", "step 8", "step 12", "step 20", "step 99"]
    assert sum(len(grid.uri) for grid in grids) < 2_000_000 * 4 / 3 + 1000


def test_distance_to_the_nearest_other_image() -> None:
    features_MD = np.random.default_rng(0).normal(size=(30, 5))
    features_MD /= np.linalg.norm(features_MD, axis=1, keepdims=True)
    nearest = [min(1 - a @ b for j, b in enumerate(features_MD) if j != i) for i, a in enumerate(features_MD)]
    assert _median_distance(features_MD) == pytest.approx(np.median(nearest))


def test_at_the_end_of_a_run_a_line_says_what_happened(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert report_at_end(run) == f"report: {run / 'report.html'}"
    assert "<!doctype html>" in (run / "report.html").read_text()[:20]
    line = report_at_end(tmp_path / "missing")
    assert line.startswith("no report: RunFolderError")
    assert "\n" not in line


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReportServer]:
    run = make_run(tmp_path / "run")
    with ReportServer([run], lambda: report(Request([run], CPU, refresh_s=1.0)), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(server: ReportServer, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def test_a_served_report_changes_with_its_run(server: ReportServer, tmp_path: Path) -> None:
    status, before = asked(server, "/")
    assert status == 200
    state = asked(server, "/state")
    assert asked(server, "/state") == state
    with (tmp_path / "run/metrics.jsonl").open("a") as f:
        f.write(json.dumps(metrics(STEPS + 1)) + "\n")
    assert asked(server, "/state") != state
    loss = [Page(content).data["sources"]["run0"]["loss"] for content in (before, asked(server, "/")[1])]
    assert [len(column) for column in loss] == [STEPS, STEPS + 1]


def test_it_serves_nothing_else_and_nobody_else(server: ReportServer) -> None:
    assert asked(server, "/recipe.yaml")[0] == 404
    assert asked(server, "/../run/recipe.yaml")[0] == 404
    assert asked(server, "/", Host="evil.example:80")[0] == 403
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_one_message(server: ReportServer) -> None:
    with pytest.raises(ConfigError, match="is in use"):
        ReportServer([], str, server.server_port)
