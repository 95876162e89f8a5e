"""Images of other channels than grey and RGB: read, converted, trained on, sampled, shown."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_files import last, random_images, write_folder, write_packed, write_zip
from PIL import Image
from training_case import tiny_recipe
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.convert import convert_images
from tessera.data.dataset import open_dataset
from tessera.data.decode import decode_image
from tessera.data.inspect import sample_grid, summarise
from tessera.data.latents import is_latents
from tessera.errors import DataError, RecipeError, TesseraError
from tessera.images import array_bytes, grid, png_bytes, visible
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser
from tessera.training.trainer import Trainer


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("name", ["t.zip", "t.safetensors", "t"])
def test_conversion_keeps_channels(tmp_path, channels, name):
    images = random_images(4, channels)
    names = ["a/0.npy", "a/1.npy", "b/0.npy", "b/1.npy"]
    files = {n: array_bytes(last(image)) for n, image in zip(names, images, strict=True)}
    write_folder(tmp_path / "s", files)
    report = convert_images(tmp_path / "s", tmp_path / name)
    assert (report.count, report.shape, report.class_names) == (4, (channels, 8, 8), ("a", "b"))
    dataset = open_dataset(tmp_path / name)
    np.testing.assert_array_equal(dataset.read(np.arange(4)), images)
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert not is_latents(tmp_path / name)
    again = convert_images(tmp_path / name, tmp_path / "u.zip")
    assert again.shape == (channels, 8, 8)


def test_channels_are_resized_each_for_itself(tmp_path):
    image = random_images(1, 5, 16)[0]
    write_zip(tmp_path / "s.zip", {"0.npy": array_bytes(last(image)[:, :12])})
    options = {"resolution": (4, 4), "transform": "center-crop", "form": "packed"}
    convert_images(tmp_path / "s.zip", tmp_path / "t.safetensors", **options)
    (result,) = open_dataset(tmp_path / "t.safetensors").read(np.arange(1))
    for plane, made in zip(image, result, strict=True):
        cut = Image.fromarray(np.ascontiguousarray(plane[2:14, :12]))
        np.testing.assert_array_equal(
            made, np.asarray(cut.resize((4, 4), Image.Resampling.LANCZOS))
        )


def test_rgba(tmp_path):
    rgba = np.ascontiguousarray(last(random_images(1, 4)[0]))
    stream = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(stream, "PNG")
    rgb = last(random_images(1)[0])
    write_folder(tmp_path / "s", {"a.png": stream.getvalue(), "b.png": rgb, "c.png": rgb[..., 0]})
    arguments = ["data", "convert", str(tmp_path / "s"), str(tmp_path / "t.zip"), "--channels"]
    assert CliRunner().invoke(app, [*arguments, "4"]).exit_code == 0
    images = open_dataset(tmp_path / "t.zip").read(np.arange(3)).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(images[0], rgba)
    np.testing.assert_array_equal(images[1, ..., :3], rgb)
    assert (images[1:, ..., 3] == 255).all()
    assert "4 (RGBA)" in str(CliRunner().invoke(app, [*arguments, "2", "--overwrite"]).exception)
    write_folder(tmp_path / "n", {"a.npy": array_bytes(last(random_images(1, 5)[0]))})
    with pytest.raises(DataError, match=r"a\.npy: an image of 5 channels cannot become one of 3"):
        convert_images(tmp_path / "n", tmp_path / "u.zip", channels=3)


def test_arrays_that_are_no_images():
    image = random_images(1, 5, 8)[0].transpose(1, 2, 0)
    whole = saved(np.ascontiguousarray(image))
    np.testing.assert_array_equal(decode_image(whole, "x"), image)
    np.testing.assert_array_equal(decode_image(saved(image[..., 0].copy()), "x"), image[..., 0])
    assert decode_image(saved(np.zeros((8, 8, 1), np.uint8)), "x").shape == (8, 8)
    huge = saved(np.zeros((8, 8), np.uint8)).replace(b"(8, 8)", b"(9999999, 9)")
    for data, message in (
        (saved(image.astype(np.float32)), "x: an array of float32"),
        (saved(np.zeros((5, 80, 80), np.uint8)), "the channels seem to come first"),
        (saved(np.zeros(8, np.uint8)), r"an array of shape \(8,\)"),
        (saved(np.asfortranarray(image)), "save it in C order"),
        (saved(np.array([{}]), allow_pickle=True), "x"),
        (whole[:-1], "cut off"),
        (whole + b"x", "followed by"),
        (whole[:40], "no array of NumPy"),
        (huge, "more than the limit|no array"),
    ):
        with pytest.raises(DataError, match=message):
            decode_image(data, "x")


def test_grids_show_three_channels_or_one():
    for channels, shown in ((1, 1), (2, 1), (3, 3), (4, 3), (7, 3)):
        images = random_images(2, channels, 64).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(visible(images), images[..., :shown])
        picture = grid(images, columns=2)
        np.testing.assert_array_equal(picture[:, 66:], images[1, ..., :shown])
        assert np.asarray(Image.open(io.BytesIO(png_bytes(images[0])))).shape[:2] == (64, 64)


def test_inspection(tmp_path):
    path = write_packed(tmp_path / "a.safetensors", random_images(4, 5), [0, 1] * 2)
    dataset = open_dataset(path)
    assert len(summarise(dataset, path).mean) == 5
    assert sample_grid(dataset).shape[2] == 3


def test_training_and_sampling(tmp_path):
    path = write_packed(tmp_path / "five.safetensors", random_images(8, 5), [0, 1] * 4)
    preview = {"rows": 1, "columns": 2, "every_images": 8}
    recipe = tiny_recipe(
        tmp_path,
        data={"path": str(path), "channels": 5},
        training={"images": 16},
        run={"preview": preview},
    )
    Trainer(recipe, tmp_path / "run").run()
    (*_, picture) = sorted((tmp_path / "run" / "previews").iterdir())
    assert Image.open(picture).mode == "RGB"
    arguments = ["sample", str(tmp_path / "run"), "--seeds", "0,1", "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(app, [*arguments, "--grid", "--class", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "s-grid.png").mode == "RGB"
    names = sorted(file.name for file in (tmp_path / "s").iterdir())
    assert names == ["000000.npy", "000001.npy", "dataset.json", "sampling.json"]
    dataset = open_dataset(tmp_path / "s")
    assert (dataset.shape, dataset.labels.tolist()) == ((5, 8, 8), [0, 0])
    again = CliRunner().invoke(app, [*arguments, "--class", "0", "--device", "cpu"])
    assert again.exit_code == 0, again.output
    wrong = tiny_recipe(tmp_path, data={"path": str(path)})
    with pytest.raises(TesseraError, match=r"5 channels, but data.channels is 3"):
        Trainer(wrong, tmp_path / "other").run()


def test_pipelines_give_all_channels(tmp_path):
    recipe = tiny_recipe(tmp_path, data={"channels": 4})
    pipe = build_pipeline(recipe, build_denoiser(recipe))
    assert pipe.sample([0, 1], output="numpy").shape == (2, 8, 8, 4)
    assert pipe.sample([0], output="samples").grid().shape[2] == 3


def test_scores_that_need_colours_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"looks at grey or RGB images, and data.channels is 5"):
        tiny_recipe(tmp_path, data={"channels": 5}, evaluate={"features": "inception"})
    tiny_recipe(tmp_path, data={"channels": 5}, evaluate={"features": "classifier"})
    with pytest.raises(RecipeError, match=r"channels"):
        tiny_recipe(tmp_path, data={"channels": 65})


def test_collections_are_to_be_converted_first(tmp_path):
    for name in ("a.csv", "a.parquet", "a.tar", "cifar-10-python.tar.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=r"tessera data convert .* NAME\.zip"):
            open_dataset(tmp_path / name)
