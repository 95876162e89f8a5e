"""The ADM U-Net (Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis"; EDM)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.conditioning import Conditioning, one_hot
from tessera.networks.layers import (
    Conv,
    CoordinateInput,
    GroupNorm,
    PositionalEmbedding,
    UNetBlock,
    full_precision,
    zero,
)


class AdmUNet(nn.Module):
    """U-Net with adaptive group norms and multi-head attention at several resolutions.

    Where a level asks for attention but is narrower than a head, it has none, as in EDM's released
    code (recipes refuse such settings).

    Args:
        resolution: height and width that the levels are named and attention is chosen by; other
            sizes work as long as every level halves evenly.
        in_channels, out_channels: channels of the input image and of the raw output.
        num_classes: 0 for a network without classes.
        augment_dim: number of augmentation labels; 0 for none.
        model_channels, channel_mult: width, and its multiplier at each level, rounded down.
        channel_mult_emb: width of the conditioning vector as a multiple of `model_channels`.
        num_blocks: residual blocks of each level of the encoder; the decoder has one more.
        attn_resolutions: resolutions with self-attention, in all blocks.
        dropout: probability, in every block.
        head_channels: width of an attention head.
        heads: attention heads of every level, in place of a width.
        groups: of every normalisation; None: a quarter of its channels, at most 32.
        learn_variance: put out as many channels again, (1 - v) / 2 of the v in [-1, 1] that the
            released networks of guided diffusion put out: the place of a step's log variance
            between the larger and the smaller bound.
        coord_frequencies: of the coordinate channels, see `CoordinateInput`; None: no coordinates.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        *,
        model_channels: int = 192,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        head_channels: int = 64,
        heads: int | None = None,
        groups: int | None = None,
        learn_variance: bool = False,
        coord_frequencies: int | None = None,
    ) -> None:
        super().__init__()
        self.coords = CoordinateInput(coord_frequencies)
        self.num_classes = num_classes
        levels = [f"{s}x{s}" for s in (resolution >> i for i in range(len(channel_mult)))]
        emb_channels = model_channels * channel_mult_emb

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(num_classes, emb_channels, bias=False) if num_classes else None

        def block(
            c_in: int, c_out: int, attention: bool = False, up: bool = False, down: bool = False
        ) -> UNetBlock:
            number = (heads or c_out // head_channels) if attention else 0
            return UNetBlock(
                c_in, c_out, emb_channels, up=up, down=down, heads=number, dropout=dropout,
                groups=groups,
            )  # fmt: skip

        self.learn_variance = learn_variance
        widths = [int(model_channels * mult) for mult in channel_mult]
        self.enc = nn.ModuleDict()
        channels = widths[0]
        skips = [channels]
        for level, name in enumerate(levels):
            attention = resolution >> level in attn_resolutions
            if level == 0:
                self.enc[f"{name}_conv"] = Conv(in_channels + self.coords.channels, channels, 3)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, down=True)
                skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{name}_block{index}"] = block(channels, widths[level], attention)
                channels = widths[level]
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, name in reversed(list(enumerate(levels))):
            attention = resolution >> level in attn_resolutions
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                width = widths[level]
                self.dec[f"{name}_block{index}"] = block(channels + skips.pop(), width, attention)
                channels = width
        self.out_norm = GroupNorm(channels, groups=groups)
        self.out_conv = Conv(channels, out_channels * (1 + learn_variance), 3)
        self._initialise()

    def _initialise(self) -> None:
        """PyTorch's own uniform ±1/√fan_in, but zero where a residual branch or the output ends."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(
                (".conv1", ".proj", "map_augment", "out_conv")
            ):
                zero(module)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def blocks(self) -> Iterator[UNetBlock]:
        """The repeated residual blocks, in the order of their use."""
        for module in [*self.enc.values(), *self.dec.values()]:
            if isinstance(module, UNetBlock):
                yield module

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """Scaled input x [B, C, H, W] and noise conditioning [B] to raw output [B, C', H, W].

        With a learned variance, the second half of twice as many channels is in [0, 1].
        """
        emb = self._embed(noise, cond)
        x = self.coords(x, cond)
        skips = []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        if not self.learn_variance:
            return out
        image, variance = out.chunk(2, dim=1)
        return torch.cat([image, (1 - variance) / 2], dim=1)

    def _embed(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """The conditioning vector, float32 [B, E]."""
        with full_precision(noise.device):
            emb = self.map_noise(noise)
            if self.map_augment is not None and cond.augment is not None:
                emb = emb + self.map_augment(cond.augment)
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            if self.map_label is not None:
                labels = one_hot(cond.labels, self.num_classes, len(noise), noise.device)
                emb = emb + self.map_label(labels)
            return F.silu(emb)
