"""DDPM++ and NCSN++ (Song et al. 2021, "Score-based generative modeling through SDEs"; EDM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.conditioning import Conditioning, one_hot
from tessera.networks.layers import (
    Conv,
    CoordinateInput,
    FourierEmbedding,
    GroupNorm,
    PositionalEmbedding,
    Resample,
    UNetBlock,
    full_precision,
)


class SongUNet(nn.Module):
    """U-Net on images at several resolutions, conditioned on noise level and class.

    DDPM++ is the default; NCSN++ has `embedding="fourier"`, `channel_mult_noise=2`,
    `encoder="residual"` and `resample_filter=(1, 3, 3, 1)`.

    Args:
        resolution: height and width that the levels are named and attention is chosen by; other
            sizes work as long as every level halves evenly.
        in_channels, out_channels: channels of the input image and of the raw output.
        num_classes: 0 for a network without classes.
        augment_dim: number of augmentation labels; 0 for none.
        model_channels, channel_mult: width, and its multiplier at each level.
        channel_mult_emb, channel_mult_noise: widths of the conditioning vector and of the noise
            embedding, as multiples of `model_channels`.
        num_blocks: residual blocks of each level of the encoder; the decoder has one more.
        attn_resolutions: resolutions with self-attention.
        dropout: probability, in every block.
        embedding: of the noise level.
        encoder: "skip" adds a projection of the downsampled input at each level; "residual" adds
            and carries it.
        decoder: "skip" sums the outputs of all levels.
        resample_filter: taps of the up- and downsampling filter.
        coord_frequencies: of the coordinate channels, see `CoordinateInput`; None: no coordinates.
        implicit_mlp: let a pixel-wise perceptron of three layers read the input, before the first
            3x3 convolution.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        *,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        embedding: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder: Literal["standard", "skip", "residual"] = "standard",
        decoder: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[int] = (1, 1),
        coord_frequencies: int | None = None,
        implicit_mlp: bool = False,
    ) -> None:
        super().__init__()
        self.coords = CoordinateInput(coord_frequencies)
        in_channels += self.coords.channels
        self.num_classes = num_classes
        self.num_blocks = num_blocks
        self.encoder = encoder
        self.levels = [f"{s}x{s}" for s in (resolution >> i for i in range(len(channel_mult)))]
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        taps = tuple(resample_filter)

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = nn.Linear(num_classes, noise_channels) if num_classes else None
        self.map_augment = (
            nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        block = partial(
            UNetBlock, emb_channels=emb_channels, dropout=dropout, skip_scale=math.sqrt(0.5),
            eps=1e-6, taps=taps, resample_proj=True, adaptive=False,
        )  # fmt: skip
        widths = [model_channels * factor for factor in channel_mult]
        heads = [int(resolution >> level in attn_resolutions) for level in range(len(widths))]
        stem = (_implicit_mlp if implicit_mlp else Conv)(in_channels, model_channels, 3)
        self.enc = nn.ModuleDict({f"{self.levels[0]}_conv": stem})
        skips = self._fill_encoder(block, in_channels, [model_channels, *widths], heads, taps)
        self.dec = nn.ModuleDict()
        self._fill_decoder(block, skips, widths, heads, taps, out_channels, decoder == "skip")
        self._initialise()

    def _fill_encoder(
        self,
        block: Callable[..., UNetBlock],
        aux_channels: int,
        widths: Sequence[int],
        heads: Sequence[int],
        taps: tuple[int, ...],
    ) -> list[int]:
        """Add the layers of all levels; the channels of what the decoder takes up, in order.

        `widths` are the stem's and those of the levels.
        """
        channels = widths[0]
        skips = [channels]
        for level, name in enumerate(self.levels):
            if level > 0:
                self.enc[f"{name}_down"] = block(channels, channels, down=True)
                skips.append(channels)
                if self.encoder == "skip":
                    self.enc[f"{name}_aux_down"] = Resample(taps, up=False)
                    self.enc[f"{name}_aux_skip"] = Conv(aux_channels, channels, 1)
                elif self.encoder == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv(
                        aux_channels, channels, 3, down=True, taps=taps, fused=True
                    )
                    aux_channels = channels
            width = widths[level + 1]
            for index in range(self.num_blocks):
                self.enc[f"{name}_block{index}"] = block(channels, width, heads=heads[level])
                channels = width
                skips.append(channels)
        return skips

    def _fill_decoder(
        self,
        block: Callable[..., UNetBlock],
        skips: list[int],
        widths: Sequence[int],
        heads: Sequence[int],
        taps: tuple[int, ...],
        out_channels: int,
        sums_levels: bool,
    ) -> None:
        """Add the layers of all levels, from the deepest; `skips` are used up."""
        deepest, channels = len(self.levels) - 1, widths[-1]
        for level, name in reversed(list(enumerate(self.levels))):
            if level == deepest:
                self.dec[f"{name}_in0"] = block(channels, channels, heads=1)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, up=True)
            for index in range(self.num_blocks + 1):
                last = index == self.num_blocks
                self.dec[f"{name}_block{index}"] = block(
                    channels + skips.pop(), widths[level], heads=heads[level] if last else 0
                )
                channels = widths[level]
            if sums_levels or level == 0:
                if level != deepest and sums_levels:
                    self.dec[f"{name}_aux_up"] = Resample(taps, up=True)
                self.dec[f"{name}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv(channels, out_channels, 3)

    def _initialise(self) -> None:
        """Xavier-uniform weights and zero biases; all residual branches start near zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                gain = 1.0
                if name.endswith((".conv1", ".proj", "_aux_conv")):
                    gain = 1e-5
                elif name.endswith(".qkv"):
                    gain = math.sqrt(0.2)
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> Iterator[UNetBlock]:
        """The repeated residual blocks, in the order of their use."""
        for module in [*self.enc.values(), *self.dec.values()]:
            if isinstance(module, UNetBlock):
                yield module

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """Scaled input x [B, C, H, W] and noise conditioning [B] to raw output [B, C', H, W]."""
        emb = self._embed(noise, cond)
        x, skips = self._encode(self.coords(x, cond), emb)
        return self._decode(x, emb, skips)

    def _embed(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """The conditioning vector, float32 [B, E]."""
        with full_precision(noise.device):
            cosines, sines = self.map_noise(noise).chunk(2, dim=1)
            emb = torch.cat([sines, cosines], dim=1)
            if self.map_label is not None:
                labels = one_hot(cond.labels, self.num_classes, len(noise), noise.device)
                emb = emb + self.map_label(labels * math.sqrt(self.num_classes))
            if self.map_augment is not None and cond.augment is not None:
                emb = emb + self.map_augment(cond.augment)
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest activations and those that the decoder takes up, in order."""
        enc, aux = self.enc, x
        x = enc[f"{self.levels[0]}_conv"](x)
        skips = [x]
        for level, name in enumerate(self.levels):
            if level > 0:
                x = enc[f"{name}_down"](x, emb)
                if self.encoder == "skip":
                    aux = enc[f"{name}_aux_down"](aux)
                    x = x + enc[f"{name}_aux_skip"](aux)
                elif self.encoder == "residual":
                    x = aux = (x + enc[f"{name}_aux_residual"](aux)).mul_(math.sqrt(0.5))
                skips.append(x)
            for index in range(self.num_blocks):
                x = enc[f"{name}_block{index}"](x, emb)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """The raw output; empties `skips` from its end."""
        dec = self.dec
        x = dec[f"{self.levels[-1]}_in0"](x, emb)
        x = dec[f"{self.levels[-1]}_in1"](x, emb)
        out: Tensor | None = None
        for name in reversed(self.levels):
            if name != self.levels[-1]:
                x = dec[f"{name}_up"](x, emb)
            for index in range(self.num_blocks + 1):
                x = dec[f"{name}_block{index}"](torch.cat([x, skips.pop()], dim=1), emb)
            if f"{name}_aux_conv" in dec:
                new = dec[f"{name}_aux_conv"](F.silu(dec[f"{name}_aux_norm"](x)))
                out = new if out is None else dec[f"{name}_aux_up"](out) + new
        assert out is not None
        return out


def _implicit_mlp(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """Three 1x1 convolutions with SiLU, then the convolution that reads their output."""
    layers: list[nn.Module] = []
    for width in (in_channels, channels, channels):
        layers += [Conv(width, channels, 1), nn.SiLU()]
    return nn.Sequential(*layers, Conv(channels, channels, kernel))
