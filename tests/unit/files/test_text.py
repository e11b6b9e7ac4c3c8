"""Text and YAML files as people have them: read, or refused with one error that names file and reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.files.text import read_text, read_yaml


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: é".encode("utf-16"), "is UTF-16 text"),
        ("name: é".encode("utf-16-be"), "binary file"),
        ("name: é".encode("latin-1"), "not UTF-8 text (byte 0xe9 at 6)"),
        (b"\x89PNG\r\n\x1a\n\0\0", "binary file"),
        (b"name: a\0b", "binary file"),
    ],
)
def test_what_is_not_text_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_text(path, "CAPTIONS", DataError)
    assert words in str(caught.value)
    assert caught.value.field == "CAPTIONS"
    assert str(path) in str(caught.value)


def test_places_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no", "no such file"), (tmp_path / "loop", "itself")):
        with pytest.raises(ConfigError, match=words):
            read_text(path, "RECIPE")


def test_a_device_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="too many for a text file"):
        read_text(Path("/dev/zero"), "RECIPE")


def test_home_and_byte_order_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_bytes("\ufeffname: é".encode())
    assert read_yaml(Path("~/a.yaml"), "RECIPE") == {"name": "é"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "not a mapping"),
        ("", "not a mapping"),
        ("just words", "not a mapping"),
        ("42", "not a mapping"),
        ("name: [1,\n", "is not YAML"),
        ("name: ${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
        ("name: ${nothing}", "nothing"),
        ("a: *b", "is not YAML"),
        ("a: " + "[" * 3000, "is not YAML|cannot be used"),
        ("a: ${" * 50, "is not YAML|cannot be used"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_yaml_that_is_no_recipe(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(path, "RECIPE")


def test_interpolations_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("home: ${oc.env:HOME}\nname: x\nfolder: runs/${name}\n1: one\n")
    found = read_yaml(tmp_path / "a.yaml", "RECIPE")
    assert found == {"home": os.environ["HOME"], "name": "x", "folder": "runs/x", "1": "one"}
