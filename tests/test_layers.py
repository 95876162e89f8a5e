"""Imports run one way, and optional packages are imported where they are used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tessera"

# From the bottom to the top; parts of one line do not know each other, but for the first line's.
LAYERS = (
    ("commands", "errors", "files", "images", "conditioning", "randomness", "distributed", "model",
     "progress", "pickles", "torch_files", "plain", "memory", "npy", "channels", "precision",
     "processes", "_version"),
    ("networks",),
    ("diffusion",),
    ("data",),
    ("planning",),
    ("sampling",),
    ("recipes",),
    ("metrics",),
    ("pipelines",),
    ("training", "convert"),
    ("reports",),
    ("quickstart", "sharing", "comparing", "starting"),
    ("studio",),
    ("cli",),
    ("tessera", "__main__"),
)  # fmt: skip
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

OPTIONAL = {
    "sklearn", "scipy", "matplotlib", "diffusers", "torch_fidelity", "torchvision", "tensorboard",
    "torch.utils.tensorboard", "wandb", "huggingface_hub", "lmdb", "pyarrow", "cv2", "pandas",
    "IPython", "IPython.display", "gradio", "fastapi", "uvicorn",
}  # fmt: skip

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to, as it stands in `LAYERS`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "tessera" if first == "__init__" else first


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that is imported anywhere in a file."""
    package = ["tessera", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def upward(path: Path, source: str) -> list[str]:
    """The imports of a file that break the order."""
    own = part_of(path)
    wrong = []
    for line, name in imports(ast.parse(source), path):
        if name != "tessera" and not name.startswith("tessera."):
            continue
        target = ([*name.split("."), ""])[1]
        # `from tessera import load` takes a name of the package itself.
        target = target if target in LEVEL and target != "tessera" else "tessera"
        same_line = LEVEL[target] == LEVEL[own] and (target == own or LEVEL[own] == 0)
        if own != "tessera" and LEVEL[target] >= LEVEL[own] and not same_line:
            wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {own} imports {name}")
    return wrong


def optional_at_top(path: Path, source: str) -> list[str]:
    """The optional packages that importing a file would import."""
    wrong = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            for line, name in imports(ast.Module([node], []), path):
                if any(name == module or name.startswith(f"{module}.") for module in OPTIONAL):
                    wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {name}")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return wrong


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves, by way of others."""
    reached = {module: set(targets) for module, targets in graph.items()}
    for through, targets in reached.items():
        for found in reached.values():
            if through in found:
                found |= targets
    return sorted(module for module, found in reached.items() if module in found)


def module_graph(sources: dict[str, tuple[Path, str]]) -> dict[str, set[str]]:
    """What each module imports of the others, anywhere in it, by their full names."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, (path, source) in sources.items():
        for _, name in imports(ast.parse(source), path):
            # A name within a module, or the module itself.
            target = name if name in sources else name.rpartition(".")[0]
            # What the package itself exports is at the top, see `upward`.
            if target in sources and target != "tessera":
                graph[module].add(target)
    return graph


def test_every_module_has_its_place() -> None:
    assert {part_of(path) for path in MODULES} <= set(LEVEL)


def test_imports_run_downwards() -> None:
    assert [line for path in MODULES for line in upward(path, path.read_text())] == []


def test_optional_packages_are_imported_where_used() -> None:
    assert [line for path in MODULES for line in optional_at_top(path, path.read_text())] == []


def test_no_modules_import_one_another() -> None:
    """Also not within a part, in a function, or for types alone."""
    names = {
        ".".join(("tessera", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in MODULES
    }
    sources = {
        name.removesuffix(".__init__"): (path, path.read_text()) for name, path in names.items()
    }
    assert circles(module_graph(sources)) == []


def test_the_check_of_circles_itself() -> None:
    texts = {
        "tessera.data.a": "def f():\n    from tessera.data.b import x",
        "tessera.data.b": "if TYPE_CHECKING:\n    from tessera.data import c",
        "tessera.data.c": "from tessera.data import a\nimport tessera.data.d",
        "tessera.data.d": "import torch",
    }
    sources = {name: (PACKAGE / "data/x.py", text) for name, text in texts.items()}
    assert circles(module_graph(sources)) == ["tessera.data.a", "tessera.data.b", "tessera.data.c"]
    sources["tessera.data.c"] = (PACKAGE / "data/x.py", "import tessera.data.d")
    assert circles(module_graph(sources)) == []


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("networks/x.py", "from tessera.diffusion.denoiser import Denoiser", 1),
        ("networks/x.py", "def f():\n    import tessera.data.views", 1),
        ("networks/x.py", "if TYPE_CHECKING:\n    from tessera.recipes import schema", 1),
        ("networks/x.py", "from ..diffusion import denoiser", 1),
        ("networks/x.py", "from . import layers\nfrom tessera.errors import DataError", 0),
        ("networks/x.py", "from tessera import load", 1),
        ("pipelines/x.py", "from tessera.convert import edm", 1),
        ("cli/x.py", "from tessera.metrics import kid\nfrom tessera import training", 0),
        ("files.py", "from tessera.errors import DataError", 0),
    ],
)
def test_the_check_itself(file: str, source: str, count: int) -> None:
    assert len(upward(PACKAGE / file, source)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import wandb", 1),
        ("from torch.utils.tensorboard import SummaryWriter", 1),
        ("from torch.utils import tensorboard", 1),
        ("try:\n    import lmdb\nexcept ImportError:\n    pass", 1),
        ("def f():\n    import wandb", 0),
        ("if TYPE_CHECKING:\n    import diffusers", 0),
        ("import torch.utils.data", 0),
    ],
)
def test_the_optional_check_itself(source: str, count: int) -> None:
    assert len(optional_at_top(PACKAGE / "training/x.py", source)) == count
