"""What the documentation names is there: files, links, imports, commands and their options."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from tessera.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks/RESULTS.md", *ROOT.glob("docs/**/*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Where links into a page can point, by the rule of code forges."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def commands(page: Path) -> list[list[str]]:
    """The words of every `tessera ...` in the code of a page, from `tessera` on."""
    text = page.read_text().replace("\\\n", " ")
    code = [line for _, block in FENCED.findall(text) for line in block.splitlines()]
    code += re.findall(r"^    (.*)$", FENCED.sub("", text), re.M)
    code += re.findall(r"`([^`\n]*)`", FENCED.sub("", text))
    found = []
    for line in code:
        if re.match(r"(\$ |torchrun .*-m |srun .* )?tessera [a-z]", line):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # an apostrophe in an explanation
                words = line.split()
            found.append(words[words.index("tessera") :])
    return found


def options(command: Any) -> set[str]:
    """The options of a command."""
    return {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}


def descend(words: list[str]) -> tuple[str, Any]:
    """The command that a line names."""
    command: Any = typer.main.get_command(app)
    name = "tessera"
    for word in words[1:]:
        inner = getattr(command, "commands", None)
        if not inner or word.startswith("-"):
            break
        assert word in inner, f"{name} has no command {word}: {' '.join(words)}"
        command, name = inner[word], f"{name} {word}"
    return name, command


def all_options(command: Any) -> set[str]:
    inner = getattr(command, "commands", {}).values()
    return options(command).union(*map(all_options, inner))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_page
def test_files_and_names_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`((?:tessera|benchmarks|docs|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(tessera(?:\.\w+)+)", text):
        pkgutil.resolve_name(name)
    for module, name in re.findall(r"python -m (benchmarks(?:\.\w+)*)(?: (\w+))?", text):
        place = ROOT / "/".join([*module.split("."), *([name] if name else [])])
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), str(place)


@every_page
def test_python_imports_what_there_is(page: Path) -> None:
    for language, block in FENCED.findall(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tessera"):
                for alias in node.names:
                    pkgutil.resolve_name(f"{node.module}.{alias.name}")


@every_page
def test_commands_have_these_options(page: Path) -> None:
    for words in commands(page):
        name, command = descend(words)
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= options(command) | {"--help"}, f"{name}: {' '.join(words)}"


def test_commands_are_found() -> None:
    names = {descend(words)[0] for page in PAGES for words in commands(page)}
    assert {"tessera train", "tessera data latents", "tessera eval nll"} <= names
    assert sum(len(commands(page)) for page in PAGES) > 100


def ours(page: Path) -> str:
    """What a page says of this library: of pages for migrating, the columns with its own names."""
    text = prose(page)
    if page.parent.name != "migrating":
        return text
    cells, column = [], None
    for line in text.splitlines():
        row = [cell.strip() for cell in line.split("|")]
        if not line.startswith("|"):
            column = None
        elif column is None:
            column = next((i for i, cell in enumerate(row) if cell in ("here", "tessera")), 0)
        elif column:
            cells.append(row[column])
    assert cells, "no column of this library's names"
    return "\n".join(cells)


@every_page
def test_options_by_themselves_exist(page: Path) -> None:
    known = all_options(typer.main.get_command(app))
    for code in re.findall(r"`((?:--|tessera )[^`]+)`", ours(page)):
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        assert used <= known, code
