"""What a notebook and `help()` show of pipelines and their samples."""

from __future__ import annotations

import inspect
import sys
import types
from html.parser import HTMLParser
from typing import Any

import lego_case
import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import tiny_pipeline

from tessera import progress
from tessera.pipelines.base import Pipeline
from tessera.pipelines.samples import Samples


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


def test_help_lists_the_options_of_the_model(pipe: Pipeline) -> None:
    for method in (pipe.sample, pipe.sample_batches):
        shown = inspect.signature(method).parameters
        for option in pipe.options():
            if "." not in option.name:
                assert shown[option.name].default == option.value
            assert f"{option.name}={option.value!r}" in (method.__doc__ or "")
        assert shown["steps"].annotation is int
        assert shown["guidance"].annotation is float
        assert shown["size"].annotation == tuple[int, int] | None
        assert next(iter(shown)) == "seeds"
        assert inspect.ismethod(method) or inspect.isfunction(method)  # as help() needs it
    assert (inspect.getdoc(pipe.sample) or "").startswith("Make one image for each seed.")
    assert "options" in inspect.signature(Pipeline.sample).parameters


def test_other_models_list_other_options(pipe: Pipeline) -> None:
    bricks = inspect.signature(lego_case.tiny_pipeline().sample).parameters
    assert {"skip", "bricks"} <= bricks.keys()
    assert not {"skip", "bricks"} & inspect.signature(pipe.sample).parameters.keys()
    other = pipe.copied()
    other.recipe = pipe.recipe.model_copy(
        update={"sampling": pipe.recipe.sampling.model_copy(update={"steps": 7})}
    )
    assert inspect.signature(other.sample).parameters["steps"].default == 7
    assert inspect.signature(pipe.sample).parameters["steps"].default == 3


def test_a_copy_samples_from_its_own_weights(pipe: Pipeline) -> None:
    pipe.sample([0])
    other = pipe.copied()
    for parameter in other.model.parameters():
        parameter.data.zero_()
    assert (other.sample([0]) != pipe.sample([0])).any()


def test_samples_are_what_numpy_gets(pipe: Pipeline) -> None:
    samples = pipe.sample("3-7", labels=[0, 1, 2, -1, 0], output="samples", batch=2)
    plain = pipe.sample("3-7", labels=[0, 1, 2, -1, 0])
    assert (np.asarray(samples) == plain).all()
    assert (len(samples), list(samples.seeds)) == (5, [3, 4, 5, 6, 7])
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, -1, 0]
    assert [samples.name(0), samples.name(3)] == ["seed 3, ant", "seed 6, no class"]
    assert (np.asarray(samples[1]) == plain[1]).all()
    assert all(isinstance(image, Image.Image) for image in samples)
    assert "5 samples of 8x8" in repr(samples)


def test_samples_show_themselves(tmp_path: Any) -> None:
    samples = Samples(
        np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 2], np.array([0, 0, 1]), ["<a>", '"']
    )
    tags = _Tags(samples._repr_html_()).tags
    shown = [attributes for tag, attributes in tags if tag == "img"]
    assert [image["title"] for image in shown] == ["seed 0, <a>", "seed 1, <a>", 'seed 2, "']
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in shown)
    assert {tag for tag, _ in tags} == {"div", "img", "small"}
    samples.save(tmp_path / "grid.png", columns=3)
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == samples.grid(3).shape


def test_a_pipeline_shows_itself(pipe: Pipeline) -> None:
    text = pipe._repr_html_()
    assert "ant, bee, cat" in text
    assert [tag for tag, _ in _Tags(text).tags].count("tr") == len(repr(pipe).splitlines()) - 1


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook's cell has shown; this process is a notebook while the test runs."""
    shown: list[str] = []

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        shown.append(data["text/html"])
        update = lambda data, raw: shown.append(data["text/html"])  # noqa: E731
        return types.SimpleNamespace(update=update)

    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr("tessera.pipelines.base.in_notebook", lambda: True)
    return shown


def test_a_notebook_shows_a_bar(
    pipe: Pipeline, cells: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    pipe.sample("0-3", batch=2, on_step=lambda seeds, state: steps.append(state.step))
    assert steps == [1, 2, 3, 1, 2, 3]
    assert '<progress value="0" max="4">' in cells[0]
    assert '<progress value="4" max="4"></progress> sampling: 4 of 4 images' in cells[-1]
    assert capsys.readouterr() == ("", "")
    before = len(cells)
    pipe.sample("0-3", progress=False)
    assert len(cells) == before


def test_elsewhere_there_is_none_unless_asked_for(
    pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not progress.in_notebook()
    pipe.sample([0])
    assert capsys.readouterr() == ("", "")
