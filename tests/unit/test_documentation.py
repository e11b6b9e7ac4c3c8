"""What the documentation points at exists: links, files, verbs and options of every `msdiff` command that it shows."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from msdiff_dist.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for folder in (".", "docs/**", "slurm", ".github/**") for p in ROOT.glob(f"{folder}/*.md"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|[\s`(/])msdiff( +[^\n`#;|]+)")
FILE = re.compile(r"(?<![\w/.-])(?:msdiff_dist|tools|tests|docs|recipes|slurm)/[\w./-]*[\w/]")
TO_BE_WRITTEN = {"recipes/mine.yaml", "slurm/mine.yaml"}
MSDIFF = typer.main.get_command(app)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    targets = [t.partition("#")[0] for t in LINK.findall(CODE.sub("", page.read_text()))]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_every_page_is_in_the_sites_contents() -> None:
    """Of docs/ all but the index itself; the site is not built where a page is in no table of contents."""
    folder = ROOT / "docs"
    tables = re.findall(r"^```\{toctree\}\n(.*?)^```", (folder / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    entries = [line for table in tables for line in table.splitlines() if line and not line.startswith(":")]
    listed = {page for entry in entries for page in folder.glob(f"{entry}.md")}
    assert listed == set(folder.rglob("*.md")) - {folder / "index.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_code_exist(page: Path) -> None:
    named = {name for code in CODE.findall(page.read_text()) for name in FILE.findall(code)} - TO_BE_WRITTEN
    assert not [name for name in named if not (ROOT / name).exists()]


def commands_in(text: str) -> Iterator[list[str]]:
    """The words after each `msdiff`, and after each ` -- ` of `msdiff array`, which runs another."""
    for found in COMMAND.findall(re.sub(r"\s*\\\n[# ]*", " ", text)):
        words = shlex.split(found.replace("'", " ").replace('"', " "))
        while "--" in words:
            end = words.index("--")
            yield words[:end]
            words = words[end + 1 :]
        yield words


def unknown_in(words: list[str]) -> list[str]:
    """The verb, or those options, that `msdiff` does not have."""
    command: Any = MSDIFF
    words = list(itertools.takewhile(lambda word: word not in ("...", "&&", "&"), words))
    while isinstance(command, TyperGroup) and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        if words[0] not in command.commands:
            return words[:1]
        command = command.commands[words.pop(0)]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    given = [word.partition("=")[0].rstrip(",.:)") for word in words if re.match(r"--?[a-z]", word)]
    return [option for option in given if option not in known]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_on_pages_exist(page: Path) -> None:
    code = "\n".join(CODE.findall(page.read_text()))
    assert not [(words, unknown) for words in commands_in(code) if (unknown := unknown_in(words))]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_commands_in_recipes_exist(recipe: Path) -> None:
    header = "\n".join(line for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert not [(words, unknown) for words in commands_in(header) if (unknown := unknown_in(words))]


def verbs(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(command, TyperGroup):
        for name, inner in command.commands.items():
            yield from verbs(inner, f"{path} {name}")
    else:
        yield path, command


@pytest.mark.parametrize(("path", "verb"), [pytest.param(*v, id=v[0]) for v in verbs(MSDIFF, "msdiff")])
def test_every_verb_shows_an_example(path: str, verb: Any) -> None:
    _, _, example = (verb.help or "").partition("Example:")
    example = " ".join(re.sub(r"\[/?bold\]", "", example).split())
    assert f"{path} " in example
    assert not [unknown for words in commands_in(example) if (unknown := unknown_in(words))]


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("msdiff trian recipes/debug.yaml", ["trian"]),
        ("msdiff data unpack x", ["unpack"]),
        ("msdiff train r.yaml --nproc 4 \\\n  --ranks 3", ["--ranks"]),
        ("msdiff array --parts 2 --cluster c --folder f -- sample run --out o --sead 1", ["--sead"]),
        ("msdiff logs faces -f --rank 3", []),
        ("msdiff train r.yaml optimizer.lr=1e-4 --nproc 4   # note --anything", []),
    ],
)
def test_mistakes_would_be_found(text: str, unknown: list[str]) -> None:
    assert [u for words in commands_in(text) for u in unknown_in(words)] == unknown
