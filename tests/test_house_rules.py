"""What keeps the house readable: short files and functions, one name for a thing, extras in use."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for part in ("tessera", "benchmarks", "tests") for path in (ROOT / part).rglob("*.py")
)
PACKAGE = [path for path in FILES if path.is_relative_to(ROOT / "tessera")]
LINES, FUNCTION_LINES = 500, 80

# Public names that two modules of the package define, and why. Keep it short.
TWICE: dict[str, str] = {}

# Extras of those who work on the project, and all others together.
TOOLS = {"dev", "docs", "browser", "all"}

# What a distribution is imported as, where that is another name.
MODULES = {"scikit-learn": "sklearn", "torch-fidelity": "torch_fidelity"}


parsed = cache(ast.parse)  # of the same files in most tests


def too_long(path: Path, source: str) -> list[str]:
    """What of a file is longer than the house allows."""
    name = path.relative_to(ROOT)
    lines = len(source.splitlines())
    wrong = [f"{name}: {lines} lines"] if lines > LINES else []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                wrong.append(f"{name}:{node.lineno}: {node.name} has {lines} lines")
    return wrong


def public_names(source: str) -> set[str]:
    """The public classes and functions that a module defines."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = {node.name for node in parsed(source).body if isinstance(node, kinds)}
    return {name for name in found if not name.startswith("_")}


def test_files_and_functions_are_short() -> None:
    assert [line for path in FILES for line in too_long(path, path.read_text())] == []


def test_the_check_of_lengths_itself() -> None:
    body = "    pass\n" * FUNCTION_LINES
    path = ROOT / "tessera/x.py"
    assert too_long(path, f"def f():\n{body[9:]}") == []
    assert too_long(path, f"class A:\n  def f(self):\n{body}") == ["tessera/x.py:2: f has 81 lines"]
    assert too_long(path, "\n" * (LINES + 1)) == ["tessera/x.py: 501 lines"]


def test_a_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE:
        for name in public_names(path.read_text()):
            places[name].append(str(path.relative_to(ROOT)))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in TWICE} == {}
    assert set(TWICE) <= set(twice)


def test_the_check_of_names_itself() -> None:
    source = "class A:\n    def b(self): ...\ndef c(): ...\ndef _d(): ...\nclass _E: ...\nf = 1"
    assert public_names(source) == {"A", "c"}


def imported(source: str) -> set[str]:
    """The packages that a file imports; also by their names, where they may be missing."""
    found: set[str] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("require_extra", "import_module"):
                words = [w.value for w in ast.walk(node.args[0]) if isinstance(w, ast.Constant)]
                found |= {str(word) for word in words}
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            found.add(str(node.values[0].value))  # f"torch_fidelity.{part}"
    return {name.split(".")[0] for name in found} | {
        "tensorboard" for name in found if name == "torch.utils.tensorboard"
    }


def test_every_extra_is_imported_by_something() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = {
        name
        for path in FILES
        if not path.is_relative_to(ROOT / "tests")
        for name in imported(path.read_text())
    }
    for extra in extras.keys() - TOOLS:
        packages = [re.split(r"[<>=]", requirement)[0] for requirement in extras[extra]]
        assert {MODULES.get(name, name) for name in packages} <= used, extra
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything.partition("[")[2])) == extras.keys() - TOOLS


def test_the_table_of_extras_is_that_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.M))
    told = {name: {package.strip() for package in rows[name].split(",")} for name in rows}
    for name in extras.keys() - TOOLS:
        packages = {re.split(r"[<>=]", requirement)[0] for requirement in extras[name]}
        assert told[name] == packages


def docstrings(source: str) -> list[str]:
    """Those of a file, its classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(parsed(source)) if isinstance(node, kinds)]
    return [ast.get_docstring(node) or "" for node in nodes]


@pytest.mark.parametrize("words", [r"\bspec\b", r"\bgolden\b", r"\bissue\b", r"\btests/"])
def test_docstrings_name_no_file_outside_of_the_package(words: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in FILES
        if not path.is_relative_to(ROOT / "tests")
        for text in docstrings(path.read_text())
        if (found := re.search(words, text))
    }
    assert wrong == set()


@pytest.mark.parametrize(
    ("call", "home"),
    [("Table", "cli/tables.py"), ("Image.new", "images.py"), ("ImageDraw.Draw", "images.py")],
)
def test_what_is_written_once(call: str, home: str) -> None:
    """Tables and labelled pictures look the same wherever they are."""
    users = [
        path
        for path in PACKAGE
        if any(
            isinstance(node, ast.Call) and ast.unparse(node.func) == call
            for node in ast.walk(parsed(path.read_text()))
        )
    ]
    assert users == [ROOT / "tessera" / home]
