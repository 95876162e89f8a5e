"""The layers that the U-Nets share: resampling convolutions, float32 norms, embeddings, the block.

Written for channels-last activations: nothing here changes the memory format of its input, and
attention reads and writes channels-last images without a copy. Parameters and buffers carry the
names and layouts of the released EDM checkpoints (Karras et al. 2022).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.conditioning import Conditioning, full_grid
from tessera.errors import TesseraError

# Pixels of a map from which PyTorch's channels-last group norm on the CPU takes another, fast path.
_LARGE_MAP = 1024


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A region without autocast on `device` (nothing to do on devices that have none)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def zero(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
    """Set the weight and the bias, if there is one, to 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class CoordinateInput(nn.Module):
    """Appends where its pixels lie in the full image to a network's input, as further channels.

    Image channels come first, then x and y as they are (Wang et al. 2023), or with `frequencies` F
    the sines of both and the cosines of both for each of 2^0, ..., 2^(F-1). Without coordinates in
    the conditioning, the image is complete.

    Args:
        frequencies: F; 0 for x and y themselves, None for a network without coordinates.
    """

    def __init__(self, frequencies: int | None) -> None:
        super().__init__()
        self.frequencies = frequencies

    @property
    def channels(self) -> int:
        """Number of channels appended."""
        if self.frequencies is None:
            return 0
        return 4 * self.frequencies or 2

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """x [B, C, H, W] to [B, C + channels, H, W]."""
        if self.frequencies is None:
            return x
        coords = cond.coords
        if coords is None:
            coords = full_grid((x.shape[-2], x.shape[-1]), x.device).expand(len(x), -1, -1, -1)
        return torch.cat([x, self.embed(coords).to(x.dtype)], dim=1)

    def embed(self, coords: Tensor) -> Tensor:
        """Coordinates [B, 2, H, W] as the channels that are appended."""
        if not self.frequencies:
            return coords
        scaled = [coords * 2.0**power for power in range(self.frequencies)]
        return torch.cat([f(angle) for angle in scaled for f in (torch.sin, torch.cos)], dim=1)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group normalisation of x [B, C, H, W] in float32; the result has x's dtype."""
    if x.device.type != "cpu":
        return F.group_norm(x.to(torch.float32), groups, weight, bias, eps).to(x.dtype)
    # The CPU kernel keeps statistics and affine in float32 itself. For small channels-last maps in
    # bfloat16 it takes three to four times as long as copying them forth and back and its other
    # form together.
    if (
        x.dtype == torch.bfloat16
        and x.shape[-2] * x.shape[-1] < _LARGE_MAP
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    ):
        y = F.group_norm(x.contiguous(), groups, weight, bias, eps)
        return y.contiguous(memory_format=torch.channels_last)
    return F.group_norm(x, groups, weight, bias, eps)


class Dropout(nn.Dropout):
    """Elements zeroed at random while training, the others scaled to keep the mean.

    PyTorch draws its mask on the CPU one number for each element, one after the other; here a draw
    of 64 bits serves four, which rounds the probability to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        native = x.device.type != "cpu" or torch.compiler.is_compiling()
        if native or not self.training or not 0 < dropped < 2**16:
            return super().forward(x)
        count = x.numel()
        draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        mask = torch.empty_like(x)  # dense, with the order of x in memory
        mask.as_strided((count,), (1,)).copy_(draws.view(torch.int16)[:count] >= dropped - 2**15)
        return x * mask.mul_(2**16 / (2**16 - dropped))


class GroupNorm(nn.Module):
    """Group normalisation in float32 whatever the input's dtype, which the result keeps.

    Args:
        channels: number of channels.
        eps: added to the variance.
        groups: number of groups; None: min(32, channels // 4).

    Raises:
        TesseraError: the groups would not be of equal size.
    """

    def __init__(self, channels: int, eps: float = 1e-5, groups: int | None = None) -> None:
        super().__init__()
        self.groups = min(32, channels // 4) if groups is None else groups
        if self.groups == 0 or channels % self.groups:
            raise TesseraError(
                f"the network has a layer of {channels} channels, which do not divide into "
                f"{max(self.groups, 1)} groups for normalisation (a quarter of the channels, at "
                "most 32, or network.groups). Change network.model_channels or "
                "network.channel_mult: powers of two, or multiples of 32, always fit"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, self.eps)


class PositionalEmbedding(nn.Module):
    """Cosines and sines of x at geometric frequencies (Vaswani et al. 2017): [B] to [B, channels].

    Args:
        channels: width, even; cosines come first.
        endpoint: let the lowest frequency be exactly 1/10000.
    """

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.pairs = channels // 2
        self.divisor = self.pairs - int(endpoint)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(self.pairs, dtype=torch.float32, device=x.device)
        freqs = torch.exp2(index * (-math.log2(10000) / self.divisor))
        angles = x.to(torch.float32)[:, None] * freqs
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines and sines of x at fixed random frequencies 16 N(0, 1): [B] to [B, channels]."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, x: Tensor) -> Tensor:
        angles = x.to(torch.float32)[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Resample(nn.Module):
    """Depth-wise 2x up- or downsampling by a separable filter, zeros beyond the border.

    Args:
        taps: the filter along one axis, of even length; scaled to sum 1.
        up: upsample; otherwise downsample.
    """

    resample_filter: Tensor

    def __init__(self, taps: Sequence[float], up: bool) -> None:
        super().__init__()
        self.up = up
        self.box = tuple(taps) == (1, 1)
        self.register_buffer("resample_filter", _outer_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        padding = (self.resample_filter.shape[-1] - 1) // 2
        if self.up:
            return _upsample(x, self.resample_filter, padding, self.box)
        return _downsample(x, self.resample_filter, padding, self.box)


class Conv(nn.Conv2d):
    """Convolution that keeps the size, after or before a 2x resampling if asked for.

    Args:
        kernel: 1 or 3.
        up, down: resample by 2, before the convolution.
        taps: the resampling filter along one axis.
        fused: pad once for filter and convolution, and filter after the convolution when going
            down; differs from the plain order near the border.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.up, self.down, self.fused = up, down, fused
        self.box = tuple(taps) == (1, 1)
        if up or down:
            self.register_buffer("resample_filter", _outer_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.up or self.down):
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)
        own = self.kernel_size[0] // 2
        taps = (self.resample_filter.shape[-1] - 1) // 2
        if self.up:
            shared = min(own, taps) if self.fused else 0
            x = _upsample(x, self.resample_filter, taps - shared, self.box)
            return F.conv2d(x, self.weight, self.bias, padding=own - shared)
        if self.fused:
            x = F.conv2d(x, self.weight, self.bias, padding=own + taps)
            return _downsample(x, self.resample_filter, 0, self.box)
        x = _downsample(x, self.resample_filter, taps, self.box)
        return F.conv2d(x, self.weight, self.bias, padding=own)


def _outer_filter(taps: Sequence[float]) -> Tensor:
    """The 2-D filter f f^T / (sum f)^2 of a 1-D one, [1, 1, n, n]."""
    f = torch.tensor(taps, dtype=torch.float32)
    return (f[:, None] * f / f.sum() ** 2)[None, None]


def _upsample(x: Tensor, kernel: Tensor, padding: int, box: bool) -> Tensor:
    if box:  # 4K is 1 everywhere: each pixel is repeated
        return F.interpolate(x, scale_factor=2, mode="nearest")
    channels = x.shape[1]
    weight = (4 * kernel).expand(channels, 1, -1, -1).to(x.dtype)
    return F.conv_transpose2d(x, weight, stride=2, padding=padding, groups=channels)


def _downsample(x: Tensor, kernel: Tensor, padding: int, box: bool) -> Tensor:
    if box:
        return F.avg_pool2d(x, 2)
    channels = x.shape[1]
    weight = kernel.expand(channels, 1, -1, -1).to(x.dtype)
    return F.conv2d(x, weight, stride=2, padding=padding, groups=channels)


class UNetBlock(nn.Module):
    """Residual block with noise-level conditioning and optional self-attention.

    h = conv1(dropout(silu(norm1(conv0(silu(norm0(x)))) conditioned on emb))), y = (h + skip(x)) s,
    then y = (proj(attention(norm2(y))) + y) s.

    Args:
        in_channels, out_channels, emb_channels: widths of x, y and emb.
        up, down: resample by 2 in the first convolution and the skip connection.
        heads: attention heads; 0 for no attention.
        dropout: probability of a zero before the last convolution.
        skip_scale: the factor s.
        eps: of the group norms.
        taps: resampling filter along one axis.
        resample_proj: give the skip connection of a resampling block a 1x1 convolution even if the
            width stays.
        adaptive: emb scales and shifts the normalised h (ADM) instead of being added before.
        groups: of the group norms, see `GroupNorm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        taps: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive: bool = True,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.skip_scale = skip_scale
        self.adaptive = adaptive
        self.norm0 = GroupNorm(in_channels, eps, groups)
        self.conv0 = Conv(in_channels, out_channels, 3, up=up, down=down, taps=taps)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive else 1))
        self.norm1 = GroupNorm(out_channels, eps, groups)
        self.conv1 = Conv(out_channels, out_channels, 3)
        self.skip: nn.Module | None = None
        if in_channels != out_channels or (resample_proj and (up or down)):
            self.skip = Conv(in_channels, out_channels, 1, up=up, down=down, taps=taps)
        elif up or down:
            self.skip = Resample(taps, up)
        if heads:
            self.norm2 = GroupNorm(out_channels, eps, groups)
            self.qkv = Conv(out_channels, out_channels * 3, 1)
            self.proj = Conv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W] and emb [B, E] to [B, C', H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        p = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive:
            scale, shift = p.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + p))
        h = self.conv1(self.dropout(h))
        x = self._add(x if self.skip is None else self.skip(x), h)
        return self._add(x, self._attention(self.norm2(x))) if self.heads else x

    def _add(self, x: Tensor, h: Tensor) -> Tensor:
        """(x + h) s, in the memory format of x."""
        y = x + h
        return y if self.skip_scale == 1 else y.mul_(self.skip_scale)

    def _attention(self, x: Tensor) -> Tensor:
        """Self-attention over the pixels of x, projected; [B, C, H, W] to the same."""
        channels, height, width = x.shape[1:]
        # The checkpoints interleave q, k, v channel by channel. Sorting the rows of the small
        # weight, not the activations, gives q, k and v as plain views.
        rows = (self.heads, channels // self.heads, 3)
        weight = self.qkv.weight.reshape(*rows, channels).permute(2, 0, 1, 3).flatten(0, 2)
        assert self.qkv.bias is not None
        bias = self.qkv.bias.reshape(rows).permute(2, 0, 1).flatten()
        tokens = x.flatten(2).transpose(1, 2)  # a view if x is channels-last: [B, H W, C]
        q, k, v = (
            part.reshape(len(x), -1, *rows[:2]).transpose(1, 2)  # [B, heads, H W, C / heads]
            for part in F.linear(tokens, weight, bias).chunk(3, dim=2)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj.weight.flatten(1), self.proj.bias)
        return h.transpose(1, 2).reshape(-1, channels, height, width)
