"""`msdiff stages cluster` as a function: methods, recipes to write to, options that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from msdiff_dist.apps.divide_stages import ClusterRequest, cluster, write_boundaries
from msdiff_dist.diffusion.processes.vp import VPProcess
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.recipe import load_recipe
from msdiff_dist.stage_division.intervals import Lengths
from msdiff_dist.stage_division.methods import DenoiserOptions

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    centres = rng.integers(60, 196, (5, 8, 8))
    for i in range(60):
        pixels = np.clip(centres[i % 5] + rng.normal(0, 25, (8, 8)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "debug.yaml").read_text())
    return path


def test_methods_that_need_the_process_alone() -> None:
    assert cluster(ClusterRequest(method="snr", stages=3)).boundaries == [0.348, 0.709]
    assert cluster(
        ClusterRequest(method="timestep", stages=2, process="discrete", fields=["timesteps=100"])
    ).boundaries == [pytest.approx(50, abs=1)]
    slower = cluster(ClusterRequest(method="snr", stages=3, process="vp", fields=["beta_max=10"]))
    assert isinstance(slower.process, VPProcess)
    assert slower.boundaries[0] < 0.348


@pytest.mark.parametrize("process", ["vp", "edm", "discrete"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_optimal_denoiser_on_images(images: Path, tmp_path: Path, process: str, stages: int) -> None:
    plot = tmp_path / "plot.png"
    options = DenoiserOptions(samples=200, alpha=0.8)
    found = cluster(
        ClusterRequest(
            method="optimal-denoiser", stages=stages, process=process, images=images, options=options, plot=plot
        )
    )
    assert len(found.boundaries) == stages - 1
    assert found.boundaries == sorted(set(found.boundaries))
    assert "60 samples" in found.found_by
    with Image.open(plot) as drawn:
        assert drawn.width > 100


def test_the_scale_of_images_matters(images: Path) -> None:
    request = {"method": "optimal-denoiser", "stages": 3, "images": images}
    one, two = (
        cluster(ClusterRequest(**request, options=DenoiserOptions(samples=400, alpha=0.8, value_range=v, eta=eta)))
        for v, eta in (("01", 0.01), ("11", 0.02))
    )
    assert one.boundaries != two.boundaries


@pytest.mark.parametrize("name", ["debug", "quickstart", "fashion_mnist_3stage", "celebahq256_ldm_3stage"])
def test_boundaries_are_written_into_a_recipe_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    before = (RECIPES / f"{name}.yaml").read_text()
    path.write_text(before)
    for boundaries in ([100, 200], [347, 708]):
        write_boundaries(path, boundaries, "msdiff stages cluster --method snr")
    assert load_recipe(path).stages.boundaries == (347, 708)
    expected = yaml.safe_load(before)
    expected["stages"]["boundaries"] = [347, 708]
    assert yaml.safe_load(path.read_text()) == expected
    assert path.read_text().count("# boundaries found by: msdiff stages cluster --method snr\n") == 1
    assert len(path.read_text().splitlines()) <= len(before.splitlines()) + 1


@pytest.mark.parametrize(
    "section",
    [
        "stages: {boundaries: [1, 2], sampling: equal}\n",
        "stages:\n  boundaries:\n    - 1\n    - 2\n  sampling: equal\n",
        "stages:\n  sampling: equal\n",
        "stages:\n  sampling: equal\n  boundaries: [1, 2]  # by hand\n",
    ],
)
def test_all_ways_to_write_the_section(recipe: Path, section: str) -> None:
    text = recipe.read_text()
    values = yaml.safe_load(text)
    start = text.index("stages:\n")
    end = next(i for i in range(start + 8, len(text)) if text[i - 1] == "\n" and text[i] not in " \n")
    recipe.write_text(text[:start] + section + text[end:])
    write_boundaries(recipe, [300, 600], "hand")
    written = yaml.safe_load(recipe.read_text())
    assert written == {**values, "stages": {"boundaries": [300, 600], "sampling": "equal"}}


def test_a_recipe_that_cannot_have_the_boundaries_is_left_alone(recipe: Path) -> None:
    before = recipe.read_text()
    with pytest.raises(ConfigError, match=r"model\.decoder_channels"):
        cluster(ClusterRequest(method="snr", stages=5, write=recipe))
    with pytest.raises(ConfigError, match="trains the process discrete"):
        cluster(ClusterRequest(method="snr", stages=3, process="edm", write=recipe))
    assert recipe.read_text() == before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ClusterRequest(method="snr", stages=3, data="x"), "--data"),
        (ClusterRequest(method="optimal-denoiser", stages=3), "--data = None"),
        (ClusterRequest(method="optimal-denoiser", stages=3, data="a", images=Path("b")), "only one"),
        (ClusterRequest(method="gradient", stages=3), "--run"),
        (ClusterRequest(method="gradient", stages=3, process="vp", run=Path("x")), "--process"),
        (ClusterRequest(method="snr", stages=3, process="ldm"), "Use --process discrete"),
        (ClusterRequest(method="snr", stages=3, process="ve"), "--process = 've'"),
        (ClusterRequest(method="snr", stages=2000), "--stages = 2000"),
        (ClusterRequest(method="snr", stages=3, process="vp", fields=["beta_mox=10"]), "beta_max"),
        (ClusterRequest(method="snr", stages=3, process="vp", fields=["beta_max"]), "key=value"),
        (ClusterRequest(method="snr", stages=3, plot=Path("x.unknown")), "--plot"),
        (ClusterRequest(method="snr", stages=3, lengths=Lengths(min=0.5)), "--min-length"),
        (ClusterRequest(method="optimal-denoiser", stages=3, data="a", lengths=Lengths(min=0.1)), "Algorithm 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(request_: ClusterRequest, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster(request_)


def test_bad_settings_of_the_denoiser_are_refused(images: Path) -> None:
    for fields, name in (({"eta": 0.0}, "--eta"), ({"alpha": 1.5}, "--alpha"), ({"samples": 1}, "--samples")):
        with pytest.raises(ConfigError, match=f"^{name}"):
            DenoiserOptions(**fields)
    with pytest.raises(ConfigError, match=r"--alpha = 0\.9: no boundary of the last stage"):
        cluster(
            ClusterRequest(
                method="optimal-denoiser", stages=3, images=images, options=DenoiserOptions(eta=1e-7, samples=50)
            )
        )
    with pytest.raises(ConfigError, match="--stages = 22"):
        cluster(ClusterRequest(method="optimal-denoiser", stages=22, images=images))
    for image in sorted(images.iterdir())[5:]:
        image.unlink()
    with pytest.raises(DataError, match="at least 10 samples"):
        cluster(ClusterRequest(method="optimal-denoiser", stages=3, images=images))
