"""The report in a real browser without a network: it opens without a word of complaint, draws, and can be used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from msdiff_dist.apps.ablation.report import write_report
from msdiff_dist.apps.report.write import Request, report
from tests.unit.apps.ablation.made_results import made_ablation
from tests.unit.apps.report.made_run import make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "report.html"
    file.write_text(report(Request([make_run(folder / "<b>run")], torch.device("cpu"))))
    return file


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_opens_draws_and_slides(browser: object, file: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())

    charts = page.locator(".chart")
    assert charts.count() >= 8
    for i in range(charts.count()):
        charts.nth(i).scroll_into_view_if_needed()
        page.wait_for_selector(f"#chart{i}[data-drawn=step] canvas", timeout=60_000)

    page.wait_for_selector(".chart .legend button")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(251, 251, 250)", "dark": "rgb(21, 24, 28)",
    }[scheme]  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing but tables scrolls sideways

    page.locator("[data-axis=pflop]").click()
    charts.first.scroll_into_view_if_needed()
    page.wait_for_selector("#chart0[data-drawn=pflop] canvas", timeout=60_000)

    shown = page.locator(".grids img:visible")
    assert [shown.count(), shown.get_attribute("data-label")] == [1, "step 12"]
    page.locator(".grids input").fill("0")
    assert [shown.count(), shown.get_attribute("data-label")] == [1, "step 4"]
    assert page.locator(".grids output").inner_text() == "step 4"

    assert page.locator("h1").inner_text() == "<b>run"
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:", "file:"))] == []
    assert [url for url in asked if url.startswith("file:")] == [file.as_uri()]
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_results_of_an_ablation_open_and_draw(browser: object, width: int, scheme: str, tmp_path: Path) -> None:
    write_report(*made_ablation(tmp_path), tmp_path)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((tmp_path / "results.html").as_uri())
    charts = page.locator(".chart")
    assert charts.count() == 4
    for i in range(4):
        charts.nth(i).scroll_into_view_if_needed()
        page.wait_for_selector(f"#chart{i}[data-drawn] canvas", timeout=60_000)
    page.wait_for_selector("#chart0 .legend button")
    assert page.locator("#chart0 .legend button").all_inner_texts() == ["unified", "half", "worse"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    context.close()
