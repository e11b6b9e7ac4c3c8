"""Tables of named parts, and the modules by which other packages add to them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from msdiff_dist.config import from_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.registry import Table, import_extensions

COLOURS: Table[int] = Table("colour", {"red": 1, "green": 2})


@dataclass(frozen=True)
class Painted:
    colour: Annotated[str, COLOURS] = "red"
    other: Annotated[str, COLOURS] | None = None


def test_names_in_the_order_they_were_added() -> None:
    table: Table[int] = Table("colour", {"red": 1})
    table.add("blue", 3)
    assert dict(table) == {"red": 1, "blue": 3}
    assert table.choose("colour", "blue") == 3


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="there is a colour of this name already") as caught:
        COLOURS.add("red", 5)
    assert caught.value.value == "red"
    assert COLOURS["red"] == 1


@pytest.mark.parametrize("field", ["colour", "other"])
def test_fields_take_names_of_the_table_alone(field: str) -> None:
    assert from_mapping(Painted, {field: "green"}, "paint") == Painted(**{field: "green"})
    with pytest.raises(ConfigError, match="Did you mean 'green'") as caught:
        from_mapping(Painted, {field: "gren"}, "paint")
    assert caught.value.field == f"paint.{field}"
    with pytest.raises(ConfigError, match="must be a string"):
        from_mapping(Painted, {field: 3})


def test_a_recipes_extensions_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "colours_of_mine.py").write_text(f"from {__name__} import COLOURS\nCOLOURS.add('mine', 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_extensions({"extensions": ["colours_of_mine"]})
    import_extensions({"extensions": ["colours_of_mine"]})
    assert COLOURS["mine"] == 9


def test_a_missing_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"No module named 'not_here'.*PYTHONPATH") as caught:
        import_extensions({"extensions": ["not_here"]})
    assert caught.value.value == "not_here"
    (tmp_path / "needs_another.py").write_text("import absent_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="absent_library") as caught:
        import_extensions({"extensions": ["needs_another"]})
    assert caught.value.value == "needs_another"


@pytest.mark.parametrize("name", ["", ".mine", "my_package/mine.py", "my-package", 3])
def test_what_is_no_modules_name_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="is not the name of a module"):
        import_extensions({"extensions": [name]})


def install(site: Path, module: str, body: str) -> None:
    """What `pip install` leaves of a package that declares an extension."""
    (site / f"{module}.py").write_text(body)
    about = site / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[msdiff_dist.extensions]\n{module} = {module}\n")


@pytest.mark.parametrize("breaks", [False, True])
def test_installed_packages_add_by_themselves(tmp_path: Path, breaks: bool) -> None:
    body = "from msdiff_dist.training.optimizer import OPTIMIZERS\nOPTIMIZERS.add('plain', OPTIMIZERS['sgd'])\n"
    install(tmp_path, "my_optimizers", "import absent_library\n" if breaks else body)
    code = "from msdiff_dist.training.optimizer import OPTIMIZERS; print(list(OPTIMIZERS))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(tmp_path)!r}); {code}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if breaks:
        assert "absent_library" in done.stderr
        assert "Repair or remove the package my_optimizers" in done.stderr
    else:
        assert done.stdout == "['adamw', 'adam', 'sgd', 'plain']\n", done.stderr
