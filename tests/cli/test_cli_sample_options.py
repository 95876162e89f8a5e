"""KEY=VALUE of `tessera sample`, `cost` and `bricks`: what there is, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import lego_case
import numpy as np
import pytest
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

from tessera.cli import app
from tessera.cli.sample import parse_options
from tessera.errors import TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.options import samplers
from tessera.recipes.schema import EdmSamplerConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A U-Net and a stack of bricks."""
    made = {"tiny": tiny_pipeline(), "lego": lego_case.tiny_pipeline()}
    place = tmp_path_factory.mktemp("pipelines")
    for name, pipe in made.items():
        pipe.save(place / name)
    return {name: str(place / name) for name in made}


def run(*arguments: object) -> str:
    """The output of `tessera ARGUMENTS`; errors of the user's are raised."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(result.exception, TesseraError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


# ------------------------------------------------------------------------------ what there is


@pytest.mark.parametrize("sampler", [None, *samplers(EdmSamplerConfig())])
def test_every_option_has_a_meaning(sampler: str | None) -> None:
    for pipe in (tiny_pipeline(), lego_case.tiny_pipeline()):
        options = pipe.options(sampler)
        assert [o.name for o in options if not o.meaning] == []
        names = [option.name for option in options]
        assert len(names) == len(set(names))


def rows(output: str) -> dict[str, tuple[str, str]]:
    """Value and meaning by name, of a table whose meanings may go on in the next line."""
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for line in output.splitlines():
        words = line.split()
        if line.startswith(" "):
            value, meaning = found[name]
            found[name] = value, f"{meaning} {' '.join(words)}"
        elif len(words) > 1:
            name = words[0]
            found[name] = words[1], " ".join(words[2:])
    return found


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("tiny", {"steps": "3", "s_max": "inf", "guidance_interval": "none", "layout": "tiles"}),
        ("lego", {"steps": "5", "skip": "0", "bricks": "none", "mask_coords": "false"}),
    ],
)
def test_options_are_printed(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, some: dict[str, str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = run("sample", folders[name], "--options")
    assert max(map(len, output.splitlines())) <= 80
    shown = rows(output)
    pipe = {"tiny": tiny_pipeline, "lego": lego_case.tiny_pipeline}[name]()
    assert list(shown) == [option.name for option in pipe.options()]
    assert {key: shown[key][0] for key in some} == some
    for option in pipe.options():
        assert shown[option.name][1] == " ".join(option.meaning.split())


def test_options_of_another_sampler_are_printed(folders: dict[str, str]) -> None:
    assert "eta" not in rows(run("sample", folders["tiny"], "--options"))
    shown = rows(run("sample", folders["tiny"], "sampler=ddim", "--options"))
    assert shown["eta"][0] == "0"
    assert shown["sampler"][0] == "ddim"
    assert "s_churn" not in shown


def test_all_options_can_be_given_as_they_are_printed(folders: dict[str, str]) -> None:
    for name, make in (("tiny", tiny_pipeline), ("lego", lego_case.tiny_pipeline)):
        pipe: Pipeline = make()
        same = [f"{key}={value}" for key, (value, _) in rows(
            run("sample", folders[name], "--options")).items()]  # fmt: skip
        given = parse_options([text for text in same if not text.startswith("layout")])
        assert np.array_equal(pipe.sample([0], **given), pipe.sample([0]))


# ------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("tiny", ["s_churn"], "'s_churn' is not of the form KEY=VALUE.*--options"),
        ("tiny", ["=3"], "not of the form KEY=VALUE"),
        ("tiny", ["rho=5", "rho=6"], "rho is given twice"),
        ("tiny", ["steps=5", "--steps", "6"], "steps is given twice"),
        ("tiny", ["guidance=2", "--guidance", "2"], "guidance is given twice"),
        ("tiny", ["s_chrun=5"], "this model has no option `s_chrun`. Did you mean `s_churn`"),
        ("lego", ["skpi=0.4"], "Did you mean `skip`"),
        ("tiny", ["whatever=5"], "no option `whatever`. There are --steps, `solver`, "),
        ("tiny", ["eta=0.5"], "sampler edm has no option `eta`. It is one of `sampler=ddim`$"),
        ("tiny", ["clip=none"], "one of `sampler=ddpm` and `sampler=ddim`$"),
        (
            "tiny",
            ["sampler=ddim", "s_churn=5"],
            "`sampler=ablation` and `sampler=relay`$",
        ),
        ("tiny", ["discretization=vp"], "one of `sampler=ablation`$"),
        ("tiny", ["skip=0.5"], "only networks made of bricks.*Leave out `skip`"),
        ("tiny", ["window=0,0,8,8"], "not know where its pixels lie.*Leave out `window`"),
        ("tiny", ["sampler=dpm"], "`sampler=dpm`: there is none for this model. Choose edm, "),
        ("tiny", ["s_churn=much"], "`s_churn=much`: "),
        ("tiny", ["sigma_min=90"], "`sigma_min=90` must be less than `sigma_max=80`"),
        ("lego", ["skip=1.4"], "`skip=1.4`: "),
        ("lego", ["skip=0.4", "bricks=0-inf:1"], "both say which bricks run"),
        ("lego", ["layout=pad"], "give `size`, too"),
        ("tiny", ["start_from=photos"], "has the option --start-from"),
        ("tiny", ["labels=3"], "has the option --class"),
        ("tiny", ["precision=bf16"], "has the option --precision"),
        ("tiny", ["latents=x"], "it is for Python"),
        ("tiny", ["levels=edm"], "levels: expected a section"),
        ("tiny", ["levels.steps=5"], "levels.kind: is missing; choose one of edm, vp, ve, iddpm, "),
        ("tiny", ["levels.kind=vpp"], "'vpp' is not one of edm, vp, .*did you mean vp"),
        ("tiny", ["levels.kind=vp", "levels.rho=5"], "levels.rho: unknown key"),
        ("tiny", ["levels.kind=list"], "levels.sigmas: is missing"),
        ("tiny", ["levels.kind=list", "levels.sigmas=1,5"], "must be positive and fall"),
        ("tiny", ["levels.kind=vp", "--steps", "5"], "steps and levels both say"),
    ],
)
def test_errors(
    folders: dict[str, str], tmp_path: Path, model: str, arguments: list[str], message: str
) -> None:
    out = tmp_path / "s"
    with pytest.raises(TesseraError, match=message):
        run("sample", folders[model], "--device", "cpu", "--out", out, *arguments)
    assert not out.exists()


def test_given_as_text_and_in_python_are_the_same(folders: dict[str, str], tmp_path: Path) -> None:
    run("sample", folders["lego"], "--device", "cpu", "--seeds", "0-1", "--out", tmp_path / "s.npz",
        "skip=0.5", "levels.kind=vp", "levels.steps=4", "size=32x16", "s_churn = 5")  # fmt: skip
    with np.load(tmp_path / "s.npz") as file:
        images = file["arr_0"]
    expected = lego_case.tiny_pipeline().sample(
        "0-1", skip=0.5, levels={"kind": "vp", "steps": 4}, size=(32, 16), s_churn=5
    )
    assert images.shape == (2, 32, 16, 1)
    assert np.array_equal(images, expected)


def test_steps_of_another_number_than_the_recipes_give_way_to_levels() -> None:
    pipe = tiny_pipeline()
    assert pipe.recipe.sampling.steps == 3  # type: ignore[union-attr]
    assert pipe.cost(levels={"kind": "edm", "steps": 5}).evaluations == 9


def test_costs_take_the_same_options(folders: dict[str, str]) -> None:
    def cost(*samples: str) -> dict[str, float]:
        options = [word for text in samples for word in ("--sample", text)]
        found: dict[str, float] = json.loads(
            run("cost", "quickstart-digits-lego", "--json", *options)
        )
        return found

    plain, skipped = cost("steps=5"), cost("steps=5", "skip=0.5")
    assert plain["evaluations"] == skipped["evaluations"] == 9
    assert skipped["sample_flops"] < plain["sample_flops"]
    with pytest.raises(TesseraError, match="Did you mean `skip`"):
        cost("skpi=0.5")
    with pytest.raises(TesseraError, match="not of the form KEY=VALUE"):
        cost("skip")


def test_bricks_take_the_same_options(folders: dict[str, str], tmp_path: Path) -> None:
    common = ("--device", "cpu", "--rows", 2)
    run("bricks", folders["lego"], tmp_path / "a.png", *common, "steps=3", "levels=none")
    assert (tmp_path / "a.png").is_file()
    for arguments, message in (
        (["rho=5", "rho=5"], "given twice"),
        (["size=32x32"], "on the canvas that the model was trained on"),
        (["seed=3"], "not given as KEY=VALUE"),
    ):
        with pytest.raises(TesseraError, match=message):
            run("bricks", folders["lego"], tmp_path / "b.png", *common, *arguments)
    with pytest.raises(TesseraError, match="only a stack of bricks"):
        run("bricks", folders["tiny"], tmp_path / "b.png", *common)
    assert not (tmp_path / "b.png").exists()
