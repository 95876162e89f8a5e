"""Which part of the picture is sampled, by models that know where their pixels lie."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tessera.conditioning import coordinates
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.windows import Windows
from tessera.errors import TesseraError
from tessera.recipes.schema import CanvasConfig, LargerConfig, Recipe
from tessera.sampling.core import NoiseSource

Layout = Literal["tiles", "pad", "windows"]
"""How a canvas of another size is made: by the network as it is; the same on a canvas padded to a
size that fits, which is cropped in the end; or by windows of the trained size that overlap."""


@dataclass(frozen=True)
class Canvas:
    """A window of the plane of pixels, in model space.

    Attributes:
        channels: of the picture.
        x, y: column and row of its first pixel.
        width, height: in pixels.
        resolution: side of the whole picture, whose corners have coordinates -1 and 1.
        whole: the window is what the model makes by itself.
        crops: the window's noise is cut from that of the whole picture.
        masked: all coordinates are 0.
        shown: height and width of the picture, the canvas's top left part.
        overlap: share of overlapping windows; None: the network sees the whole canvas.
    """

    channels: int
    x: int
    y: int
    width: int
    height: int
    resolution: int
    whole: bool
    crops: bool
    masked: bool
    shown: tuple[int, int]
    overlap: float | None = None

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise that is drawn."""
        if self.crops:
            return self.channels, self.resolution, self.resolution
        return self.channels, self.height, self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is sampled."""
        return self.channels, self.height, self.width

    def coords(self, batch: int, device: torch.device) -> Tensor | None:
        """Coordinates [B, 2, H, W]; None where the network makes them itself."""
        if self.whole and not self.masked:
            return None
        columns = torch.arange(self.x, self.x + self.width, device=device)
        rows = torch.arange(self.y, self.y + self.height, device=device)
        grid = coordinates(columns, rows, (self.resolution, self.resolution))
        return (torch.zeros_like(grid) if self.masked else grid).expand(batch, -1, -1, -1)

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser of the whole canvas."""
        if self.overlap is None:
            return denoiser
        return Windows(denoiser, (self.height, self.width), self.overlap)

    def picture(self, x: Tensor) -> Tensor:
        """The part of the canvas x [B, C, H, W] that is shown."""
        height, width = self.shown
        return x[:, :, :height, :width]

    def noise(self, source: NoiseSource) -> NoiseSource:
        """The source of the window's noise."""
        return _Cropped(source, self) if self.crops else source


class _Cropped:
    """A `NoiseSource` that draws the whole picture's noise and hands out the window's part."""

    def __init__(self, source: NoiseSource, canvas: Canvas) -> None:
        self._source, self._canvas = source, canvas

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        c = self._canvas
        if shape != (c.channels, c.height, c.width):
            return self._source.normal(shape, dtype)
        noise = self._source.normal(c.noise_shape, dtype)
        return noise[:, :, c.y : c.y + c.height, c.x : c.x + c.width].contiguous()

    def integers(self, high: int) -> Tensor:
        return self._source.integers(high)


def choose_canvas(recipe: Recipe, section: LargerConfig) -> Canvas:
    """The canvas that a caller asks for, of a model made from `recipe`.

    Args:
        section: `window`, beyond the whole picture, makes the model extrapolate, and always has its
            own noise there; a `resolution` above the trained one samples a finer grid; `size` makes
            a larger whole picture, over which coordinates run where the network knows them.

    Raises:
        TesseraError: the size does not fit the network.
    """
    channels, height, width = recipe.shape
    if section.size is not None:
        return _larger(recipe, section.size, section.layout, section.overlap)
    if isinstance(section, CanvasConfig):
        window, resolution = section.window, section.resolution
        if window is not None or resolution is not None or section.mask_coords:
            return _part(recipe, section)
    shown = height, width
    return Canvas(channels, 0, 0, width, height, max(shown), True, False, False, shown)


def _part(recipe: Recipe, section: CanvasConfig) -> Canvas:
    """A part of the picture, or the picture on another grid."""
    channels, height, width = recipe.shape
    window, resolution = section.window, section.resolution
    side = resolution or width
    x, y, w, h = window or (0, 0, side, side)
    if not (recipe.network.fits(w) and recipe.network.fits(h)):
        raise TesseraError(
            f"a window of {w}x{h} pixels does not fit the network: width and height must be "
            f"{recipe.network.sides}"
        )
    whole = (x, y, w, h, side) == (0, 0, width, height, width)
    inside = x >= 0 and y >= 0 and x + w <= side and y + h <= side
    crops = inside and not whole and section.window_noise == "crop"
    return Canvas(channels, x, y, w, h, side, whole, crops, section.mask_coords, (h, w))


def _larger(recipe: Recipe, size: tuple[int, int], layout: Layout, overlap: float) -> Canvas:
    """A whole picture of another size than trained."""
    channels, *trained = recipe.shape
    fits = recipe.network.fits
    height, width = size
    if layout == "windows":
        if height < trained[0] or width < trained[1]:
            raise TesseraError(
                f"windows have the trained size, {trained[0]}x{trained[1]}, and do not fit into "
                f"{height}x{width} (height x width). Give a larger canvas, or another layout"
            )
    elif layout == "pad":
        height, width = (next(n for n in itertools.count(side) if fits(n)) for side in size)
    elif not (fits(height) and fits(width)):
        raise TesseraError(
            f"a picture of {height}x{width} pixels (height x width) does not fit the network: "
            f"both must be {recipe.network.sides}. Or choose `layout=windows` or `layout=pad`"
        )
    return Canvas(
        channels, 0, 0, width, height, max(height, width), True, False, False, size,
        overlap if layout == "windows" else None,
    )  # fmt: skip
