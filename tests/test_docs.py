"""What the documentation names is there: files, links, imports, commands and their options."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from tessera.cli import app
from tessera.cli.compare import arms_of
from tessera.cli.sample import parse_options
from tessera.errors import TesseraError
from tessera.pipelines.loading import build_pipeline
from tessera.pipelines.options import fill
from tessera.pipelines.plans import SampleOptions
from tessera.pipelines.relay import STAGES, assemble_relay
from tessera.recipes.loading import load_recipe, shipped
from tessera.recipes.parts import Parts
from tessera.recipes.schema import Recipe
from tessera.training.probe import blank_images

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks/RESULTS.md", *ROOT.glob("docs/**/*.md")])
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))

# Typer brings its own copy of Click, or uses the one that is installed.
UsageError: Any = typer.BadParameter.__base__

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@cache
def root_command() -> Any:
    """`tessera` with all that is below it."""
    return typer.main.get_command(app)


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Where links into a page can point, by the rule of code forges."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def lines(page: Path) -> tuple[list[str], list[str]]:
    """Lines of the code blocks of a page, and code within its sentences and tables."""
    text = page.read_text().replace("\\\n", " ")
    blocks = [line for _, block in FENCED.findall(text) for line in block.splitlines()]
    blocks += re.findall(r"^    (.*)$", FENCED.sub("", text), re.M)
    return blocks, re.findall(r"`([^`\n]*)`", FENCED.sub("", text))


def as_command(line: str) -> list[str] | None:
    """The words of a line `tessera ...` from `tessera` on; None for other lines."""
    if not re.match(r"(\$ |torchrun .*-m |srun .* )?tessera [a-z]", line):
        return None
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in an explanation
        words = line.split()
    words = words[words.index("tessera") :]
    return words[: words.index(">")] if ">" in words else words


def commands(page: Path) -> list[list[str]]:
    """The words of every `tessera ...` in the code of a page, from `tessera` on."""
    return [words for part in lines(page) for words in map(as_command, part) if words]


def options(command: Any) -> set[str]:
    """The options of a command."""
    return {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}


def descend(words: list[str]) -> tuple[str, Any]:
    """The command that a line names."""
    command: Any = root_command()
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
    known = all_options(root_command()) | {"--help"}
    for code in re.findall(r"`((?:--|tessera )[^`]+)`", ours(page)):
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        assert used <= known, code


# ---------------------------------------------------------------- parsed as they would be typed


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command of a line and its parameters, read by the command's own parser."""
    name, command = descend(words)
    rest = [word for word in words[len(name.split()) :] if word not in ("...", "…")]
    with command.make_context(name, rest) as context:
        return name, dict(context.params)


def sampling(values: dict[str, Any]) -> dict[str, Any]:
    """What a line of `tessera sample`, `bricks` or `cost` says of the sampling."""
    given = parse_options([*(values.get("overrides") or ())])
    given |= {k: v for k in ("steps", "guidance") if (v := values.get(k)) is not None}
    if "guide" in given or values.get("guide"):
        given.setdefault("guidance", 1.5)
    return given


def check_sampling(given: dict[str, Any]) -> None:
    """Raise unless a model of some shipped recipe takes these options, of these values."""
    stages = "cifar10-small-relay-first", "cifar10-small-relay-second"
    if given.keys() & {"stages", *(key for key in given if key.split(".")[0] in STAGES)}:
        relay = assemble_relay([build_pipeline(load_recipe(stage)) for stage in stages])
        counted = relay.without_weights()
        counted.plan([0], None, **counted.with_start(given))
        return
    errors = []
    small = (f"cifar10-small{kind}" for kind in ("", "-lego", "-pdm", "-energy"))
    for recipe in (*small, "patch-ffhq64"):
        try:
            SampleOptions.choose(load_recipe(recipe), **given)
        except TesseraError as error:
            errors.append(str(error))
        else:
            return
    try:
        fill({"sampler": load_recipe("cifar10-small-mar").sampling}, given, {})
    except TesseraError as error:
        raise AssertionError(f"{given}: no model takes these: {[*errors, error]}") from error


def check_overrides(recipe: str, changes: list[str]) -> None:
    """Raise unless a recipe takes these changes; of a file, unless recipes have such keys."""
    if recipe in shipped():
        load_recipe(recipe, changes, Parts(dataset=blank_images))  # epochs count its images
        return
    for change in changes:
        assert known_key(change.partition("=")[0]), f"{recipe}: {change}"


@every_page
def test_commands_are_right_as_a_whole(page: Path) -> None:
    code = [*lines(page)[0], ""]
    complete = [line for line, after in pairwise(code) if not after.startswith("error:")]
    for words in filter(None, map(as_command, complete)):
        name, values = parsed(words)
        changes = [word for word in values.get("overrides") or () if word not in ("...", "…")]
        if name in ("tessera sample", "tessera bricks", "tessera report"):
            check_sampling(sampling(values))
        elif name == "tessera train" and values["resume"]:
            check_overrides("a run", [*filter(None, [values["recipe"]]), *changes])
        elif name == "tessera quickstart":
            check_overrides("quickstart-digits", changes)
        elif name == "tessera train" and str(values["recipe"]).endswith("/"):
            # Of images, where the run folder may stand among the changes.
            check_overrides(values["recipe"], [word for word in changes if "=" in word])
        elif name in ("tessera train", "tessera cost", "tessera recipes show"):
            check_overrides(values["recipe"], changes)
            check_sampling(sampling({"overrides": values.get("sample")}))


@every_page
def test_options_of_sampling_in_sentences_exist(page: Path) -> None:
    """Such as `tessera sample runs/a skip=0.4`, also where the line is not complete."""
    for words in filter(None, map(as_command, lines(page)[1])):
        name, _ = descend(words)
        changes = [word for word in words if re.match(r"[a-z_.0-9]+=", word)]
        if name in ("tessera sample", "tessera bricks", "tessera report") or "--sample" in words:
            check_sampling(parse_options(changes))
        elif "cost" in name or "train" in name:
            assert all(known_key(word.partition("=")[0]) for word in changes), words


def nested(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from nested(part)


@cache
def recipe_keys(section: type[BaseModel] = Recipe) -> frozenset[str]:
    """Every key of a section, with those of the sections in it; `*` for the number of an entry."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(name)
        listed = str(field.annotation).startswith("tuple")
        for inner in nested(field.annotation):
            found |= {f"{name}.{'*.' if listed else ''}{key}" for key in recipe_keys(inner)}
    return frozenset(found)


def known_key(key: str) -> bool:
    """Whether some recipe has this key."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", key) in recipe_keys() or "options." in key


@every_page
def test_keys_of_recipes_exist(page: Path) -> None:
    sections = {key.partition(".")[0] for key in recipe_keys() if "." in key}
    for code in lines(page)[1]:
        for word in code.split():
            key = word.partition("=")[0]
            if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", key) and key.split(".")[0] in sections:
                files = ("png", "yaml", "npz", "json", "jsonl", "zip", "mdb", "py", "lock")
                assert known_key(key) or key.split(".")[-1] in files, key


@every_page
def test_python_gives_options_that_there_are(page: Path) -> None:
    methods = {"sample", "sample_batches", "cost", "encode", "estimate"}
    plain = {"seeds", "labels", "output", "batch", "on_step", "guide", "start_from", "latents",
             "precision", "sampler"}  # fmt: skip
    known = plain | {
        name
        for recipe in ("cifar10-small-lego", "cifar10-small-pdm")
        for kind in (None, "edm", "ablation", "ddpm", "ddim")
        for section in SampleOptions.sections(load_recipe(recipe), kind).values()
        for name in type(section).model_fields
    }
    known |= {"edit", *type(load_recipe("cifar10-small-mar").sampling).model_fields}
    code = [block for language, block in FENCED.findall(page.read_text()) if language == "python"]
    code += [part for part in lines(page)[1] if re.fullmatch(r"pipe\.\w+\(.*\)", part)]
    for node in (node for part in code for node in ast.walk(ast.parse(part))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in methods:
            used = {keyword.arg for keyword in node.keywords if keyword.arg}
            assert used <= known, used - known


def test_what_is_wrong_is_found() -> None:
    """The checks above, on lines with a mistake each."""
    for line in ("tessera sample", "tessera sample a --stesp 3", "tessera cost a --batch x"):
        with pytest.raises(UsageError):
            parsed(line.split())
    for given in ({"skpi": "0.4"}, {"skip": "1.4"}, {"skip": "0.1", "eta": "0", "window": "1"}):
        with pytest.raises(AssertionError):
            check_sampling(given)
    assert known_key("ema.0.halflife_images")
    assert known_key("sampling.levels.kind")
    assert known_key("network.bricks.1.size")
    assert not known_key("network.widht")
    assert not known_key("ema.halflife_images")


def every_command(command: Any) -> Iterator[Any]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from every_command(inner)


def test_examples_of_the_help_are_right() -> None:
    found = 0
    for command in every_command(root_command()):
        for line in (command.help or "").splitlines():
            words = as_command(line.strip())
            if words and "..." not in words:
                found += 1
                name, values = parsed(words)
                if name == "tessera compare":
                    for arm in arms_of(values["words"]):
                        if arm.changes:
                            check_overrides(arm.source, arm.changes)
                    continue
                assert name == "tessera train"
                if not values["resume"]:
                    check_overrides(values["recipe"], values["overrides"] or [])
    assert found >= 3
