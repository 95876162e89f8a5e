"""The `tessera data` commands as a user sees them."""

from __future__ import annotations

import pytest
from data_files import last, random_images, write_folder
from PIL import Image
from typer.testing import CliRunner

from tessera.cli import app
from tessera.errors import DataError


def run(*arguments) -> str:
    result = CliRunner(env={"COLUMNS": "300"}).invoke(
        app, ["data", *map(str, arguments)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def photos(tmp_path):
    files = {f"{'ab'[i % 2]}/{i}.png": last(x) for i, x in enumerate(random_images(9, size=12))}
    return write_folder(tmp_path / "photos", {**files, "b/broken.png": b"x", "readme.md": b"x"})


def test_convert_and_inspect(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("convert", photos, "set.zip", "--resolution", "8", "--skip-bad")
    for text in ("9 of 8x8 RGB", "2 classes", "broken.png", "readme.md", "set.zip"):
        assert text in output
    output = run("inspect", "set.zip", "--columns", "3")
    for text in ("9 of 8x8 RGB", "2 classes, 4 to 5 per class", "55.6%", "mean", "std"):
        assert text in output
    with Image.open("set-samples.png") as picture:
        assert picture.mode == "RGB"


def test_all_options(photos, tmp_path):
    output = run(
        *("convert", photos, tmp_path / "out.safetensors", "--resolution", "8x4"),
        *("--transform", "center-crop-wide", "--filter", "box", "--channels", "1"),
        *("--max-images", "4", "--format", "packed", "--workers", "1", "--overwrite"),
        *("--ignore-orientation", "--legacy-wide-crop"),
    )
    assert "4 of 8x8 grey" in output
    out = tmp_path / "grid.png"
    run("inspect", tmp_path / "out.safetensors", "--out", out, "--max-images", "2", "--seed", "3")
    assert out.exists()
    before = out.read_bytes()
    again = ("inspect", tmp_path / "out.safetensors", "--out", out, "--seed", "4")
    with pytest.raises(DataError, match="exists already"):
        run(*again)
    assert out.read_bytes() == before
    run(*again, "--overwrite")
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "2"], "--channels"),
        (["--resolution", "big"], "resolution"),
        (["--filter", "sharp"], "filter"),
        ([], "broken.png"),
        (["--transform", "lsun-crop", "--resolution", "8", "--filter", "box"], "out --filter"),
    ],
)
def test_mistakes_are_user_errors(photos, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        run("convert", photos, tmp_path / "a.zip", *options)


def test_files_are_replaced_when_told(photos, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"exists already.*give --overwrite to replace"):
        run("convert", photos, tmp_path / "a.zip", "--resolution", "8", "--skip-bad")
    with pytest.raises(DataError, match=r"a.rar: .rar files cannot be written.*--format folder"):
        run("convert", photos, tmp_path / "a.rar", "--resolution", "8", "--skip-bad")


@pytest.mark.parametrize("transform", ["adm-center-crop", "lsun-crop"])
def test_crops_of_adm_and_lsun(photos, tmp_path, transform):
    options = ("--resolution", "8", "--skip-bad", "--transform", transform)
    assert "9 of 8x8 RGB" in run("convert", photos, tmp_path / "a.zip", *options)


def test_inspect_writes_png_only(photos):
    with pytest.raises(DataError, match=r"\.png"):
        run("inspect", photos, "--skip-bad", "--out", "grid.jpg")
