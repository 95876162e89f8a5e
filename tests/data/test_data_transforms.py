"""Crop and resize against the released tool."""

from __future__ import annotations

import golden_cases
import numpy as np
import pytest
from PIL import Image

from tessera.data.transforms import apply_transform, check_transform, parse_size, to_channels
from tessera.errors import DataError

TENSORS = golden_cases.load("edm", "dataset")
CONFIG = golden_cases.case("edm", "dataset")["config"]
RESULTS = [
    key.split(".")[1:]
    for key in TENSORS
    if key.startswith(("out.none.", "out.center-crop.", "out.center-crop-wide."))
]


@pytest.mark.parametrize(("transform", "image", "size"), RESULTS)
def test_transforms_repeat_the_released_tool(transform, image, size):
    source = TENSORS[f"in.{image}"].numpy()
    result = apply_transform(
        source, transform, parse_size(size), released_wide_crop=transform == "center-crop-wide"
    )
    expected = TENSORS[f"out.{transform}.{image}.{size}"].numpy()
    assert result.shape == expected.shape
    assert np.abs(result.astype(int) - expected).max() <= 1


PDM = golden_cases.load("pdm", "images")


@pytest.mark.parametrize("name", [key for key in PDM if key.startswith("out.")])
def test_crops_of_adm_and_lsun_repeat_the_released_code(name):
    _, transform, image, size = name.split(".")
    transform = {"center_crop": "adm-center-crop", "lsun_box_crop": "lsun-crop"}[transform]
    side = int(size.removeprefix("s"))
    result = apply_transform(PDM[f"in.{image}"].numpy(), transform, (side, side))
    assert result.shape == (side, side, 3)
    assert np.abs(result.astype(int) - PDM[name].numpy()).max() <= 1


@pytest.mark.parametrize("shape", [(300, 133, 3), (64, 500), (31, 40, 3), (16, 16, 3), (129, 257)])
def test_crops_of_adm_and_lsun_by_hand(shape):
    """The same with Pillow's own calls, written once more."""
    side = 16
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    whole = Image.fromarray(pixels).convert("RGB")

    adm = whole
    while min(adm.size) >= 2 * side:
        adm = adm.resize((adm.width // 2, adm.height // 2), Image.Resampling.BOX)
    for name, picture, method in (
        ("adm-center-crop", adm, Image.Resampling.BICUBIC),
        ("lsun-crop", whole, Image.Resampling.BOX),
    ):
        scale = side / min(picture.size)
        size = round(picture.width * scale), round(picture.height * scale)
        picture = picture.resize(size, method)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        expected = np.asarray(picture.crop((left, top, left + side, top + side)))
        np.testing.assert_array_equal(apply_transform(pixels, name, (side, side)), expected)


def test_the_released_wide_crop_leaves_out_small_pictures():
    cases = {key: value for key, value in CONFIG.items() if key.startswith("center-crop-wide.")}
    assert len(cases) == 4
    for key, outcome in cases.items():
        _, image, size = key.split(".")
        source = TENSORS[f"in.{image}"].numpy()
        result = apply_transform(
            source, "center-crop-wide", parse_size(size), released_wide_crop=True
        )
        assert (result is None) == outcome.startswith("skipped")


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 100), (90, 66), (48, 64)])
def test_wide_crop_keeps_the_aspect_ratio(height, width):
    """A centred disc stays round: its extent is the same along rows and columns."""
    y, x = np.mgrid[:height, :width] + 0.5
    disc = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < 15**2).astype(np.uint8) * 255
    result = apply_transform(disc, "center-crop-wide", (32, 24))
    assert result.shape == (32, 32, 3)
    assert not result[:4].any()
    assert not result[28:].any()
    bright = result[:, :, 0] > 128
    rows, columns = bright.any(axis=1).sum(), bright.any(axis=0).sum()
    assert abs(int(rows) - int(columns)) <= 1


def test_wide_crop_leaves_out_what_is_too_small():
    assert apply_transform(np.zeros((24, 31), np.uint8), "center-crop-wide", (32, 24)) is None
    assert apply_transform(np.zeros((20, 90), np.uint8), "center-crop-wide", (32, 24)) is None
    assert apply_transform(np.zeros((24, 32), np.uint8), "center-crop-wide", (32, 24)) is not None


def test_filters_differ():
    image = TENSORS["in.land"].numpy()
    results = [
        apply_transform(image, "none", (16, 16), name).tobytes()
        for name in ("lanczos", "bicubic", "bilinear", "hamming", "box", "nearest")
    ]
    assert len(set(results)) == 6


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("64x48", (64, 48)), ("64,48", (64, 48)), ("8X9", (8, 9))]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "64x", "1x2x3", "-4", "6.5", "big"])
def test_no_sizes(text):
    with pytest.raises(DataError, match="resolution"):
        parse_size(text)


@pytest.mark.parametrize(
    ("transform", "size", "resample", "message"),
    [
        ("crop", (8, 8), "lanczos", "choose one of none, center-crop"),
        ("none", (8, 8), "sharp", "choose one of lanczos"),
        ("none", (8, 4), "lanczos", "not square"),
        ("center-crop", (8, 4), "lanczos", "not square"),
        ("center-crop", None, "lanczos", "add a resolution"),
        ("center-crop-wide", (4, 8), "lanczos", "high"),
        ("adm-center-crop", (8, 4), None, "not square"),
        ("adm-center-crop", None, None, "add a resolution"),
        ("adm-center-crop", (8, 8), "lanczos", "filters of its own"),
        ("lsun-crop", (8, 8), "box", "filters of its own"),
    ],
)
def test_impossible_choices(transform, size, resample, message):
    with pytest.raises(DataError, match=message):
        check_transform(transform, size, resample)


def test_channels():
    grey = np.arange(4, dtype=np.uint8).reshape(2, 2)
    colour = to_channels(grey, 3)
    assert colour.shape == (2, 2, 3)
    np.testing.assert_array_equal(to_channels(colour, 1), grey)
    assert to_channels(grey, None) is grey
