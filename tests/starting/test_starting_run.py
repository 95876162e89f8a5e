"""From a folder of images to a report, with a tiny network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_archive, write_folder, write_packed
from typer.testing import CliRunner

from tessera.cli import app
from tessera.errors import DataError, RecipeError, TesseraError
from tessera.recipes.loading import load_recipe
from tessera.reports import making
from tessera.starting import cache
from tessera.starting.begin import plan_training
from tessera.starting.cache import cache_folder, converted
from tessera.starting.choice import refuse_large
from tessera.starting.facts import is_collection, look
from tessera.training.forecast import Timings

TINY = [
    "network.model_channels=8", "network.num_blocks=1", "training.images=48", "training.batch=8",
    "sampling.steps=2", "run.tensorboard=false",
]  # fmt: skip


def images_of(colour: bool = True, count: int = 12, side: int = 10) -> list[np.ndarray]:
    made = random_images(count, 3 if colour else 1, side)
    return [i.transpose(1, 2, 0) if colour else i[0] for i in made]


def sorted_photos(folder: Path) -> Path:
    files: dict[str, Any] = {}
    for index, image in enumerate(images_of()):
        files[f"cat/{index}.png"] = image
        files[f"dog/{index}.png"] = 255 - image
    return write_folder(folder, files)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Measurements that scatter and take no time."""
    measured: list[float] = []

    def measure(recipe: Any, device: Any) -> Timings:
        measured.append(0.01 * (1 + len(measured)))
        return Timings({(recipe.training.batch, None, None): measured[-1]}, 0.1, 0.0, 0.1, 10**6)

    monkeypatch.setattr(cache, "_measured", measure)
    return measured


def run(*words: Any, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *map(str, words)])
    if isinstance(result.exception, TesseraError) and code:
        return str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_from_a_folder_to_a_report(
    tmp_path: Path, quick: list[float], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "build_reference", _none)
    monkeypatch.setattr(making, "_MOST", 20)
    photos, out = sorted_photos(tmp_path / "photos"), tmp_path / "run"
    text = run(photos, out, "--minutes", "5", *TINY)
    assert "24 in" in text
    assert "cat, dog" in text
    assert f"report: {out / 'report.html'}" in text
    assert f"samples: {out / 'samples.png'}" in text
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    recipe = load_recipe(out / "recipe.yaml")
    assert (recipe.data.resolution, recipe.data.num_classes) == (8, 2)
    assert recipe.training.images == 48
    assert recipe.data.path is not None
    assert Path(recipe.data.path).parent == own_cache / "data"
    with pytest.raises(TesseraError, match="not empty"):
        run(photos, out, "--minutes", "5", *TINY)


def _none(*_: Any, **__: Any) -> None:
    raise DataError("too few")


def test_a_plan_only_shows_and_twice_is_the_same(
    tmp_path: Path, quick: list[float], own_cache: Path
) -> None:
    photos = sorted_photos(tmp_path / "photos")
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    text = run(photos, "--minutes", "5", "--plan", "--save", first)
    assert "time here" in text
    assert not (own_cache / "data").exists()
    times = len(quick)
    run(photos, "--minutes", "5", "--plan", "--save", second)
    assert len(quick) == times  # what was measured is kept
    assert first.read_bytes() == second.read_bytes()
    (own_cache / "speeds.json").write_text("{")
    run(photos, "--minutes", "5", "--plan")
    assert len(quick) > times


def test_what_was_measured_beside_other_programs_is_measured_anew_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, now, measured = load_recipe("cifar10-small"), [0.7], list[float]()

    def measure(recipe: Any, device: Any) -> Timings:
        measured.append(now[0])
        return Timings({(32, None, None): 1.0}, 0.1, 0.0, 0.1, 10**6, others=now[0])

    monkeypatch.setattr(cache, "_measured", measure)
    monkeypatch.setattr(cache, "_others_now", lambda: now[0])

    def look_again(others: float) -> Timings:
        now[0] = others
        return cache.measured_here(cache.this_machine(), torch.device("cpu"))(recipe)

    assert look_again(0.7).others == look_again(0.5).others == 0.7  # as many others as then
    assert look_again(0.05).others == look_again(0.7).others == 0.05
    assert measured == [0.7, 0.05]


def test_the_memory_told_is_not_less_than_what_was_tried_already(
    tmp_path: Path, quick: list[float]
) -> None:
    start = plan_training(sorted_photos(tmp_path / "photos"), 5, device=torch.device("cpu"))
    assert start.forecast.memory_bytes > 10**7  # of the process, and not that of `quick`
    # Samples of the report, the picture, and three strips, of 16 in a preview that takes 0.1 s.
    assert start.sampling_seconds > 0.1 * (20 + 32 + 3) / 16 - 1e-9


def test_sets_are_converted_once_by_their_content(tmp_path: Path, own_cache: Path) -> None:
    recipe = load_recipe("photos-64", ["data.resolution=8"])
    photos, said = sorted_photos(tmp_path / "photos"), list[str]()
    path = converted(look(photos), recipe, said.append)
    time = path.stat().st_mtime_ns
    (tmp_path / "other").mkdir()
    os.rename(photos, tmp_path / "other" / "name")
    assert converted(look(tmp_path / "other" / "name"), recipe, said.append) == path
    assert path.stat().st_mtime_ns == time
    assert "converted 24 images" in said[0]
    assert "converted before" in said[1]
    path.write_bytes(path.read_bytes()[:100])  # damaged
    assert converted(look(tmp_path / "other" / "name"), recipe, said.append) == path
    assert "converted 24 images" in said[2]
    write_folder(tmp_path / "other" / "name", {"dog/1.png": images_of()[0]})
    assert converted(look(tmp_path / "other" / "name"), recipe, said.append) != path


def test_the_cache_is_where_the_system_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TESSERA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tessera"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tessera"


def test_what_is_seen_of_a_folder(tmp_path: Path) -> None:
    files: dict[str, Any] = {"a.png": images_of()[0], "b.png": images_of(False)[0]}
    found = look(write_folder(tmp_path / "mixed", {**files, "c.jpg": b"no", "notes.txt": b"x"}))
    assert (found.count, found.grey, found.ignored, found.classes) == (2, 1, 1, ())
    assert found.sizes == (((10, 10), 2),)
    (message,) = found.skipped
    assert "c.jpg: not an image that can be read" in message
    assert (found.at_least(10), found.at_least(11)) == (1, 0)


def test_archives_and_packed_sets_are_seen_alike(tmp_path: Path) -> None:
    images, labels = random_images(6), [0, 1, 2, 0, 1, 2]
    zipped = look(write_archive(tmp_path / "a.zip", images, labels, ("x", "y", "z")))
    packed = look(write_packed(tmp_path / "a.safetensors", images, labels, ("x", "y", "z")))
    assert zipped.sizes == packed.sizes == (((8, 8), 6),)
    assert zipped.classes == packed.classes == (("x", 2), ("y", 2), ("z", 2))


def test_lists_are_collections_and_change_with_their_images(tmp_path: Path) -> None:
    first, second = images_of()[:2]
    folder = write_folder(tmp_path / "listed", {"a.png": first, "b.png": second})
    listed = folder / "a.csv"
    listed.write_text("file,label\na.png,0\nb.png,1\n")
    assert is_collection(str(listed))
    found = look(listed)
    assert (found.count, found.classes) == (2, (("0", 1), ("1", 1)))
    assert look(listed) == found
    write_folder(folder, {"b.png": first})
    changed = look(listed)
    assert changed.digest != found.digest
    listed.write_text("file,label\na.png,1\nb.png,0\n")
    assert look(listed).digest != changed.digest


def test_images_beside_the_classes_are_left_out_with_words(tmp_path: Path) -> None:
    photos = sorted_photos(tmp_path / "photos")
    write_folder(photos, {"stray.png": images_of()[0]})
    found = look(photos)
    assert found.count == 24
    assert "lies beside the folders of the classes" in found.skipped[0]


def test_errors_speak(tmp_path: Path, quick: list[float]) -> None:
    empty = write_folder(tmp_path / "empty", {"notes.txt": b"x"})
    with pytest.raises(DataError, match="no image in it that can be used"):
        look(empty)
    broken = write_folder(
        tmp_path / "broken", {"a.png": images_of()[0], **{f"{i}.jpg": b"no" for i in range(3)}}
    )
    with pytest.raises(TesseraError, match="3 images cannot be used"):
        refuse_large(look(broken))
    photos = sorted_photos(tmp_path / "photos")
    with pytest.raises(RecipeError, match="name one run folder"):
        run(photos, "a", "b", "--minutes", "5")
    with pytest.raises(RecipeError, match="--save goes with --plan"):
        run(photos, "--save", tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match="--plan and --save belong to images"):
        run("cifar10-small", "--plan")


def test_what_stands_in_the_place_of_a_recipe(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10-small", "photos", "run"):
        Path(name).mkdir()
    Path("run/recipe.yaml").touch()
    Path("mine.yaml").touch()
    Path("x.zip").touch()
    found = {
        name: is_collection(name)
        for name in (
            "cifar10-small",
            "./cifar10-small",
            "photos",
            "run",
            "mine.yaml",
            "x.zip",
            "no",
        )
    }
    assert found == {
        "cifar10-small": False, "./cifar10-small": True, "photos": True, "run": False,
        "mine.yaml": False, "x.zip": True, "no": False,
    }  # fmt: skip
    Path("photos/config.json").write_text("{}")
    with pytest.raises(TesseraError, match="folder of a trained model"):
        is_collection("photos")
