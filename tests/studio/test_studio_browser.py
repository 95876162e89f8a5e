"""The studio as a user meets it: every page, in a browser."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_case import Visitor, browser, needs_browser, needs_gradio, photographs, running
from tiny_pipeline import tiny_pipeline
from training_case import tiny_recipe

from tessera.starting import cache
from tessera.training.forecast import Timings
from tessera.training.trainer import Trainer

pytestmark = [pytest.mark.studio, needs_gradio, needs_browser]

TABS = ("Watch", "Sample", "Compare", "Train")
TINY = (
    "data.resolution=8 network.model_channels=8 network.num_blocks=1 training.batch=8 "
    "training.images=4000000 sampling.steps=2 run.tensorboard=false run.report=false "
    "run.log_every_images=64 run.preview.every_images=64 run.preview.rows=1 data.held_out=null"
)


def quick(recipe: Any, device: Any) -> Timings:
    """A measurement that takes no time."""
    return Timings({(recipe.training.batch, None, None): 0.01}, 0.1, 0.0, 0.1, 10**6)


class Place:
    """A folder of runs, photographs, a studio and a browser."""

    def __init__(self, folder: Path, url: str, context: Any) -> None:
        self.folder, self.runs, self.url = folder, folder / "runs", url
        self.visitor = Visitor(context, url)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("studio")
    runs = folder / "runs"
    preview = {"every_images": 96, "rows": 1, "columns": 4}
    for seed, name in enumerate(("first", "second")):
        recipe = tiny_recipe(folder, training={"seed": seed}, run={"preview": preview})
        Trainer(recipe, runs / name).run()
    shutil.copytree(runs / "first", runs / "goes")
    (runs / "broken").mkdir()
    (runs / "broken" / "recipe.yaml").write_text("name: [")
    os.utime(runs / "broken" / "recipe.yaml", (1, 1))  # the last one in the list
    tiny_pipeline().save(runs / "damaged")
    (runs / "damaged" / "model.safetensors").write_bytes(b"nothing")
    photographs(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_CACHE", str(folder / "cache"))
        patch.setattr(cache, "_measured", quick)
        with running(runs) as url, browser() as chromium:
            yield Place(folder, url, chromium.new_context(viewport={"width": 1280, "height": 900}))


@pytest.fixture
def visitor(place: Place) -> Iterator[Visitor]:
    """The page, in which nothing may have gone wrong at the end."""
    place.visitor.wrong.clear()
    yield place.visitor
    assert place.visitor.wrong == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_every_page_is_shown_in_light_and_dark_and_on_a_phone(
    place: Place, scheme: Any, width: int
) -> None:
    context = place.visitor.page.context.browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 844}
    )
    guest = Visitor(context, place.url)
    guest.sees("watch-status", "images seen")
    assert (guest.page.locator("body.dark").count() == 1) == (scheme == "dark")
    for tab in TABS:
        guest.open(tab)
        guest.page.wait_for_selector('[role="tabpanel"]:visible')
        wide = guest.page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
        assert wide <= 0, tab
    assert guest.wrong == []
    context.close()


def test_from_photographs_to_samples(place: Place, visitor: Visitor) -> None:
    visitor.open("Train")
    visitor.fill("begin-images", str(place.folder / "photos"))
    visitor.fill("begin-minutes", "5")
    visitor.fill("begin-changes", TINY)
    visitor.press("begin-plan")
    table = visitor.sees("begin-table", "time here")
    assert "24 in" in table
    assert "sea, wood" in table
    assert visitor.page.locator("#begin-name textarea, #begin-name input").input_value()
    visitor.fill("begin-name", "mine")
    visitor.press("begin-go")
    # It turns to the page that watches.
    visitor.sees("watch-status", "mine")
    visitor.sees("watch-status", "images a second")
    visitor.page.wait_for_selector("#watch-curve svg")
    visitor.page.wait_for_selector("#watch-preview img")
    visitor.press("watch-stop")
    visitor.sees("watch-notice", "asked process")
    visitor.page.wait_for_selector("#watch-status .dot.stopped")
    newest = max((place.runs / "mine" / "checkpoints").iterdir()).name
    visitor.page.get_by_text("Resume with changes").click()
    visitor.fill("watch-changes", f"training.images={int(newest) + 256}")
    visitor.press("watch-resume")
    visitor.sees("watch-notice", "resumed, by process")
    visitor.page.wait_for_selector("#watch-status .dot.finished")
    visitor.open("Sample")
    visitor.choose("sample-model", "mine")
    visitor.sees("sample-class", "Class")
    visitor.page.wait_for_selector("#option-steps input[type=range]")
    visitor.fill("sample-seeds", "0-3")
    visitor.press("sample-go")
    visitor.sees("sample-facts", "mine, trained on")
    assert visitor.page.locator("#sample-gallery img").count() >= 4
    visitor.page.wait_for_selector("#sample-course .strip img")
    with visitor.page.expect_download() as download:
        visitor.press("sample-zip")
    assert download.value.path().read_bytes().startswith(b"PK")


def test_runs_are_compared(visitor: Visitor) -> None:
    visitor.open("Compare")
    visitor.choose("compare-runs", "first", "second")
    visitor.fill("compare-seeds", "0-2")
    visitor.press("compare-go")
    visitor.page.wait_for_selector("#compare-grids .row:nth-of-type(3) img")
    assert visitor.page.locator("#compare-grids img").count() == 6
    assert visitor.page.locator("#compare-table svg polyline").count() == 2
    assert visitor.page.locator("#compare-table tr").count() == 3


def test_what_is_wrong_is_said_in_words(place: Place, visitor: Visitor) -> None:
    visitor.open("Watch")
    visitor.choose("watch-run", "broken")
    assert "recipe.yaml" in visitor.sees("watch-status", "cannot be read")
    visitor.choose("watch-run", "goes")
    visitor.sees("watch-status", "finished")
    shutil.rmtree(place.runs / "goes")
    visitor.sees("watch-status", "is not there (any more)")
    visitor.open("Sample")
    visitor.choose("sample-model", "damaged")
    assert "model.safetensors" in visitor.sees("sample-problem", "damaged")
    visitor.choose("sample-model", "first")
    visitor.page.wait_for_selector("#sample-go")
    visitor.fill("sample-more", "stesp=3")
    visitor.press("sample-go")
    visitor.sees("sample-notice", "Did you mean steps?")
    visitor.fill("sample-more", "")
    visitor.fill("sample-seeds", "0-500")
    visitor.press("sample-go")
    visitor.sees("sample-notice", "501 images")
    visitor.open("Train")
    visitor.fill("begin-images", str(place.folder / "none"))
    visitor.press("begin-plan")
    visitor.sees("begin-notice", "is not there")
    visitor.open("Compare")
    visitor.fill("compare-seeds", "x")
    visitor.press("compare-go")
    visitor.sees("compare-notice", "seeds")
    text = visitor.page.locator("body").inner_text()
    assert "Traceback" not in text


def test_without_the_token_nothing_is_answered(place: Place, tmp_path: Path) -> None:
    with running(tmp_path / "runs", token="correct-horse") as url:
        bare = url.partition("?")[0]
        for path in ("", "config", "gradio_api/info", "gradio_api/queue/data?session_hash=x"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(bare + path)
            assert refused.value.code == 401
            assert b"token" in refused.value.read()
        context = place.visitor.page.context.browser.new_context()
        guest = Visitor(context, url)
        guest.sees("watch-status", "No runs yet")
        assert guest.page.url == bare
        assert guest.wrong == []
        context.close()
        named = urllib.request.Request(place.url, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(named)
    config = json.loads(urllib.request.urlopen(place.url + "config").read())
    assert config["version"]
