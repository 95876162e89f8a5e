"""Blurring corruption: z = A(σ) x + σ n, with A(σ) diagonal in the DCT of blocks of pixels.

Relay diffusion (Teng et al. 2023): at the highest noise level every block of s x s pixels has
become its mean, so the image is the enlargement of a low-resolution one, from which another model
can hand over. The noise n may have a part that is correlated over s x s pixels ("block noise"),
which makes it as strong at low frequencies as noise of the low resolution is.

Networks see nothing of this but the noise level: their preconditioning is that of EDM, and the
target is the sharp image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tessera.diffusion.objectives import EVERYWHERE, DenoisingObjective, within
from tessera.errors import TesseraError
from tessera.networks.layers import full_precision
from tessera.randomness import Draws

_WIDTH = 16
"""Pixels of a row in one product of matrices: fewer leave vector units idle, more waste work."""

_AT_ONCE = 2**17
"""Numbers whose window sums are made together on a CPU, in whose cache they stay."""


@lru_cache
def dct_matrix(
    size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """The orthonormal DCT-II as a matrix [size, size] from pixels to coefficients.

    Kept for each device, because a copy from the host would make every call wait; so it must hold
    numbers, also where it is first made while memory is counted on tensors without any.
    """
    with torch.inference_mode(False), unset_fake_temporarily():
        k = torch.arange(size, dtype=torch.float64, device="cpu")
        matrix = (math.pi / (2 * size) * k[:, None] * (2 * k + 1)).cos() * math.sqrt(2 / size)
        matrix[0] = math.sqrt(1 / size)
        return matrix.to(device, dtype)


def block_dct(x: Tensor, block: int) -> Tensor:
    """The orthonormal DCT-II of each block of x [..., H, W], coefficients in place of pixels.

    Exact to round-off in x's dtype (float32 or float64), also within autocast.

    Args:
        block: side s of a block in pixels.

    Raises:
        TesseraError: H or W is not a multiple of s.

    Example:
        >>> block_dct(torch.ones(2, 4), 2).round()
        tensor([[2., 0., 2., 0.],
                [0., 0., 0., 0.]])
    """
    return _on_blocks(x, dct_matrix(block, x.dtype, x.device))


def block_idct(coefficients: Tensor, block: int) -> Tensor:
    """The inverse of `block_dct`: from coefficients [..., H, W] to pixels."""
    return _on_blocks(coefficients, dct_matrix(block, coefficients.dtype, coefficients.device).mT)


def scale_frequencies(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply the block DCT of x [..., H, W] by `factors`, and transform back.

    Args:
        factors: [..., s, s], by row frequency and column frequency of a block; the axes before
            them broadcast to those of x.

    Raises:
        TesseraError: H or W is not a multiple of s.
    """
    block = factors.shape[-1]
    coefficients = block_dct(x, block)
    rows = coefficients.reshape(*x.shape[:-2], -1, block, x.shape[-1])
    tiled = factors.to(x.dtype).repeat(*(1,) * (factors.ndim - 1), x.shape[-1] // block)
    return block_idct((rows * tiled[..., None, :, :]).reshape(x.shape), block)


def block_noise(white: Tensor, block: int, *, wraps: bool = True) -> Tensor:
    """Unit normal noise [..., H, W] that is correlated over s x s pixels, from white noise.

    Each pixel is the sum of the window of s x s pixels that ends at it, divided by s. A block of 1
    leaves the noise as it is.

    Args:
        white: [..., H, W]; without `wraps` [..., H + s - 1, W + s - 1].
        wraps: windows wrap around the image; otherwise they reach into the further rows and columns
            that `white` begins with, as those of a part of an image do.

    Raises:
        TesseraError: H or W is not a multiple of s.
    """
    further = 0 if wraps else block - 1
    _check(white[..., further:, further:], block)
    if block == 1:
        return white
    height, width = white.shape[-2:]
    planes = white.reshape(-1, height, width)
    noise = white.new_empty(len(planes), height - further, width - further)
    on_cpu = white.device.type == "cpu"
    count = max(_AT_ONCE // (height * width) if on_cpu else len(planes), 1)
    # Used again and again, because fresh memory costs more than the sums.
    scratch = white.new_empty(2 + _odd(block), min(count, len(planes)), height, width)
    pairs = zip(torch.split(planes, count), torch.split(noise, count), strict=True)
    for part, made in pairs:
        buffers = [*scratch[:, : len(part)]]
        rows = _window_sums(part, block, -2, buffers)
        sums = _window_sums(rows, block, -1, buffers)
        torch.div(sums[:, further:, further:], block, out=made)
    return noise.reshape(*white.shape[:-2], *noise.shape[-2:])


@dataclass(frozen=True, kw_only=True)
class Blur:
    """The blur A(σ) of every noise level σ.

    Blur time u runs from 0 (sharp) to 1 (blurred most); the deviation of the blur is σ_B(u) =
    σ_B,max sin²(π u / 2) pixels, and the noise level σ(u) = exp(P_mean + P_std Φ⁻¹(L u)), with Φ
    the distribution function of the normal distribution. A block's coefficient at frequencies
    (π k_y / s, π k_x / s) is multiplied by

        α = (1 - m) exp(-π² (k_y² + k_x²) / s² · σ_B² / 2) + m,   m = min_scale

    Args:
        block: side s of a block in pixels: how many times larger the images are than those of the
            stage before.
        blur_sigma_max: σ_B,max, in pixels.
        prob_length: L, the share of the log-normal distribution of noise levels that u covers.
        min_scale: m, so that no frequency is lost altogether.
        p_mean, p_std: mean and deviation of ln σ in that distribution.

    Raises:
        TesseraError: a setting out of range.
    """

    block: int = 4
    blur_sigma_max: float = 3.0
    prob_length: float = 0.93
    min_scale: float = 1e-3
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        allowed = {
            "block": self.block >= 1,
            "blur_sigma_max": self.blur_sigma_max >= 0,
            "prob_length": self.prob_length > 0,
            "min_scale": 0 <= self.min_scale <= 1,
            "p_std": self.p_std > 0,
        }
        for name, fits in allowed.items():
            if not fits:
                raise TesseraError(
                    f"blur: {name} = {getattr(self, name):g} is out of range. block is at least 1, "
                    "min_scale from 0 to 1, prob_length and p_std are above 0, blur_sigma_max is "
                    "not negative"
                )

    def time(self, sigma: Tensor) -> Tensor:
        """Blur time u of noise levels σ >= 0, shaped like σ; 1 above the highest."""
        share: Tensor = torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std)
        return (share / self.prob_length).clamp(max=1)

    def noise_level(self, time: Tensor) -> Tensor:
        """Noise level σ of blur times u in [0, 1], shaped like u; the inverse of `time`."""
        deviation: Tensor = torch.special.ndtri(self.prob_length * time)
        return (self.p_mean + self.p_std * deviation).exp()

    def blur_sigma(self, time: Tensor) -> Tensor:
        """Deviation of the blur σ_B in pixels at blur times u, shaped like u."""
        return self.blur_sigma_max * (math.pi / 2 * time).sin().square()

    def factors(self, sigma: Tensor) -> Tensor:
        """The table α [..., s, s] of each noise level σ [...], in the dtype of σ."""
        line = self._attenuation(sigma)
        table = line[..., :, None] * line[..., None, :]
        return (1 - self.min_scale) * table + self.min_scale

    def _attenuation(self, sigma: Tensor) -> Tensor:
        """exp(-ω² σ_B² / 2) of the frequencies of one axis, [..., s]."""
        omega = torch.arange(self.block, device=sigma.device, dtype=sigma.dtype)
        omega = omega * (math.pi / self.block)
        width = self.blur_sigma(self.time(sigma))[..., None]
        return (-0.5 * (omega * width).square()).exp()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """A(σ) x of images x [B, C, H, W] at noise levels σ [B], in the dtype of x.

        α is a product over both axes but for m, so the blur is m x + (1 - m) E x Eᵀ in each block,
        with one s x s matrix E an image: half the work of a DCT and its inverse.

        Raises:
            TesseraError: H or W is not a multiple of s.
        """
        precise = precise_dtype(x.device)
        dct = dct_matrix(self.block, precise, x.device)
        attenuation = self._attenuation(sigma.to(x.device, precise))
        with full_precision(x.device):
            matrix = (dct.mT * attenuation[:, None, :]) @ dct
        return _on_blocks(x, matrix).lerp_(x, self.min_scale)


@dataclass(frozen=True, kw_only=True)
class BlurCorruption:
    """z = A(σ) x + σ (ε + b ε_block): the forward process of a relay's later stages.

    Args:
        blur: A(σ).
        block_scale: strength b of the block noise.
        unit_variance: divide the noise by √(1 + b²), so that σ is its deviation, as in the paper;
            the released code and weights do not.
        side: of whole images, around which windows of block noise wrap. Smaller images are parts of
            them, whose noise is that of a part: nothing ties its opposite edges to each other.
            None: all images are whole.
    """

    blur: Blur = Blur()
    block_scale: float = 0.15
    unit_variance: bool = False
    side: int | None = None

    def __call__(self, x: Tensor, sigma: Tensor, draws: Draws) -> Tensor:
        """Corrupt x [B, C, H, W] at noise levels σ [B].

        Draws "noise", and "block_noise" if there is any.
        """
        noise = draws.normal("noise", *x.shape[1:])
        if self.block_scale > 0:
            channels, height, width = x.shape[1:]
            wraps = self.side in (None, height)
            further = 0 if wraps else self.blur.block - 1
            white = draws.normal("block_noise", channels, height + further, width + further)
            noise = with_block_noise(
                noise, white, self.blur.block, self.block_scale, self.unit_variance, wraps=wraps
            )
        return torch.addcmul(self.blur(x, sigma), sigma[:, None, None, None], noise)


def with_block_noise(
    noise: Tensor,
    white: Tensor,
    block: int,
    scale: float,
    unit_variance: bool = False,
    *,
    wraps: bool = True,
) -> Tensor:
    """ε + b ε_block, of white noise ε [..., H, W], with ε_block made from `white`.

    Args:
        white, wraps: see `block_noise`.
        scale: b.
        unit_variance: divide by √(1 + b²).
    """
    mixed = torch.add(noise, block_noise(white, block, wraps=wraps), alpha=scale)
    return mixed / math.sqrt(1 + scale**2) if unit_variance else mixed


@dataclass(frozen=True, kw_only=True)
class BlurObjective(DenoisingObjective):
    """Deblurring and denoising of a relay's later stages (Teng et al. 2023).

    Blur time is uniform, and the noise level follows from it: EDM's log-normal distribution without
    its highest part. The weight is EDM's.

    Args:
        corruption: the blur and its noise.
        sigma_data: standard deviation σ_d of the data.
        sigma_floor: noise levels below it are raised to it.
        released_floor: multiply by L where the released code does and should divide, which makes
            the floor of 0.0075 one of 0.0071.
        max_weight: the weight is cut to it.

    Raises:
        TesseraError: `prob_length` above 1, or a `sigma_floor` that is not above 0.
    """

    corruption: BlurCorruption = BlurCorruption()
    sigma_data: float = 0.5
    sigma_floor: float = 7.5e-3
    released_floor: bool = False
    max_weight: float = 1e5

    def __post_init__(self) -> None:
        if self.corruption.blur.prob_length > 1:
            raise TesseraError(
                f"prob_length = {self.corruption.blur.prob_length:g}: in training it is a share of "
                "the noise levels, at most 1; only sampling may assume more"
            )
        if not self.sigma_floor > 0:
            raise TesseraError(
                f"sigma_floor = {self.sigma_floor:g}: give the lowest noise level to train on, "
                "above 0"
            )

    @property
    def alignment(self) -> int:
        """Parts of images must lie on a grid of so many pixels to be trained on: of the blocks."""
        return self.corruption.blur.block

    def sigma(self, draws: Draws) -> Tensor:
        uniform = draws.uniform("sigma")
        low, high, floor = self._times()
        time = low + (high - low) * uniform.to(precise_dtype(uniform.device))
        sigma = self.corruption.blur.noise_level(time.clamp(min=floor))
        return sigma.clamp(*self.sigma_range).to(torch.float32)

    def share_below(self, sigma: Tensor) -> Tensor:
        low, high, _ = self._times()
        return (self.corruption.blur.time(sigma) - low) / (high - low)

    def _times(self) -> tuple[float, float, float]:
        """First and last blur time that is drawn, and the one that lower ones are raised to."""
        blur = self.corruption.blur
        levels = NormalDist(blur.p_mean, blur.p_std)  # of ln σ

        def time(sigma: float) -> float:
            return min(levels.cdf(math.log(sigma)) / blur.prob_length, 1.0) if sigma > 0 else 0.0

        low, high, floor = map(time, (*self.sigma_range, self.sigma_floor))
        if self.sigma_range != EVERYWHERE:
            last = blur.prob_length
            highest = math.exp(levels.inv_cdf(last)) if last < 1 else math.inf
            within(self.sigma_range, self.sigma_floor, highest)
        return low, high, floor * blur.prob_length**2 if self.released_floor else floor

    def weight(self, sigma: Tensor) -> Tensor:
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return weight.clamp(max=self.max_weight)


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that know no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check(x: Tensor, block: int) -> None:
    height, width = x.shape[-2:]
    if height % block or width % block:
        raise TesseraError(
            f"images of {height}x{width} pixels cannot be cut into blocks of {block}x{block}. "
            "Choose sides that are multiples of the block"
        )


def _on_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    """M X Mᵀ of each block X of x [..., H, W], with one matrix M [s, s] or one an image [B, s, s].

    Rows of pixels are multiplied by several copies of M on a diagonal, which is quicker than
    blocks one by one. Float32 products of CUDA devices may be rounded to TensorFloat32, float64
    ones may not.
    """
    block = matrix.shape[-1]
    _check(x, block)
    with full_precision(x.device):
        dtype = torch.float64 if x.device.type == "cuda" else x.dtype
        matrix = matrix.to(dtype).reshape(-1, block, block)
        images, width = len(matrix), x.shape[-1]
        y = matrix[:, None] @ x.to(dtype).reshape(images, -1, block, width)
        copies = math.gcd(width // block, max(_WIDTH // block, 1))
        one = torch.eye(copies, dtype=dtype, device=x.device)
        wide = torch.einsum("ij,bkl->bjlik", one, matrix).reshape(images, copies * block, -1)
        return (y.reshape(images, -1, copies * block) @ wide).to(x.dtype).reshape(x.shape)


def _window_sums(x: Tensor, length: int, axis: int, buffers: Sequence[Tensor]) -> Tensor:
    """Circular sums over the `length` numbers that end at each one of an axis, by doubling.

    The result is one of the `buffers` shaped like x, of which x may be one: two, and a third for
    lengths that are no power of 2, which need x again.
    """
    sums, size = x, 1
    kept = [x] * _odd(length)
    for bit in f"{length:b}"[1:]:
        sums = _plus_shifted(sums, sums, size, axis, _another(buffers, sums, *kept))
        size *= 2
        if bit == "1":
            sums = _plus_shifted(sums, x, size, axis, _another(buffers, sums, *kept))
            size += 1
    return sums


def _odd(length: int) -> bool:
    """Whether doubling alone does not reach a length."""
    return length.bit_count() > 1


def _another(buffers: Sequence[Tensor], *used: Tensor) -> Tensor:
    return next(b for b in buffers if all(b is not tensor for tensor in used))


def _plus_shifted(x: Tensor, y: Tensor, shift: int, axis: int, out: Tensor) -> Tensor:
    """x + y.roll(shift, axis) in `out`, without a copy of y."""
    rest = x.shape[axis] - shift
    for at, source, count in ((shift, 0, rest), (0, rest, shift)):
        left, right = x.narrow(axis, at, count), y.narrow(axis, source, count)
        torch.add(left, right, out=out.narrow(axis, at, count))
    return out
