"""Non-leaky augmentation (Karras et al. 2020, 2022): images and labels that say what was done.

The network is told the labels, so that it does not learn to generate augmented images. Geometric
transforms are composed into one matrix per image and executed by one high-quality resampling;
colour transforms into one matrix, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import DataError
from tessera.networks.layers import full_precision
from tessera.randomness import Draws

# Low-pass filter of the Symlet-6 wavelet, 12 taps.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
REACH = len(SYM6) // 4  # of the filter on either side, in pixels of the image


@dataclass(frozen=True)
class Augmentation:
    """The augmentation pipeline and its settings; the defaults are those of EDM's training.

    Each transform is applied to an image with probability min(multiplier * p, 1); a transform with
    multiplier 0 is absent: no draw, no label. Geometric transforms that are present pass every
    image through the resampling, whether or not they change it.

    Args:
        p: common factor of all probabilities.
        xflip, yflip, rotate_int, translate_int: multipliers of the lossless moves: mirrorings,
            quarter turns, whole-pixel shifts by at most the share `translate_int_max` of the side.
        scale, rotate_frac, aniso, translate_frac: multipliers of the geometric transforms: zoom,
            rotation by at most `rotate_frac_max` half turns, stretch along a direction (rotated
            with probability `aniso_rotate_prob`), shift; `*_std` in octaves or shares of the side.
        brightness, contrast, lumaflip, hue, saturation: multipliers of the colour transforms, for
            images of 1 or 3 channels; `*_std` in units of [-1, 1] or octaves, `hue_max` in half
            turns.

    Raises:
        DataError: (when called) colour transforms of images with another number of channels.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1
    rotate_int: float = 0
    translate_int: float = 0
    translate_int_max: float = 0.125
    scale: float = 1
    scale_std: float = 0.2
    rotate_frac: float = 1
    rotate_frac_max: float = 1
    aniso: float = 1
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac: float = 1
    translate_frac_std: float = 0.125
    brightness: float = 0
    brightness_std: float = 0.2
    contrast: float = 0
    contrast_std: float = 0.5
    lumaflip: float = 0
    hue: float = 0
    hue_max: float = 1
    saturation: float = 0
    saturation_std: float = 1

    def __call__(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augment float32 images [B, C, H, W] in [-1, 1]; draws "augment.<transform>.<draw>".

        Returns the images and their labels, float32 [B, K].
        """
        labels: list[Tensor] = []
        with full_precision(images.device):
            images = self._move(images, draws, labels)
            if self.scale > 0 or self.rotate_frac > 0 or self.aniso > 0 or self.translate_frac > 0:
                images = resample(images, self.geometry(images, draws, labels))
            colours = (self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation)
            if any(multiplier > 0 for multiplier in colours):
                images = recolour(images, self.colour(images, draws, labels))
        columns = torch.stack(labels, dim=1) if labels else images.new_zeros(len(images), 0)
        return images, columns.to(torch.float32)

    def _fires(self, draws: Draws, transform: str) -> Tensor:
        """Whether `transform` is applied, bool [B]."""
        multiplier: float = getattr(self, transform)
        return draws.uniform(f"augment.{transform}.gate") < multiplier * self.p

    def _pick(self, draws: Draws, transform: str, choices: int) -> Tensor:
        """One of the choices, 0 where the transform is not applied; int64 [B]."""
        pick = draws.integers(f"augment.{transform}.pick", choices)
        return pick * self._fires(draws, transform)

    def _normal(self, draws: Draws, transform: str) -> Tensor:
        """A standard normal parameter, 0 where the transform is not applied; [B]."""
        return draws.normal(f"augment.{transform}.n") * self._fires(draws, transform)

    def _angle(self, draws: Draws, transform: str, half_turns: float) -> Tensor:
        """A uniform angle in radians, 0 where the transform is not applied; [B]."""
        u = 2 * draws.uniform(f"augment.{transform}.u") - 1
        return u * (math.pi * half_turns) * self._fires(draws, transform)

    def _move(self, images: Tensor, draws: Draws, labels: list[Tensor]) -> Tensor:
        """Mirrorings, quarter turns and whole-pixel shifts: pixels only change places."""
        if self.xflip > 0:
            w = self._pick(draws, "xflip", 2)
            labels.append(w)
            images = _where(w == 1, images.flip(3), images)
        if self.yflip > 0:
            w = self._pick(draws, "yflip", 2)
            labels.append(w)
            images = _where(w == 1, images.flip(2), images)
        if self.rotate_int > 0:
            w = self._pick(draws, "rotate_int", 4)
            flip_x, flip_y = (w == 1) | (w == 2), (w == 2) | (w == 3)
            labels.extend([flip_x, flip_y])
            images = _where(flip_x, images.flip(3), images)
            images = _where(flip_y, images.flip(2), images)
            images = _where(flip_x != flip_y, images.transpose(2, 3), images)
        if self.translate_int > 0:
            height, width = images.shape[2:]
            limits = (width * self.translate_int_max, height * self.translate_int_max)
            w = 2 * draws.uniform("augment.translate_int.u", 2) - 1
            w = w * self._fires(draws, "translate_int")[:, None]
            tx, ty = (torch.round(w[:, axis] * limits[axis]) for axis in (0, 1))
            labels.extend([tx / limits[0], ty / limits[1]])
            columns = torch.arange(width, device=images.device) - tx[:, None].long()
            rows = torch.arange(height, device=images.device) + ty[:, None].long()
            columns, rows = _reflected(columns, width), _reflected(rows, height)
            images = images.gather(3, columns[:, None, None].expand_as(images))
            images = images.gather(2, rows[:, None, :, None].expand_as(images))
        return images

    def geometry(self, images: Tensor, draws: Draws, labels: list[Tensor]) -> Tensor:
        """The map from output to input pixels relative to the centre, [B, 3, 3]; adds labels."""
        height, width = images.shape[2:]
        G = _identity(images, 3)
        if self.scale > 0:
            w = self._normal(draws, "scale")
            labels.append(w)
            s = torch.exp2(w * self.scale_std)
            G = _product(G, _scaling(1 / s, 1 / s))
        if self.rotate_frac > 0:
            w = self._angle(draws, "rotate_frac", self.rotate_frac_max)
            labels.extend([w.cos() - 1, w.sin()])
            G = _product(G, _rotation(w))
        if self.aniso > 0:
            w = self._normal(draws, "aniso")
            r = (2 * draws.uniform("augment.aniso.angle_u") - 1) * math.pi
            r = r * (draws.uniform("augment.aniso.rotgate") < self.aniso_rotate_prob)
            labels.extend([w * r.cos(), w * r.sin()])
            s = torch.exp2(w * self.aniso_std)
            G = _product(_product(_product(G, _rotation(-r)), _scaling(1 / s, s)), _rotation(r))
        if self.translate_frac > 0:
            w = draws.normal("augment.translate_frac.n", 2)
            w = w * self._fires(draws, "translate_frac")[:, None]
            labels.extend(w.unbind(dim=1))
            shift = -w * self.translate_frac_std
            G = _product(G, _translation(shift[:, 0] * width, shift[:, 1] * height))
        return G

    def colour(self, images: Tensor, draws: Draws, labels: list[Tensor]) -> Tensor:
        """The affine map of RGB colours, [B, 4, 4]; adds labels."""
        M = _identity(images, 4)
        grey = torch.full((4, 4), 1 / 3, device=images.device)  # the projector v v^T, v = grey
        grey[3], grey[:, 3] = 0, 0
        if self.brightness > 0:
            w = self._normal(draws, "brightness")
            labels.append(w)
            b = w * self.brightness_std
            M = torch.cat([M[:, :3, :3], M[:, :3, 3:] + b[:, None, None]], dim=2)
            M = torch.cat([M, _identity(images, 4)[:, 3:]], dim=1)
        if self.contrast > 0:
            w = self._normal(draws, "contrast")
            labels.append(w)
            c = torch.exp2(w * self.contrast_std)
            M = torch.cat([M[:, :3] * c[:, None, None], M[:, 3:]], dim=1)
        if self.lumaflip > 0:
            w = self._pick(draws, "lumaflip", 2)
            labels.append(w)
            M = _product(_identity(images, 4) - 2 * grey * w[:, None, None], M)
        if self.hue > 0:
            w = self._angle(draws, "hue", self.hue_max)
            labels.extend([w.cos() - 1, w.sin()])
            M = _product(_rotation_about_grey(w), M)
        if self.saturation > 0:
            w = self._normal(draws, "saturation")
            labels.append(w)
            s = torch.exp2(w * self.saturation_std)[:, None, None]
            M = _product(grey + (_identity(images, 4) - grey) * s, M)
        return M


def resample(images: Tensor, G: Tensor) -> Tensor:
    """Transform images [B, C, H, W] by maps G [B, 3, 3] from output to input pixels.

    Twofold upsampling by a wavelet filter, bilinear sampling, twofold downsampling; the image is
    continued by reflection as far as the filters are long, zero beyond, as in StyleGAN2-ADA (Karras
    et al. 2020).
    """
    height, width = images.shape[2:]
    x0, x1, y0, y1 = _margins(G, width, height)
    # Reflection, zero insertion and filtering are linear along each axis: two small matrices.
    up_x = _upsampling(width, x0, x1, images.device)
    up_y = _upsampling(height, y0, y1, images.device)
    images = up_y @ (images @ up_x.T)

    height_in, width_in = images.shape[2:]
    height_out, width_out = 2 * (height + 2 * REACH), 2 * (width + 2 * REACH)

    def coordinates(axis: int, shift: float, size_in: int) -> Tensor:
        """Where in the upsampled image the output's pixels lie, in [-1, 1]; [B, H', W']."""
        a, b, t = G[:, axis, :, None, None].unbind(dim=1)
        x = (torch.arange(width_out, device=G.device) + 0.5) - width_out / 2
        y = (torch.arange(height_out, device=G.device) + 0.5) - height_out / 2
        offset = 2 * (t + shift) + 0.5 * (a + b) - 0.5
        return (a * x + b * y[:, None] + offset) * (2 / size_in)

    grid = torch.stack(
        [coordinates(0, (x0 - x1) / 2, width_in), coordinates(1, (y0 - y1) / 2, height_in)], dim=3
    )
    images = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    down_x, down_y = _downsampling(width, images.device), _downsampling(height, images.device)
    return down_y @ (images @ down_x.T)


def recolour(images: Tensor, M: Tensor) -> Tensor:
    """Map the colours of images [B, 1 or 3, H, W] by affine maps M [B, 4, 4].

    Raises:
        DataError: the images have another number of channels.
    """
    channels = images.shape[1]
    if channels == 3:
        pixels = _product(M[:, :3, :3], images.flatten(2)) + M[:, :3, 3:]
        return pixels.reshape(images.shape)
    if channels == 1:
        m = M[:, :3].mean(dim=1)[:, :, None, None, None]
        return images * (m[:, 0] + m[:, 1] + m[:, 2]) + m[:, 3]
    raise DataError(
        f"Colour augmentation needs images of 1 or 3 channels, not {channels}. "
        "Set augment.brightness, contrast, lumaflip, hue and saturation to 0"
    )


def _margins(G: Tensor, width: int, height: int) -> tuple[int, int, int, int]:
    """How far to continue the images to the left, right, top and bottom, in pixels.

    On the CPU as far as this batch needs; elsewhere the most that can be needed, because reading
    the maps would make the host wait for the device. The results agree up to round-off.
    """
    if G.device.type != "cpu":
        return width - 1, width - 1, height - 1, height - 1
    cx, cy = (width - 1) / 2, (height - 1) / 2
    x_half, y_half = (
        G[:, axis, 0].abs() * cx + G[:, axis, 1].abs() * cy for axis in (0, 1)
    )  # half the sides of the box around the four corners
    tx, ty = G[:, 0, 2], G[:, 1, 2]

    def pixels(needed: Tensor, centre: float, size: int) -> int:
        return math.ceil(min(max(needed.max().item() + 2 * REACH - centre, 0), size - 1))

    return (
        pixels(x_half - tx, cx, width),
        pixels(x_half + tx, cx, width),
        pixels(y_half - ty, cy, height),
        pixels(y_half + ty, cy, height),
    )


@lru_cache(maxsize=256)
def _upsampling(length: int, before: int, after: int, device: torch.device) -> Tensor:
    """Reflect, insert zeros, filter: the matrix [2 (before + length + after), length].

    Kept for each device, because a copy from the host would make every step wait.
    """
    source = _reflected(torch.arange(-before, length + after, device="cpu"), length)
    padded = torch.eye(length, device="cpu")[source]
    spread = torch.zeros(length, 1, 2 * len(source) - 1, device="cpu")
    spread[:, 0, ::2] = padded.T
    taps = torch.tensor(SYM6[::-1], device="cpu").reshape(1, 1, -1)
    return F.conv1d(spread, taps, padding=len(SYM6) // 2)[:, 0].T.contiguous().to(device)


@lru_cache(maxsize=16)
def _downsampling(length: int, device: torch.device) -> Tensor:
    """Filter, drop every second sample and the ends: the matrix [length, 2 (length + 2 REACH)]."""
    samples = torch.eye(2 * (length + 2 * REACH), device="cpu")[:, None]
    taps = torch.tensor(SYM6, device="cpu").reshape(1, 1, -1)
    filtered = F.conv1d(samples, taps, stride=2, padding=(len(SYM6) - 1) // 2)[:, 0]
    return filtered[:, REACH:-REACH].T.contiguous().to(device)


def _reflected(index: Tensor, length: int) -> Tensor:
    """Indices continued by reflection at the first and the last one."""
    last = length - 1
    return last - (last - index % max(2 * last, 1)).abs()


def _where(mask: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where(mask[:, None, None, None], changed, images)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [B, n, m] times b [B, m, k] in full float32, also where matrix products are not."""
    return (a[:, :, :, None] * b[:, None]).sum(dim=2)


def _identity(images: Tensor, size: int) -> Tensor:
    eye = torch.eye(size, device=images.device)
    return eye.expand(len(images), size, size)


def _matrix(*rows: list[Tensor | float]) -> Tensor:
    """Entries, [B] or one number for all, as matrices [B, n, n]."""
    like = next(entry for row in rows for entry in row if isinstance(entry, Tensor))
    entries = [
        entry if isinstance(entry, Tensor) else torch.full_like(like, entry)
        for row in rows
        for entry in row
    ]
    return torch.stack(entries, dim=1).reshape(-1, len(rows), len(rows))


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([1, 0, x], [0, 1, y], [0, 0, 1])


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([x, 0, 0], [0, y, 0], [0, 0, 1])


def _rotation(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return _matrix([c, -s, 0], [s, c, 0], [0, 0, 1])


def _rotation_about_grey(angle: Tensor) -> Tensor:
    """Right-handed rotation of RGB about (1, 1, 1), homogeneous (Rodrigues' formula)."""
    c, s = angle.cos(), angle.sin() / math.sqrt(3)
    third = (1 - c) / 3
    a, b, d = third + c, third - s, third + s
    return _matrix([a, b, d, 0], [d, a, b, 0], [b, d, a, 0], [0, 0, 0, 1])
