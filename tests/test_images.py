"""Quantisation, PNG files and grids."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tessera.images import from_uint8, grid, labelled_grid, png_bytes, save_png, to_pil, to_uint8


def test_every_grey_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[[0, 255]].tolist() == [-1, 1]


def test_quantisation_truncates_and_clips() -> None:
    # trunc(clip(127.5 x + 128, 0, 255))
    values = torch.tensor([-5.0, -1.0, -1 / 127.5, 0.0, 0.9999, 1.0, 5.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 128, 255, 255, 255]
    assert to_uint8(torch.tensor([127.4 / 127.5])).item() == 255
    assert to_uint8(torch.tensor([126.9 / 127.5], dtype=torch.float64)).item() == 254


def test_png_holds_the_pixels(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for shape in ((5, 7, 3), (5, 7, 1), (5, 7)):
        image = generator.integers(0, 256, shape, dtype=np.uint8)
        save_png(tmp_path / "image.png", image)
        with Image.open(tmp_path / "image.png") as read:
            assert read.mode == ("RGB" if shape[-1] == 3 else "L")
            assert (np.asarray(read) == image.reshape(np.asarray(read).shape)).all()


def test_uncompressed_png() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    assert len(png_bytes(image, compress_level=0)) > image.size > len(png_bytes(image))
    with Image.open(io.BytesIO(png_bytes(image, 0))) as read:
        assert read.size == (32, 32)
    assert to_pil(image[::-1]).mode == "RGB"


def test_grid_places_images_row_by_row() -> None:
    images = np.stack([np.full((2, 2, 3), index, np.uint8) for index in range(5)])
    canvas = grid(images, columns=3, gap=1, scale=1)
    assert canvas.shape == (5, 8, 3)
    assert canvas[0, [0, 3, 6], 0].tolist() == [0, 1, 2]
    assert canvas[3, [0, 3], 0].tolist() == [3, 4]
    assert (canvas[:, 2] == 255).all()
    assert (canvas[3:, 6:] == 255).all(), "the empty place stays white"


def test_grid_enlarges_small_images_and_is_square() -> None:
    canvas = grid(np.zeros((9, 16, 16, 1), np.uint8), gap=0)
    assert canvas.shape == (3 * 64, 3 * 64, 1)
    assert grid(np.zeros((4, 128, 128, 3), np.uint8), gap=0).shape == (256, 256, 3)


def test_a_labelled_grid_holds_pictures_of_any_kind_beside_their_names() -> None:
    grey, colour = np.full((4, 8, 1), 200, np.uint8), np.full((6, 8, 3), (9, 90, 190), np.uint8)
    bare = labelled_grid([[grey, colour], [colour, colour]], gap=3)
    assert bare.shape == (6 + 3 + 6, 8 + 3 + 8, 3)
    assert (bare[:4, :8] == 200).all()
    assert (bare[4:6, :8] == 255).all()
    assert (bare[9:, 11:] == (9, 90, 190)).all()
    named = labelled_grid([[grey, colour]], ["first row"], ["a", "b"], least=20)
    height, width = named.shape[:2]
    # Enlarged by 3, the least that gives 20 pixels.
    pictures = named[height - 18 :, width - (2 * 24 + 2) :]
    assert (pictures[:12, :24] == 200).all()
    assert (pictures[:, 26:] == (9, 90, 190)).all()
    assert (named[: height - 18] < 128).any()
    assert (named[height - 18 :, : width - 50] < 128).any()
