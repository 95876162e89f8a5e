"""Opening images: known formats only, and none larger than the limit."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from training_case import start
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.decode import decode_image, image_extensions, is_image
from tessera.errors import DataError
from tessera.images import MAX_PIXELS, image_formats, open_image, save_png
from tessera.metrics.images import open_images
from tessera.pipelines.generate import read_images

DOCS = Path(__file__).parents[1] / "docs/data.md"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares black pixels without end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(999))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Pillow would have given to Ghostscript."""
    started: list[str] = []

    def record(*arguments: object, **options: object) -> Image.core.ImagingCore:
        started.append("gs")
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", record)
    return started


def test_a_file_of_another_format_starts_no_program(tmp_path: Path, no_program: list[str]) -> None:
    with Image.open(io.BytesIO(EPS)) as picture:
        picture.load()
    assert no_program.pop() == "gs"  # Pillow alone would

    with pytest.raises(DataError, match=r"photo\.png: not an image"):
        decode_image(EPS, "photo.png")
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / "000000.png").write_bytes(EPS)
    with pytest.raises(DataError, match="not an image"):
        open_images(folder)
    with pytest.raises(OSError, match="cannot identify"):
        read_images(folder, [0])
    result = CliRunner().invoke(app, ["data", "convert", str(folder), str(tmp_path / "a.zip")])
    assert isinstance(result.exception, DataError)
    assert no_program == []


def test_the_formats_are_those_that_the_documentation_names() -> None:
    text = DOCS.read_text().replace("JPEG 2000", "JPEG2000").replace("WebP", "WEBP")
    line = next(line for line in text.splitlines() if line.startswith("Images are "))
    named = [word.strip(",.()") for word in line.split()]
    assert set(image_formats()) <= set(named)
    assert {"PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"} <= set(image_formats())
    assert {".png", ".jpg", ".tif", ".pgm", ".gif"} <= image_extensions()
    assert not any(map(is_image, ["a.eps", "a.ps", "a.psd", "a.ico", "a.fits", "a.wmf"]))


@pytest.mark.parametrize("format_", image_formats())
def test_every_format_is_opened(format_: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(buffer, format_)
    with open_image(buffer.getvalue()) as image:
        assert (image.format, image.size) == (format_, (16, 8))
        assert np.asarray(image.convert("RGB"))[0, 0, 0] > 200


@pytest.mark.parametrize("size", [(8193, 8192), (13000, 13000), (60000, 60000)])
def test_images_over_the_limit_are_not_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=r"photo: .* more than the limit of 67,108,864") as caught:
        decode_image(bomb(*size), "photo")
    assert "--max-pixels" in str(caught.value)


def test_the_command_refuses_them_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(bomb(13000, 13000))  # of which Pillow would warn
    process = start("data", "convert", str(tmp_path / "photos"), str(tmp_path / "a.zip"))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert "a.png: 13000x13000 pixels" in err
    assert "Warning" not in err


def test_the_limit_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert open_image(bomb(8192, 8192)).size == (8192, 8192)
    assert open_image(bomb(60000, 60000), max_pixels=60000**2).size == (60000, 60000)
    with pytest.raises(DataError, match="limit of 3,599,999,999"):
        open_image(bomb(60000, 60000), max_pixels=60000**2 - 1)

    save_png(tmp_path / "photos" / "a.png", np.zeros((8, 8, 3), np.uint8))
    save_png(tmp_path / "photos" / "b.png", np.zeros((9, 9, 3), np.uint8))
    command = ["data", "convert", str(tmp_path / "photos"), str(tmp_path / "a.zip")]
    options = ["--resolution", "8", "--max-pixels"]
    result = CliRunner().invoke(app, [*command, *options, "80"])
    assert "b.png: 9x9 pixels are more than the limit of 80" in str(result.exception)
    result = CliRunner().invoke(app, [*command, *options, "80", "--skip-bad"])
    assert "1 of 8x8 RGB" in result.output
    result = CliRunner().invoke(app, [*command, *options, "81", "--overwrite"])
    assert "2 of 8x8 RGB" in result.output
    assert MAX_PIXELS == 67_108_864  # as help and documentation say
