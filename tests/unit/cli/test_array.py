"""`msdiff array` refuses a command as the command itself does, before anything is submitted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from msdiff_dist.cli.before_work import check_command
from msdiff_dist.cli.main import app
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes"


def ends(*words: str) -> tuple[int, str]:
    """Exit status, and what is printed or the message of the error that is raised."""
    result = CliRunner().invoke(app, words, prog_name="msdiff")
    if isinstance(result.exception, UserError):
        return 2, f"{type(result.exception).__name__}: {result.exception}"
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("smaple run --out o", "No such command 'smaple'. Did you mean 'sample'?"),
        ("msdiff sample run --out o", "No such command 'msdiff'"),
        ("sample run", "Missing option '--out'"),
        ("sample run --out o --nun 3", "No such option: --nun"),
        ("sample run --out o --num three", "Invalid value for '--num'"),
        ("ablate no.yaml --part 3 --parts 2", "--part = 3: of 2 the parts are 0 to 1"),
        ("sample /no/such/run --out o --part {part} --parts {parts}", "RUN = '/no/such/run': no such"),
        ("data encode no.yaml --out o", "RECIPE = 'no.yaml': no such file"),
        (f"data encode {RECIPES}/quickstart.yaml --out o data.shards=none", "shards not found: none"),
        (f"train {RECIPES}/debug.yaml train.steps=0", "train.steps"),
        (f"train {RECIPES}/debug.yaml data.lanes=7 --nproc 2", "data.lanes = 7"),
        ("ablate no.yaml --part {part} --parts {parts}", "SWEEP = 'no.yaml': no such file"),
        ("stages cluster --data none", "shards not found: none"),
        ("stages cluster --method snr --run none", "--run = 'none': has no meaning"),
        ("export none --out o", "RUN = 'none'"),
        ("data check none", "DIR = 'none': is not a folder"),
        ("classifier train no.yaml --out o.safetensors", "RECIPE = 'no.yaml': no such file"),
    ],
)
def test_it_says_what_the_command_says(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    submit = ["array", "--cluster", "local", "--folder", "jobs", "--parts", "3", "--"]
    status, said = ends(*submit, *shlex.split(command))
    assert status == 2
    assert message.replace(" ", "") in "".join(said.replace("│", "").split())
    # The last of the three parts, as it would be called.
    assert said == ends(*shlex.split(command.replace("{part}", "2").replace("{parts}", "3")))[1]
    assert not list(tmp_path.iterdir())


def test_what_is_right_is_checked_without_doing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare("digits", tmp_path / "digits", None, "train", 4)
    for command in (
        f"train {RECIPES}/debug.yaml --run-dir run",
        f"data encode {RECIPES}/debug.yaml encode.data.shards=digits encode.data.image_size=16 --out o",
        "data check digits",
        "stages cluster --data digits",
        "checkpoint verify anything",  # no check of its own before work: parsed only
    ):
        check_command(app, shlex.split(command))
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_verbs_that_take_long_have_their_checks_first() -> None:
    tree = typer.main.get_command(app)
    verbs = {name: c for name, c in tree.commands.items() if not hasattr(c, "commands")}  # type: ignore[attr-defined]
    marked = {name for name, verb in verbs.items() if getattr(verb.callback, "checks_first", False)}
    assert {"train", "sample", "ablate", "interval-report", "export"} <= marked
