"""Data sets of pictures: icons, OpenMoji, clip art, stamps; and MNIST, from the files of their packages."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from msdiff_dist.cli.main import app
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make import packages
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.data.make.packages import Package, data_of
from msdiff_dist.data.tar_members import samples
from msdiff_dist.errors import ConfigError, DataError
from tests.unit.data.make.test_datasets import write_fashion

RED, BLUE = (255, 0, 0), (0, 0, 255)


def needs_resvg() -> None:
    pytest.importorskip("resvg_py", reason="the extra `data` is not installed")


def rect(colour: str, edge: int = 16) -> str:
    return f'<rect width="{edge}" height="{edge}" fill="{colour}"/>'


def icon_set(folder: Path, name: str, icons: dict[str, object], licence: str = "MIT", **rest: object) -> None:
    info = {
        "name": f"{name.title()} Icons",
        "author": {"name": "A. Painter", "url": f"https://example.org/{name}"},
        "license": {"title": licence, "spdx": licence},
        "palette": rest.pop("palette", True),
    }
    (folder / "json").mkdir(parents=True, exist_ok=True)
    content = {"prefix": name, "info": info, "icons": icons, **rest}
    (folder / "json" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A package of three sets, of which the plain one has other sizes and what is no sample."""
    folder = tmp_path / "package"
    icon_set(folder, "warm", {f"red-{i}": {"body": rect("#f00")} for i in range(11)}, categories={"Hot": ["red-3"]})
    icon_set(folder, "cold", {f"blue-{i}": {"body": rect("#00f")} for i in range(11)}, "CC-BY-SA-4.0")
    plain: dict[str, object] = {
        "wide": {"body": '<rect width="32" height="16" fill="currentColor"/>', "width": 32},
        "moved": {"body": '<rect x="-8" y="4" width="24" height="24" fill="currentColor"/>', "left": -8, "top": 4},
        "old": {"body": rect("#000"), "hidden": True},
        "broken": {"body": "<rect"},
        "blank": {"body": rect("#fff")},
        "none": {},
        "flat": {"body": rect("#000"), "height": 0},
    }
    icon_set(folder, "line", plain, palette=False, aliases={"broad": {"parent": "wide"}}, width=24, height=24)
    return folder


def made(out: Path) -> dict[str, tuple[np.ndarray, str, dict[str, object]]]:
    """(pixels, caption, about) of every sample, by the name of its picture."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        for sample in samples(str(shard)):
            about = json.loads(sample["json"])
            with tarfile.open(shard) as archive:
                member = archive.extractfile(f"{about['key']}.png")
                assert member is not None
                pixels = np.asarray(Image.open(member))
            found[about["source"]] = (pixels, sample["txt"].decode(), about)
    return found


@pytest.mark.parametrize("nproc", [1, 2])
def test_icons_of_colour_are_drawn_named_and_attributed(tmp_path: Path, sets: Path, nproc: int) -> None:
    needs_resvg()
    out = tmp_path / "out"
    written = prepare("icons", out, sets, shards=2, size=24, sets="warm,cold", licences="mit,CC-BY-SA-4.0", nproc=nproc)
    found = made(out)
    assert (written.samples, written.shards, written.left_out) == (20, 2, ())
    for name, (pixels, caption, about) in found.items():
        kind, icon = name.split(":")
        assert (pixels == (BLUE if kind == "cold" else RED)).all()
        assert pixels.shape == (24, 24, 3)
        category = "hot, " if icon == "red-3" else ""
        assert caption == f"{icon.replace('-', ' ')}, {category}{kind} icons"
        assert about["label"] == ["cold", "warm"].index(kind)
    info = json.loads((out / "dataset.json").read_text())
    assert [(c["name"], c["label"]) for c in info["classes"]] == [("cold", 0), ("warm", 1)]
    assert info["licence"] == "CC-BY-SA-4.0, MIT"
    cold = {"part": "cold", "author": "A. Painter", "licence": "CC-BY-SA-4.0", "url": "https://example.org/cold"}
    assert info["attributions"][0] == cold
    config = DataConfig(shards=str(out), image_size=24, channels=3, num_classes=2, lanes=1, shuffle=0)
    assert next(StepLoader(config, 0, 20)).x_nCHW.shape == (20, 3, 24, 24)


def test_icons_of_one_colour_are_black_on_white_centred_and_what_is_none_is_listed(tmp_path: Path, sets: Path) -> None:
    needs_resvg()
    written = prepare("icons", tmp_path / "out", sets, size=32, sets="plain")
    found = made(tmp_path / "out")
    assert set(found) == {"line:wide", "line:moved"}
    wide, moved = found["line:wide"][0].astype(int), found["line:moved"][0].astype(int)
    # A body of 32x16 in a box of 32x24, squared to 32x32: four rows of white above.
    assert wide.shape == (32, 32)
    assert (wide[4:20] == 0).all()
    assert (wide[:4] == 255).all()
    assert (wide[20:] == 255).all()
    assert (moved == 0).all()
    reasons = dict(written.left_out)
    assert set(reasons) == {"line:broken", "line:blank", "line:none", "line:flat"}
    assert "white" in reasons["line:blank"]
    assert "body" in reasons["line:none"]
    assert "size" in reasons["line:flat"]


def test_groups_of_sets_take_those_of_permissive_licences(tmp_path: Path, sets: Path) -> None:
    needs_resvg()
    assert prepare("icons", tmp_path / "colour", sets, size=16).info.classes == ("warm",)
    assert prepare("icons", tmp_path / "all", sets, size=16, sets="all").info.classes == ("line", "warm")
    listed = {name: json.loads((sets / "json" / f"{name}.json").read_text())["info"] for name in ("warm", "cold")}
    listed["cold"]["palette"] = False
    (sets / "collections.json").write_text(json.dumps(listed))
    both = prepare(
        "icons", tmp_path / "listed", sets, size=16, sets="colour", licences="CC-BY-SA-4.0,MIT", split="test"
    )
    assert both.info.classes == ("warm",)
    assert both.samples == 1


def test_the_command_lists_what_it_skipped(tmp_path: Path, sets: Path) -> None:
    needs_resvg()
    options = ["--source", str(sets), "--sets", "line", "--size", "16", "--licences", "MIT", "--nproc", "1"]
    done = CliRunner().invoke(app, ["data", "prepare", "icons", *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "skipped 4 pictures:" in done.output
    assert "line:blank: is white all over" in done.output
    assert set(made(tmp_path / "out")) == {"line:wide", "line:moved"}


@pytest.mark.parametrize(
    ("licences", "classes"),
    [("MIT,Apache-2.0,CC0", ["warm"]), ("cc-by-sa", ["cold"]), ("CC-BY-SA-4.0,mit", ["cold", "warm"])],
)
def test_licences_are_known_by_name_or_name_and_version(
    tmp_path: Path, sets: Path, licences: str, classes: list[str]
) -> None:
    needs_resvg()
    assert list(prepare("icons", tmp_path / "out", sets, size=8, licences=licences).info.classes) == classes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sets": "colour", "licences": "CC-BY"}, ["--sets", "none of the 2 sets"]),
        ({"sets": "warn"}, ["--sets", "'warn'", "Did you mean 'warm'"]),
        ({"sets": "warm,"}, ["--sets", "between two commas"]),
        ({"sets": "warm,warm"}, ["--sets", "twice"]),
        ({"sets": "warm,cold"}, ["--sets", "cold is CC-BY-SA-4.0", "--licences"]),
        ({"sets": "warm", "licences": "CC-BY-SA-4.0"}, ["--sets", "warm is MIT"]),
        ({"sets": "plain", "licences": "CC-BY-SA-4.0"}, ["--sets", "none of the 1 sets", "the sets have MIT"]),
        ({"licences": "MTI"}, ["--licences", "'MTI'", "Did you mean 'MIT'"]),
        ({"size": 0}, ["--size", "0"]),
    ],
)
def test_unusable_choices_are_named(tmp_path: Path, sets: Path, options: dict[str, object], words: list[str]) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        prepare("icons", tmp_path / "out", sets, **options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "words"),
    [("{", "is no JSON"), ("[]", "is no icon set"), ("{}", "no `info`"), ('{"info": {"name": "x"}}', "author")],
)
def test_files_that_are_no_sets_are_named(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "x.json").write_text(file)
    with pytest.raises(DataError, match=rf"x\.json.*{words}"):
        prepare("icons", tmp_path / "out", tmp_path / "sets")


def test_without_resvg_the_command_to_install_it_is_given(
    tmp_path: Path, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msdiff_dist.data.make.datasets.svg.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install resvg-py"):
        prepare("icons", tmp_path / "out", sets)


def test_icons_that_name_files_or_are_nested_deep_are_skipped(tmp_path: Path) -> None:
    needs_resvg()
    Image.new("RGB", (16, 16), RED).save(tmp_path / "secret.png")
    shown = f'<image width="16" height="16" xlink:href="{tmp_path}/secret.png"/>'
    own = '<g id="a"><rect width="16" height="16" fill="#00f"/></g><use xlink:href="#a"/>'
    nested = {f"deep-{n}": {"body": "<g>" * n + rect("#00f") + "</g>" * n} for n in (90, 110, 50_000)}
    icon_set(tmp_path / "package", "odd", {"shown": {"body": shown}, "own": {"body": own}, **nested})
    written = prepare("icons", tmp_path / "out", tmp_path / "package", size=16)
    reasons = dict(written.left_out)
    assert set(reasons) == {"odd:shown", "odd:deep-110", "odd:deep-50000"}
    assert "another file" in reasons["odd:shown"]
    assert "nested 112 deep" in reasons["odd:deep-110"]
    assert all((pixels == BLUE).all() for pixels, _, _ in made(tmp_path / "out").values())


def test_options_of_other_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--sets.*no meaning for digits"):
        prepare("digits", tmp_path / "out", sets="noto")


@pytest.mark.parametrize("kind", ["svg", "72x72"])
def test_openmoji_has_names_tags_and_groups(tmp_path: Path, kind: str) -> None:
    if kind == "svg":
        needs_resvg()
    folder = tmp_path / "package"
    (folder / "color" / kind).mkdir(parents=True)
    (folder / "data").mkdir()
    entries = []
    for i in range(3):
        entries.append(
            {
                "hexcode": f"1F60{i}",
                "group": "faces" if i else "animals",
                "annotation": f"face {i}",
                "tags": "happy, face",
                "openmoji_tags": "smile, happy" if i else "",
            }
        )
        if kind == "svg":
            head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
            (folder / "color" / kind / f"1F60{i}.svg").write_text(f"{head}{rect('#f00', 72)}</svg>")
        else:
            Image.new("RGBA", (72, 72), (255, 0, 0, 255)).save(folder / "color" / kind / f"1F60{i}.png")
    entries.append({"hexcode": "0000", "group": "faces", "annotation": "gone", "tags": "", "openmoji_tags": ""})
    (folder / "data" / "openmoji.json").write_text(json.dumps(entries))
    written = prepare("openmoji", tmp_path / "out", folder, size=36)
    assert written.info.classes == ("animals", "faces")
    assert [name for name, _ in written.left_out] == ["0000"]
    found = made(tmp_path / "out")
    assert {name: caption for name, (_, caption, _) in found.items()} == {
        "1F600": "face 0, happy, face",
        "1F601": "face 1, happy, face, smile",
        "1F602": "face 2, happy, face, smile",
    }
    assert all((pixels == RED).all() and pixels.shape == (36, 36, 3) for pixels, _, _ in found.values())


def test_clip_art_of_any_size_stands_in_the_middle_on_white(tmp_path: Path) -> None:
    root = tmp_path / "png"
    for name in ("animals/big_brown-bear.png", "food/fruit/apple.png"):
        (root / name).parent.mkdir(parents=True)
        Image.new("RGBA", (80, 40), (255, 0, 0, 255)).save(root / name)
    (root / "food" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "readme.png").write_bytes(b"lies in no class")
    written = prepare("clipart", tmp_path / "out", root, size=32)
    assert written.info.classes == ("animals", "food")
    assert [name for name, _ in written.left_out] == ["food/torn.png"]
    found = made(tmp_path / "out")
    pixels, caption, about = found["animals/big_brown-bear.png"]
    assert (caption, about["label"]) == ("big brown bear", 0)
    assert (pixels[8:24] == RED).all()
    assert (pixels[:8] == 255).all()
    assert (pixels[24:] == 255).all()
    assert found["food/fruit/apple.png"][2]["label"] == 1


def test_stamps_have_the_english_line_of_their_texts(tmp_path: Path) -> None:
    root = tmp_path / "stamps"
    (root / "plants" / "trees").mkdir(parents=True)
    for name in ("oak", "oak_mirror", "old_elm"):
        Image.new("RGBA", (8, 8), (0, 0, 255, 255)).save(root / "plants" / "trees" / f"{name}.png")
    (root / "plants" / "trees" / "oak.txt").write_text("An oak—with acorns.\nde.utf8=Eine Eiche.\n", encoding="utf-8")
    (root / "plants" / "trees" / "oak.svg").write_text("the drawing of oak.png, which is taken")
    prepare("stamps", tmp_path / "out", root, size=16)
    captions = {name.split("/")[-1]: caption for name, (_, caption, _) in made(tmp_path / "out").items()}
    oak = "An oak—with acorns."
    assert captions == {"oak.png": oak, "oak_mirror.png": oak, "old_elm.png": "old elm"}


def test_mnist_is_read_from_its_package_in_its_own_size_or_padded(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    pixels, labels = write_fashion(tmp_path / "package" / "data", packed=False)
    for size, edge in ((None, 0), (32, 2)):
        out = tmp_path / f"out{edge}"
        written = prepare("mnist", out, tmp_path / "package", size=size, split="test", shards=2)
        assert written.info.licence == "CC BY-SA 3.0"
        config = DataConfig(
            shards=str(out), image_size=28 + 2 * edge, channels=1, num_classes=10, lanes=1, shuffle=0, captions=True
        )
        step = next(StepLoader(config, 0, 20))
        at = [int(key) for key in step.keys]
        inner = step.x_nCHW[:, 0, edge : 28 + edge, edge : 28 + edge]
        assert (inner.numpy() == pixels[at]).all()
        assert step.x_nCHW.sum() == pixels.sum()
        assert step.label_n.tolist() == labels[at].tolist()
        assert step.captions[at.index(7)] == "a handwritten digit 7"


NPM = Package(kind="npm", name="@some/data", version="1.0.0", folder="package")


def test_a_package_is_fetched_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`npm` is a script that packs a folder, as the program does."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "list.json").write_text("[]")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\nset -e\necho "$@" >> {tmp_path}/asked\ntar czf some-data.tgz -C {tmp_path} package\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        folder = data_of(NPM, None, "list.json")
        assert (folder / "list.json").read_text() == "[]"
    assert folder.is_relative_to(packages.cache_folder())
    assert (tmp_path / "asked").read_text() == "pack @some/data@1.0.0\n"
    with pytest.raises(DataError, match=r"other\.json not found.*npm pack @some/data@1\.0\.0 && tar xzf"):
        data_of(NPM, None, "other.json")


@pytest.mark.parametrize("fails", [True, False])
def test_what_cannot_be_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    if fails:
        npm = tmp_path / "npm"
        npm.write_text("#!/bin/sh\necho no such host >&2\nexit 1\n")
        npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"npm pack @some/data@1\.0\.0 && tar xzf") as caught:
        data_of(NPM, None, ".")
    assert ("no such host" if fails else "there is no npm") in str(caught.value)
    debian = Package(kind="Debian", name="some-data", folder="usr/share/some-data-of-no-package")
    with pytest.raises(DataError, match="apt-get install some-data"):
        data_of(debian, None, ".")
