"""Folders of images to shards."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.data.make.pack import PackOptions, pack
from msdiff_dist.data.tar_members import samples
from msdiff_dist.errors import DataError


def image(path, width=8, height=8, colour=(255, 0, 0), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if len(colour) == 3 else "RGBA", (width, height), colour).save(path, **save)


def read(out):
    found = {}
    for shard in sorted(out.glob("*.tar")):
        for sample in samples(str(shard)):
            found[json.loads(sample["json"])["source"]] = sample
    return found


def opened(data):
    import io

    return np.asarray(Image.open(io.BytesIO(data)))


def test_sub_folders_are_classes(tmp_path):
    for name in ("cats/a.jpg", "cats/deep/b.png", "wild_dogs/c.jpeg"):
        image(tmp_path / "in" / name)
    packed = pack(tmp_path / "in", tmp_path / "out", PackOptions(samples_per_shard=2))
    assert (packed.dataset.shards, packed.dataset.class_counts, packed.left_out) == (2, {0: 2, 1: 1}, [])
    found = read(tmp_path / "out")
    assert {name: (s["cls"], s["txt"]) for name, s in found.items()} == {
        "cats/a.jpg": (b"0", b"cats"),
        "cats/deep/b.png": (b"0", b"cats"),
        "wild_dogs/c.jpeg": (b"1", b"wild dogs"),
    }
    assert found["cats/a.jpg"]["jpg"] == (tmp_path / "in/cats/a.jpg").read_bytes()


def test_side_car_captions(tmp_path):
    for name in ("a", "b.c"):
        image(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_text(f"the {name}\n")
    image(tmp_path / "in" / "bare.png")
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert {name: s["txt"] for name, s in read(tmp_path / "out").items()} == {"a.png": b"the a", "b.c.png": b"the b.c"}
    assert not packed.dataset.info.classes
    assert [(path.name, "no caption bare.txt" in reason) for path, reason in packed.left_out] == [("bare.png", True)]


def test_size_crops_the_centre_and_resizes(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (0, 0, 255)
    (tmp_path / "in").mkdir()
    Image.fromarray(wide).save(tmp_path / "in" / "wide.png")
    pack(tmp_path / "in", tmp_path / "out", PackOptions(size=8))
    pixels = opened(read(tmp_path / "out")["wide.png"]["png"])
    assert pixels.shape == (8, 8, 3)
    assert (pixels[..., 2] > 200).all()
    assert (abs(pixels[:, 2:6].astype(int) - (0, 0, 255)) < 10).all()


def test_transparency_becomes_white_and_orientation_is_applied(tmp_path):
    image(tmp_path / "in" / "clear.png", colour=(255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "in" / "turned.jpg", width=16, height=8, exif=exif)
    pack(tmp_path / "in", tmp_path / "out")
    found = read(tmp_path / "out")
    assert (opened(found["clear.png"]["png"]) == 255).all()
    assert opened(found["turned.jpg"]["png"]).shape == (16, 8, 3)


def test_unreadable_images_are_left_out_and_named_up_to_a_limit(tmp_path):
    for i in range(3):
        image(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"bad{i}.jpg").write_bytes(b"junk")
    packed = pack(tmp_path / "in", tmp_path / "out", PackOptions(max_bad=3))
    assert packed.dataset.samples == 3
    assert sorted(path.name for path, _ in packed.left_out) == ["bad0.jpg", "bad1.jpg", "bad2.jpg"]
    with pytest.raises(DataError, match=r"--max-bad = 2.*bad\d\.jpg"):
        pack(tmp_path / "in", tmp_path / "again", PackOptions(max_bad=2))
    assert not (tmp_path / "again").exists()


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        pack(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "note.txt").write_text("x")
    with pytest.raises(DataError, match="holds no images"):
        pack(tmp_path / "in", tmp_path / "out")


def test_grey_beside_colour_becomes_colour(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8), 100).save(tmp_path / "in/grey.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "in/other.png")
    pack(tmp_path / "in", tmp_path / "grey")
    assert {opened(s["png"]).shape for s in read(tmp_path / "grey").values()} == {(8, 8)}
    image(tmp_path / "in/red.jpg")
    pack(tmp_path / "in", tmp_path / "mixed")
    found = read(tmp_path / "mixed")
    assert (opened(found["grey.png"]["png"]) == np.full((8, 8, 3), 100)).all()
    assert opened(found["red.jpg"]["jpg"]).shape == (8, 8, 3)
    pack(tmp_path / "in", tmp_path / "one", PackOptions(channels=1))
    assert {opened(s["png"]).shape for s in read(tmp_path / "one").values()} == {(8, 8)}


def test_hidden_files_and_folders_are_no_classes(tmp_path):
    for name in ("cat/a.png", "dog/b.png", ".ipynb_checkpoints/a-checkpoint.png", "cat/._a.png", "__MACOSX/c.png"):
        image(tmp_path / "in" / name)
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.dataset.info.classes == ("cat", "dog")
    assert packed.dataset.samples == 2
    assert {(path.name, reason) for path, reason in packed.left_out} == {
        (name, "is hidden") for name in ("a-checkpoint.png", "._a.png", "c.png")
    }


def test_images_beside_class_folders_are_refused_unless_there_are_to_be_no_classes(tmp_path):
    for name in ("cat/a.png", "dog/b.png", "stray.png"):
        image(tmp_path / "in" / name)
    with pytest.raises(DataError, match=r"stray\.png.*beside the class folders.*--no-classes"):
        pack(tmp_path / "in", tmp_path / "out")
    packed = pack(tmp_path / "in", tmp_path / "out", PackOptions(classes=False))
    assert (packed.dataset.samples, packed.dataset.info.classes) == (3, ())


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"", ""),
        ("\ufeffa caf\u00e9".encode(), "a caf\u00e9"),
        ("a caf\u00e9".encode("utf-16"), "a caf\u00e9"),
    ],
    ids=["empty", "UTF-8 with a mark", "UTF-16"],
)
def test_captions_as_other_systems_write_them(tmp_path, content, caption):
    image(tmp_path / "in" / "DSC_1.JPG")
    (tmp_path / "in" / "dsc_1.TXT").write_bytes(content)
    pack(tmp_path / "in", tmp_path / "out")
    (sample,) = read(tmp_path / "out").values()
    assert sample["txt"] == caption.encode()
    assert "jpg" in sample


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path):
    image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("a caption")
    image(tmp_path / "in" / "latin.png")
    (tmp_path / "in" / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "in" / "pointer.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "in" / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (tmp_path / "in" / "photo.heic").write_bytes(b"x")
    (tmp_path / "in" / "lonely.txt").write_text("x")
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.dataset.samples == 1
    reasons = {path.name: reason for path, reason in packed.left_out}
    expected = {
        "latin.png": "not UTF-8",
        "pointer.png": "git lfs pull",
        "page.jpg": "HTML page",
        "photo.heic": "neither an image of a known format",
        "lonely.txt": "caption without an image",
    }
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[name] for name, words in expected.items())
