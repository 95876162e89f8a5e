"""Large canvases through an autoencoder in tiles, and in other precisions and batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_vae import save_vae

from tessera.data.codec import VaeCodec
from tessera.data.tiling import Tiling, blend_tiles
from tessera.errors import DataError

TILES = Tiling(tile=32, overlap=16, above=32**2)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_vae(tmp_path_factory.mktemp("tiles") / "vae"))


def smooth_images(height: int, width: int, count: int = 1, cell: int = 8) -> torch.Tensor:
    size = (count, 3, height // cell, width // cell)
    noise = torch.rand(size, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    return (255 * wide).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "scale"),
    [((9, 23), 8, 2, 1), ((20, 8), 8, 4, 3), ((16, 17), 8, 1, 2), ((8, 8), 8, 2, 2)],
)
def test_what_works_on_each_cell_alone_is_the_same_in_tiles(
    size: tuple[int, int], tile: int, overlap: int, scale: int
) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))

    def grown(part: torch.Tensor) -> torch.Tensor:
        assert max(part.shape[2:]) <= tile
        return F.interpolate(part, scale_factor=scale, mode="nearest").exp()

    expected = F.interpolate(x, scale_factor=scale, mode="nearest").exp()
    torch.testing.assert_close(blend_tiles(grown, x, tile, overlap, grow=scale), expected)


def test_the_border_of_a_tile_counts_for_nothing() -> None:
    def spoiled(part: torch.Tensor) -> torch.Tensor:
        return F.pad(part[:, :, 1:-1, 1:-1], (1, 1, 1, 1), value=1e6)

    whole = blend_tiles(spoiled, torch.zeros(1, 1, 64, 64), 32, 8)
    assert (whole[:, :, 1:-1, 1:-1] == 0).all()
    assert (whole[:, :, 0] == 1e6).all()


def roughest(difference: torch.Tensor, dim: int) -> float:
    """The largest step between neighbouring rows or columns, of the mean one."""
    steps = difference.diff(dim=dim).abs().mean((0, 1, 5 - dim))[1:-1]
    return float(steps.max() / steps.mean())


def test_no_seams(vae: str) -> None:
    """Tiled and whole differ by little and evenly; nothing jumps where tiles begin or end."""
    whole = VaeCodec(vae)
    tiled = VaeCodec(vae, tiling=Tiling(tile=64, overlap=16, above=0))
    images = smooth_images(128, 192, cell=4)
    moments, found = whole.encode(images), tiled.encode(images)
    assert 0 < (found - moments).abs().mean() < 0.1 * moments.std()
    z = (moments[:, :4] - whole.shift) * whole.scale
    pixels, cut = (codec.decode(z).to(torch.float32) for codec in (whole, tiled))
    assert 0 < (pixels - cut).abs().mean() < 0.25 * pixels.std()
    # The same, cut without overlap: that is a seam.
    rough = torch.cat([whole.encode(part) for part in images.split(64, 3)], 3)
    hard = torch.cat([whole.decode(part).to(torch.float32) for part in z.split(32, 3)], 3)
    for seamless, seam in ((found - moments, rough - moments), (cut - pixels, hard - pixels)):
        assert max(roughest(seamless, 2), roughest(seamless, 3)) < 2
        assert roughest(seam, 3) > 3


def test_canvases_that_are_small_are_taken_whole(vae: str) -> None:
    images = smooth_images(32, 32, 3)
    whole, tiled = VaeCodec(vae), VaeCodec(vae, tiling=TILES)
    moments = whole.encode(images)
    assert torch.equal(moments, tiled.encode(images))
    assert torch.equal(whole.decode(moments[:, :4]), tiled.decode(moments[:, :4]))
    assert Tiling().cuts(1024, 1025)
    assert not Tiling().cuts(1024, 1024)


def test_memory_is_bounded(vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder never sees more than a tile, of so many images as it takes at once."""
    codec, seen = VaeCodec(vae, tiling=TILES, batch=2), []
    loaded = codec._load()
    encode, decode = loaded.encode, loaded.decode

    def spy(function):
        def call(x):
            seen.append(tuple(x.shape))
            return function(x)

        return call

    monkeypatch.setattr(loaded, "encode", spy(encode))
    monkeypatch.setattr(loaded, "decode", spy(decode))
    moments = codec.encode(smooth_images(32, 80, 3))
    assert moments.shape == (3, 8, 16, 40)
    assert set(seen) == {(2, 3, 32, 32), (1, 3, 32, 32)}
    seen.clear()
    assert codec.decode(moments[:, :4]).shape == (3, 3, 32, 80)
    assert set(seen) == {(2, 4, 16, 16), (1, 4, 16, 16)}


def test_precisions(vae: str) -> None:
    images = smooth_images(16, 16, 2)
    exact, half = VaeCodec(vae).encode(images), VaeCodec(vae, precision="bf16").encode(images)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05 * exact.abs().max()
    z = exact[:, :4]
    assert torch.equal(VaeCodec(vae, precision="bf16").decode(z), VaeCodec(vae).decode(z))
    low = VaeCodec(vae, decode_precision="bf16")
    assert 0 < (low.decode(z).int() - VaeCodec(vae).decode(z)).abs().max() < 16
    assert low.describe() != VaeCodec(vae).describe()
    assert VaeCodec(vae, tiling=TILES).describe() != VaeCodec(vae).describe()
    floats = images.to(torch.float32) / 127.5 - 1
    assert torch.equal(VaeCodec(vae).encode(floats), exact)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(tile=33, above=0), "a tile of 33 pixels: give a positive multiple of 2"),
        (Tiling(tile=32, overlap=3, above=0), "an overlap of 3 pixels"),
        (Tiling(tile=32, overlap=18, above=0), "more than half a tile"),
    ],
)
def test_tiles_that_cannot_be(vae: str, tiling: Tiling, message: str) -> None:
    with pytest.raises(DataError, match=message):
        VaeCodec(vae, tiling=tiling).encode(smooth_images(64, 64))
