"""The patched U-Net (Luhman & Luhman 2022).

It works on a space-to-depth rearrangement of the image, so that P x P pixels cost what one costs
without. Parameters carry the names and layouts of the released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.conditioning import Conditioning
from tessera.errors import TesseraError
from tessera.networks.layers import CoordinateInput, Dropout, full_precision, group_norm, zero

GROUPS = 32
DEFAULT_MULT = {
    256: (1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    128: (1.0, 1.0, 2.0, 3.0, 4.0),
    64: (1.0, 2.0, 3.0, 4.0),
    32: (1.0, 2.0, 3.0),
    16: (1.0, 2.0),
}
"""The multipliers of the widths that the release chooses for a grid of this side."""

AttentionOrder = Literal["split", "legacy"]
"""Rows of the qkv weight: [all q | all k | all v], or q, k and v of one head after the other."""


def to_patches(x: Tensor, patch: int) -> Tensor:
    """Space to depth: [B, C, H, W] to [B, (dy, dx, c), H / P, W / P], colour fastest."""
    if patch == 1:
        return x
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // patch, width // patch)


def from_patches(x: Tensor, patch: int) -> Tensor:
    """The inverse of `to_patches`."""
    if patch == 1:
        return x
    batch, channels, height, width = x.shape
    x = x.reshape(batch, patch, patch, channels // patch**2, height, width)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * patch, width * patch)


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Sines, then cosines, of t [B] at frequencies from 1 to exactly 1/10000; [B, channels]."""
    pairs = channels // 2
    index = torch.arange(pairs, dtype=torch.float32, device=t.device)
    freqs = torch.exp(index * (-math.log(10000) / max(pairs - 1, 1)))
    angles = t.to(torch.float32)[:, None] * freqs
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, channels % 2))


def position_embedding(
    channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Sines of the column, then of the row, both measured in 64ths of the grid; [1, C, H, W]."""
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    freqs = torch.exp(index * (-math.log(10000) / max(half - 1, 1)))
    x = torch.arange(width, dtype=torch.float32, device=device) * (64 / width)
    y = torch.arange(height, dtype=torch.float32, device=device) * (64 / height)
    columns = torch.sin(freqs[:, None] * x)[:, None, :].expand(half, height, width)
    rows = torch.sin(freqs[:, None] * y)[:, :, None].expand(half, height, width)
    return torch.cat([columns, rows])[None]


def _groups(channels: int, groups: int | None) -> int:
    """Groups of a normalisation: so many, or for None a quarter of the channels, at most 32."""
    return min(GROUPS, channels // 4) if groups is None else groups


class Norm(nn.Module):
    """Group normalisation in float32; the result has the input's dtype."""

    def __init__(self, channels: int, eps: float, groups: int | None = GROUPS) -> None:
        super().__init__()
        self.eps, self.groups = eps, _groups(channels, groups)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, self.eps)


class ResBlock(nn.Module):
    """Residual block: the noise level scales and shifts it, the class gates its output.

    Args:
        in_channels, out_channels: widths.
        emb_channels: width of the noise embedding.
        class_channels: width of the class embedding; 0 for a network without classes.
        resample: "up" or "down" by 2 before the first convolution and in the skip connection.
        dropout: probability of a zero before the last convolution.
        eps: of the first normalisation.
        groups: of the normalisations; None: a quarter of the channels, at most 32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        class_channels: int = 0,
        *,
        resample: Literal["up", "down"] | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        groups: int | None = GROUPS,
    ) -> None:
        super().__init__()
        self.resample, self.groups = resample, _groups(out_channels, groups)
        self.in_layers = nn.Sequential(
            Norm(in_channels, eps, groups),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.classemb_proj = nn.Linear(class_channels, out_channels) if class_channels else None
        self.emb_layers = nn.Linear(emb_channels, 2 * out_channels)
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(nn.SiLU(), Dropout(dropout), last)
        self.skip_connection = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )
        zero(self.emb_layers)
        zero(last)

    def forward(self, x: Tensor, emb: Tensor, classes: Tensor | None) -> Tensor:
        """x [B, C, H, W], emb [B, E] and class embedding [B, K] to [B, C', H', W']."""
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample == "up":
            h, x = (F.interpolate(y, scale_factor=2, mode="nearest") for y in (h, x))
        elif self.resample == "down":
            h, x = (F.avg_pool2d(y, 2) for y in (h, x))
        h = conv(h)
        with full_precision(x.device):
            scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
            gate = None
            if self.classemb_proj is not None and classes is not None:
                gate = torch.sigmoid(self.classemb_proj(classes) + 2)[:, :, None, None].to(h.dtype)
            scale, shift = (1 + scale).to(h.dtype), shift.to(h.dtype)
        h = group_norm(h, self.groups, None, None, 1e-3)
        h = self.out_layers(torch.addcmul(shift, h, scale))
        skip = x if self.skip_connection is None else self.skip_connection(x)
        return skip + h if gate is None else torch.addcmul(skip, h, gate)


class PixelAttention(nn.Module):
    """Multi-head self-attention over the pixels, added to its input.

    Args:
        channels: width.
        heads: number of heads.
        order: of the rows of the qkv weight.
        eps: of the normalisation.
        groups: of it; None: a quarter of the channels, at most 32.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        order: AttentionOrder = "split",
        eps: float = 1e-5,
        groups: int | None = GROUPS,
    ) -> None:
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = Norm(channels, eps, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        zero(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] to the same."""
        batch, channels, height, width = x.shape
        weight, bias = self.qkv.weight.flatten(1), self.qkv.bias
        assert bias is not None
        if self.order == "legacy":
            # Sorting the rows of the small weight, not the activations, gives plain views.
            rows = (self.heads, 3, channels // self.heads)
            weight = weight.reshape(*rows, channels).transpose(0, 1).flatten(0, 2)
            bias = bias.reshape(rows).transpose(0, 1).flatten()
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # a view if x is channels-last
        q, k, v = (
            part.reshape(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
            for part in F.linear(tokens, weight, bias).chunk(3, dim=2)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(batch, channels, height, width)


class Downsample(nn.Module):
    """Strided convolution that pads right and bottom only, and changes the width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(in_channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Each pixel repeated, then a convolution that changes the width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return y


class PatchedUNet(nn.Module):
    """U-Net on the grid of P x P patches, with a class gate and a detached variance head.

    Args:
        resolution: side of the images, which `attn_resolutions` refers to; other sizes, also
            rectangles, work if they are multiples of P times 2^(levels - 1).
        in_channels, out_channels: channels of the input and of the predicted image.
        num_classes: 0 for a network without classes.
        augment_dim: number of augmentation labels; 0 for none.
        patch_size: P; 1 for an ordinary U-Net.
        model_channels: base width.
        channel_mult: width of each level as a multiple of it, rounded down; fractions are allowed
            where the width is a multiple of 32. Empty: `DEFAULT_MULT` of the grid.
        num_blocks: residual blocks of each level of the encoder; the decoder has one more.
        attn_resolutions: sides of the patched grid with self-attention.
        heads, decoder_heads: attention heads; None: as many as `heads`.
        head_channels: width of a head, instead of a number of heads.
        attention_order: of the rows of the qkv weight.
        resblock_updown: resample inside of residual blocks instead of by convolutions.
        dropout: probability, in every residual block.
        null_class: learn an embedding of "no class"; without it, the embedding is zero.
        learn_variance: add a head whose outputs in (0, 1) follow the image's channels.
        eps: of the affine normalisations.
        groups: of all of them; None: a quarter of the channels, at most 32. Narrow levels need
            that: with a group for each channel its mean over the picture is lost.
        recompute: recompute residual blocks in the backward pass, for less memory.
        coord_frequencies: of coordinate channels; None for none.

    Raises:
        TesseraError: widths that are no multiples of 32 or of the heads, or a grid without
            default widths.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        *,
        patch_size: int = 4,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (),
        num_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16, 8),
        heads: int = 4,
        decoder_heads: int | None = None,
        head_channels: int | None = None,
        attention_order: AttentionOrder = "split",
        resblock_updown: bool = False,
        dropout: float = 0.0,
        null_class: bool = True,
        learn_variance: bool = False,
        eps: float = 1e-5,
        groups: int | None = GROUPS,
        recompute: bool = False,
        coord_frequencies: int | None = None,
    ) -> None:
        super().__init__()
        grid = resolution // patch_size
        widths = level_widths(grid, model_channels, channel_mult)
        self.patch_size, self.num_classes, self.recompute = patch_size, num_classes, recompute
        self.model_channels = model_channels
        self.divisor = patch_size * 2 ** (len(widths) - 1)
        self.coords = CoordinateInput(coord_frequencies)
        attention_levels = {grid // side for side in attn_resolutions}
        first, last = widths[0], widths[-1]
        emb_channels = int(model_channels * (channel_mult or DEFAULT_MULT[grid])[-1])
        self._make_embeddings(first, emb_channels, augment_dim, null_class)

        def block(c_in: int, c_out: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
            classes = first if num_classes else 0
            return ResBlock(
                c_in, c_out, emb_channels, classes,
                resample=resample, dropout=dropout, eps=eps, groups=groups,
            )  # fmt: skip

        def attention(width: int, number: int) -> PixelAttention:
            number = _heads(width, number, head_channels)
            return PixelAttention(width, number, attention_order, eps, groups)

        stem = nn.Conv2d((in_channels + self.coords.channels) * patch_size**2, first, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([stem])])
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                unit: list[nn.Module] = [block(width, width)]
                if 2**level in attention_levels:
                    unit.append(attention(width, heads))
                self.input_blocks.append(nn.ModuleList(unit))
            if level + 1 < len(widths):
                wider = widths[level + 1]
                down = block(width, wider, "down") if resblock_updown else Downsample(width, wider)
                self.input_blocks.append(nn.ModuleList([down]))
        self.middle_block = nn.ModuleList(
            [block(last, last), attention(last, heads), block(last, last)]
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(num_blocks + 1):
                unit = [block(2 * width, width)]
                if 2**level in attention_levels:
                    unit.append(attention(width, decoder_heads or heads))
                if level > 0 and index == num_blocks:
                    to = widths[level - 1]
                    unit.append(block(width, to, "up") if resblock_updown else Upsample(width, to))
                self.output_blocks.append(nn.ModuleList(unit))
        self.learn_variance = learn_variance
        norm = Norm(first, eps, groups)
        self._make_heads(norm, first, emb_channels, out_channels * patch_size**2)

    def _make_embeddings(
        self, width: int, emb_channels: int, augment_dim: int, null_class: bool
    ) -> None:
        """What class, noise level and augmentation become vectors by."""
        classes, channels = self.num_classes, self.model_channels
        self.label_embs = nn.Embedding(classes + int(null_class), width) if classes else None
        self.time_embed = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.SiLU(),
            nn.Linear(4 * channels, emb_channels),
            nn.SiLU(),
        )
        self.augment_embed = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None

    def _make_heads(
        self, norm: nn.Module, width: int, emb_channels: int, patch_channels: int
    ) -> None:
        """The layers that read the last activations."""
        head = nn.Conv2d(width, patch_channels, 3, padding=1)
        zero(head)
        self.out = nn.Sequential(norm, nn.SiLU(), head)
        if self.learn_variance:
            self.variance_output_t_emb = nn.Conv2d(emb_channels, 2 * width, 1)
            self.variance_output_model = nn.Sequential(
                nn.Conv2d(2 * width, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, patch_channels, 3, padding=1),
            )

    def blocks(self) -> Iterator[ResBlock | PixelAttention]:
        """The repeated residual and attention blocks, in the order of their use."""
        for module in self.modules():
            if isinstance(module, ResBlock | PixelAttention):
                yield module

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """Scaled input x [B, C, H, W] and noise conditioning [B] to raw output.

        The output is [B, C', H, W]; with a variance head [B, 2 C', H, W], the second half in
        (0, 1). No gradient of that half reaches the trunk.

        Raises:
            TesseraError: a height or width that does not fit patches and levels.
        """
        height, width = x.shape[-2:]
        if height % self.divisor or width % self.divisor:
            raise TesseraError(
                f"images of {width}x{height} pixels do not fit the patched U-Net: both sides must "
                f"be multiples of {self.divisor} (patch size times halvings)"
            )
        emb, classes = self._embed(noise, cond)
        h = to_patches(self.coords(x, cond), self.patch_size)
        if x.is_contiguous(memory_format=torch.channels_last):
            h = h.contiguous(memory_format=torch.channels_last)
        first, *units = self.input_blocks
        h = self._run(first, h, emb, classes)
        position = position_embedding(h.shape[1], h.shape[2], h.shape[3], h.device)
        stem = h = h + position.to(h.dtype)
        skips = [h]
        for unit in units:
            h = self._run(unit, h, emb, classes)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, classes)
        for unit in self.output_blocks:
            h = self._run(unit, torch.cat([h, skips.pop()], dim=1), emb, classes)
        with full_precision(x.device):
            mean = from_patches(self.out(h.to(torch.float32)), self.patch_size)
        if not self.learn_variance:
            return mean
        z = torch.cat([stem, h], dim=1).detach()
        z = z + self.variance_output_t_emb(F.silu(emb)[:, :, None, None])
        value = torch.sigmoid(self.variance_output_model(z).to(torch.float32))
        return torch.cat([mean, from_patches(value, self.patch_size)], dim=1)

    def _run(self, unit: nn.Module, h: Tensor, emb: Tensor, classes: Tensor | None) -> Tensor:
        assert isinstance(unit, nn.ModuleList)
        for layer in unit:
            if not isinstance(layer, ResBlock):
                h = layer(h)
            elif self.recompute and self.training:
                h = checkpoint(layer, h, emb, classes, use_reentrant=False)
            else:
                h = layer(h, emb, classes)
        return h

    def _embed(self, noise: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Noise embedding [B, E] and class embedding [B, c0] (None without), float32."""
        with full_precision(noise.device):
            emb = time_embedding(noise, self.model_channels)
            if self.augment_embed is not None and cond.augment is not None:
                emb = emb + self.augment_embed(cond.augment)
            emb = self.time_embed(emb)
            if self.label_embs is None:
                return emb, None
            labels = cond.labels
            if labels is None:
                labels = torch.full((len(noise),), -1, dtype=torch.int64, device=noise.device)
            missing = labels < 0
            if self.label_embs.num_embeddings > self.num_classes:
                return emb, self.label_embs(labels.masked_fill(missing, self.num_classes))
            known = self.label_embs(labels.clamp(min=0))
            return emb, known.masked_fill(missing[:, None], 0)


def _heads(width: int, number: int, head_channels: int | None) -> int:
    """Heads of an attention `width` channels wide: `number`, or so many as have `head_channels`."""
    if width % (head_channels or number):
        wanted = f"heads of {head_channels} channels" if head_channels else f"{number} heads"
        raise TesseraError(
            f"a level {width} channels wide cannot be divided into {wanted}; change head_channels, "
            "heads or the widths"
        )
    return width // head_channels if head_channels else number


def level_widths(grid: int, model_channels: int, channel_mult: Sequence[float]) -> list[int]:
    """The width of each level of a network on a grid of this side.

    Raises:
        TesseraError: no multipliers and a grid without default ones, or a width that is no
            multiple of 32.
    """
    if not channel_mult and grid not in DEFAULT_MULT:
        raise TesseraError(
            f"there are no default widths for a patched grid of side {grid}; set channel_mult "
            f"(defaults exist for {', '.join(map(str, sorted(DEFAULT_MULT)))})"
        )
    widths = [int(mult * model_channels) for mult in channel_mult or DEFAULT_MULT[grid]]
    for width in widths:
        if width < 1 or width % GROUPS:
            raise TesseraError(
                f"a level would be {width} channels wide; widths must be multiples of {GROUPS}. "
                "Change channel_mult or model_channels"
            )
    return widths
