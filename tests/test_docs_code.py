"""The code on the pages runs, and so do the examples of the public modules."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import random_images, write_archive
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

import tessera
from tessera import Parts
from tessera.cli import app
from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.recipes.build import build_sampler
from tessera.recipes.schema import ExternalSamplerConfig
from tessera.sampling.seeds import SeedNoise

DOCS = Path(__file__).parents[1] / "docs"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SHORT = {
    "train": ["training.images=16", "training.batch=8", "run.preview=null"],
    "sample": ["--seeds", "0-1"],
    "cost": [],
}
PUBLIC = re.findall(r"^\| `(tessera\.[\w.]+)` \| (.*) \|$", (DOCS / "python.md").read_text(), re.M)
MODULES = [name for name, _ in PUBLIC if name.split(".")[1] not in tessera.__all__]


def chapters(page: str) -> dict[str, str]:
    """The text below each heading of a page."""
    parts = re.split(r"^## (.*)\n", (DOCS / page).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("my_unet", "my_data", "my_solver", "my_loss"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def write_files(chapter: str) -> list[str]:
    """Write the files that a chapter shows into the current folder; its shell commands."""
    commands: list[str] = []
    for language, code in FENCED.findall(chapter):
        if language == "sh":
            commands += code.splitlines()
        elif name := re.match(r"# (\w+\.(?:py|yaml))\n", code):
            Path(name[1]).write_text(code)
    return commands


@pytest.mark.parametrize("part", ["network", "data set", "solver"])
def test_the_examples_of_own_parts_train_and_sample(part: str, here: Path) -> None:
    write_archive(here / "cifar10.zip", random_images(20, size=32), [i % 10 for i in range(20)])
    tiny_pipeline().save(here / "runs" / "a")
    commands = write_files(chapters("extending.md")[f"Your own {part}"])
    assert commands
    for command in commands:
        _, name, *words = shlex.split(command)
        result = CliRunner().invoke(app, [name, *words, *SHORT[name]])
        assert result.exit_code == 0, f"{command}: {result.exception!r}\n{result.output}"
    assert list(here.glob("*.png"))


def test_the_example_of_an_objective_trains(here: Path) -> None:
    write_files(chapters("extending.md")["Your own objective"])
    write_files(chapters("extending.md")["Your own data set"])
    (here / "both.py").write_text("from my_data import dataset\nfrom my_loss import objective\n")
    changes = ["objective={kind: external, options: {sigma_max: 20}}", *SHORT["train"]]
    arguments = ["train", "--with", "both", "my_data.yaml", "run.dir=run", *changes]
    result = CliRunner().invoke(app, arguments)
    sys.modules.pop("both", None)
    assert result.exit_code == 0, repr(result.exception)
    assert "loss_q3" in (here / "run" / "metrics.jsonl").read_text()


def test_the_network_has_as_many_lines_as_it_says() -> None:
    code = FENCED.findall(chapters("extending.md")["Your own network"])[0][1]
    lines = [line for line in code.splitlines()[1:] if line.strip()]
    imports = [line for line in lines if line.startswith(("import", "from"))]
    assert len(lines) - len(imports) <= 30


class Gaussian(Denoiser):
    """The ideal denoiser of x ~ N(0.3, 0.5²)."""

    shape = (1, 2, 2)

    def forward(self, z: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> Posterior:
        variance = sigma.reshape(-1, 1, 1, 1) ** 2
        return Posterior((0.25 * z + variance * 0.3) / (0.25 + variance))


def test_the_solver_is_of_second_order(here: Path) -> None:
    write_files(chapters("extending.md")["Your own solver"])
    parts = Parts(sampler=importlib.import_module("my_solver").sampler)
    noise = SeedNoise(range(16))
    latents = noise.normal(Gaussian.shape)
    z = latents.double() * 10
    exact = 0.3 + (z - 0.3) * 0.5 / math.sqrt(0.25 + 100)
    errors = []
    for steps in (40, 80):
        section = ExternalSamplerConfig(options={"steps": steps, "sigma_max": 10.0})
        *_, last = build_sampler(section, parts)(Gaussian(), latents, Conditioning(), noise)
        errors.append(float((last.x - exact).abs().max()))
    assert errors[1] < 0.01
    assert errors[0] > 3 * errors[1]


# -------------------------------------------------------------------------------- the public names


def names(listed: str) -> list[str]:
    return re.findall(r"`(\w+)`", listed)


def test_all_that_tessera_exports_is_on_the_page() -> None:
    own = {name.split(".")[1] for name, _ in PUBLIC if name not in MODULES}
    assert own == set(tessera.__all__)
    for name in tessera.__all__:
        assert getattr(tessera, name) is not None
    assert len(MODULES) > 10


@pytest.mark.slow
def test_importing_tessera_is_cheap() -> None:
    script = (
        "import sys, tessera; assert set(tessera.__all__) <= set(dir(tessera)); tessera.Parts; "
        "print('torch' in sys.modules, 'numpy' in sys.modules); tessera.Pipeline, tessera.Trainer"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(("module", "listed"), [p for p in PUBLIC if p[0] in MODULES])
def test_public_names_are_there_and_say_what_they_do(module: str, listed: str) -> None:
    found = importlib.import_module(module)
    assert names(listed)
    for name in names(listed):
        thing: Any = getattr(found, name)
        described = inspect.isclass(thing) or inspect.isfunction(thing)
        assert not described or thing.__doc__, name


@pytest.mark.parametrize("chapter", chapters("python.md"))
def test_examples_on_the_page(chapter: str, here: Path) -> None:
    parser, blocks = doctest.DocTestParser(), FENCED.findall(chapters("python.md")[chapter])
    code = "".join(code for language, code in blocks if language == "pycon")
    if "tessera." in code and "import tessera\n" not in code:
        code = ">>> import tessera\n" + code
    run(parser.get_doctest(code, {}, chapter, "python.md", 0))


@pytest.mark.parametrize(
    "module",
    sorted({*MODULES, *tessera._HOMES.values(), "tessera.images", "tessera.precision",
            "tessera.diffusion.blur"}),
)  # fmt: skip
def test_examples_of_public_modules(module: str, here: Path) -> None:
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module)):
        run(test)


def run(test: doctest.DocTest) -> None:
    text: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=text.append)
    assert not text, "".join(text)


def test_examples_are_found() -> None:
    finder = doctest.DocTestFinder()
    homes = {*MODULES, *tessera._HOMES.values()}
    found = [t for m in homes for t in finder.find(importlib.import_module(m)) if t.examples]
    run_at_all = [t for t in found if not all(doctest.SKIP in e.options for e in t.examples)]
    assert {t.name.rsplit(".", 1)[-1] for t in run_at_all} >= {
        "AddressedDraws", "Conditioning", "Parts", "Pipeline", "Trainer", "load", "load_recipe",
        "open_dataset", "Sampler",
    }  # fmt: skip
