"""LEGO bricks (Zheng et al. 2024): a stack of small diffusion transformers on local patches.

Every brick maps the whole canvas to an estimate of the whole canvas, but looks at one r x r patch
at a time, with the same weights for all patches. It sees the estimate of the brick before it, the
noisy image and each pixel's place. Growing r (PG) goes from local detail to global structure,
falling r (PR) from global to local, and both in turn is U. With every brick's output supervised,
the stack may be cut short after any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.conditioning import Conditioning, one_hot
from tessera.errors import TesseraError
from tessera.networks.layers import full_precision
from tessera.networks.sides import tiled
from tessera.networks.transformer import DiTBlock, FinalLayer, TimestepEmbedding, sincos_table


class BrickSpec(NamedTuple):
    """Size and depth of a brick.

    Attributes:
        size: side r of the patches it looks at, pixels.
        patch: side p of a token, pixels; divides `size`.
        depth: transformer blocks.
    """

    size: int
    patch: int
    depth: int


class Lego(nn.Module):
    """A stack of bricks, conditioned on noise level, class and augmentation labels.

    The canvas may have any height and width that are multiples of every brick's size. A canvas
    smaller than a brick (a crop that is trained on) is one small patch to it. Parameters are named
    as in the released checkpoints.

    Args:
        channels: of the image, and of the output.
        num_classes: 0 for a network without classes.
        augment_dim: number of augmentation labels; 0 for none.
        bricks: (size, patch, depth) of each, first to last.
        width: D of the tokens in all bricks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs as a multiple of `width`.
        joint: give out every brick's output while training, for supervision. Only stacks that were
            trained so may be cut short.
        positions: whether the sin-cos table of a token's place in its patch is "fixed" or, as in
            the released checkpoints, "learned" from there on.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        *,
        bricks: Sequence[tuple[int, int, int]],
        width: int = 384,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        joint: bool = True,
        positions: Literal["fixed", "learned"] = "fixed",
    ) -> None:
        super().__init__()
        self.specs = tuple(BrickSpec(*spec) for spec in bricks)
        self.num_classes = num_classes
        self.joint = joint
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width) if num_classes else None
        self.map_augment = nn.Linear(augment_dim, width) if augment_dim else None
        self.model = nn.ModuleList(
            Brick(
                spec,
                in_channels=channels + 2 + (channels if index else 0),
                out_channels=channels,
                width=width,
                heads=heads,
                mlp_ratio=mlp_ratio,
                learned_positions=positions == "learned",
            )
            for index, spec in enumerate(self.specs)
        )
        self._initialise()

    def _initialise(self) -> None:
        """Every block starts as the identity and every brick with output 0 (adaLN-zero)."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.model.modules():
            if isinstance(module, DiTBlock | FinalLayer):
                modulation = module.adaLN_modulation[1]
                assert isinstance(modulation, nn.Linear)
                nn.init.zeros_(modulation.weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)
        embedders = [self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.map_augment]
        if self.y_embedder is not None:
            embedders.append(self.y_embedder.embedding_table)
        for embedder in embedders:
            if isinstance(embedder, nn.Linear):
                nn.init.normal_(embedder.weight, std=0.02)

    def fits(self, side: int) -> bool:
        """Whether a canvas may have this height or width, pixels."""
        return tiled(side, ((spec.size, spec.patch) for spec in self.specs))

    def check_canvas(self, height: int, width: int) -> None:
        """Whether the bricks tile a canvas.

        Raises:
            TesseraError: they do not; the message names the sizes that they do.
        """
        if self.fits(height) and self.fits(width):
            return
        step = math.lcm(*(spec.size for spec in self.specs))
        small = [size for size in range(1, step) if self.fits(size)]
        allowed = f"multiples of {step}" + (f" or {', '.join(map(str, small))}" if small else "")
        raise TesseraError(
            f"a canvas of {height}x{width} pixels (height x width) does not fit bricks of "
            f"{', '.join(str(spec.size) for spec in self.specs)} pixels; height and width must be "
            f"{allowed}"
        )

    def prefix(self, bricks: int) -> nn.Module:
        """The network of the first `bricks` bricks; it shares their weights.

        Raises:
            TesseraError: there are not as many, or only the last output was trained.
        """
        if bricks == len(self.specs):
            return self
        if not 1 <= bricks < len(self.specs):
            raise TesseraError(
                f"cannot run {bricks} bricks: the stack has {len(self.specs)}, and at least the "
                "first must run"
            )
        if not self.joint:
            raise TesseraError(
                "this stack was trained with its last output only (network.joint=false), so no "
                "brick may be skipped. Train it with network.joint=true"
            )
        return _Prefix(self, bricks)

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated transformer blocks, in the order of their use."""
        for brick in self.model:
            assert isinstance(brick, Brick)
            yield from brick.blocks

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor | tuple[Tensor, ...]:
        """Scaled input x [B, C, H, W] and noise conditioning [B] to raw output, like x.

        Returns:
            The last brick's output; of a joint stack in training mode, those of all bricks.

        Raises:
            TesseraError: the canvas does not fit the bricks.
        """
        outputs = self.outputs(x, noise, cond, len(self.specs))
        return outputs if self.joint and self.training else outputs[-1]

    def outputs(
        self, x: Tensor, noise: Tensor, cond: Conditioning, bricks: int
    ) -> tuple[Tensor, ...]:
        """What each of the first `bricks` bricks gives out, each like x."""
        self.check_canvas(*x.shape[-2:])
        c = self._embed(noise, cond)
        place = pixel_coordinates(x, cond)
        outputs: list[Tensor] = []
        for brick in self.model[:bricks]:
            previous = outputs[-1:]
            outputs.append(brick(torch.cat([*previous, x, place], dim=1), c))
        return tuple(outputs)

    def _embed(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """The conditioning vector, float32 [B, D]."""
        with full_precision(noise.device):
            c: Tensor = self.t_embedder(noise)
            if self.y_embedder is not None:
                c = c + self.y_embedder(one_hot(cond.labels, self.num_classes, len(c), c.device))
            if self.map_augment is not None and cond.augment is not None:
                c = c + self.map_augment(cond.augment)
            return c


class _Prefix(nn.Module):
    """The first bricks of a stack as a network of its own."""

    def __init__(self, stack: Lego, bricks: int) -> None:
        super().__init__()
        self.stack, self.bricks = stack, bricks

    def prefix(self, bricks: int) -> nn.Module:
        """As `Lego.prefix`; of no more bricks than these."""
        return self.stack.prefix(min(bricks, self.bricks))

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor | tuple[Tensor, ...]:
        """As `Lego.forward` of a stack that ends here."""
        outputs = self.stack.outputs(x, noise, cond, self.bricks)
        return outputs if self.stack.training else outputs[-1]


class Brick(nn.Module):
    """A transformer that looks at one patch of the canvas at a time.

    Tokens keep the order of their patches, and attention is confined to spans of one patch, so
    that an image's patches need not be moved into the batch.
    """

    pos_embed: Tensor

    def __init__(
        self,
        spec: BrickSpec,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        heads: int,
        mlp_ratio: float,
        learned_positions: bool,
    ) -> None:
        super().__init__()
        self.size, self.patch, depth = spec
        side = self.size // self.patch
        table = sincos_table(width, side, side)
        if learned_positions:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.x_embedder = PatchEmbedding(in_channels, width, self.patch)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, self.patch**2 * out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Canvas [B, C_in, H, W] and conditioning [B, D] to output [B, C, H, W]."""
        canvas = Grid(x.shape[2], x.shape[3], self.size, self.patch)
        h = self.x_embedder(canvas.cut(x))
        positions = self._positions(canvas).to(h.dtype)
        # [B, patches, tokens of a patch, D]: one table for all patches.
        h = (h.reshape(len(h), -1, *positions.shape[1:]) + positions).flatten(1, 2)
        for block in self.blocks:
            h = block(h, c, canvas.span)
        return canvas.join(self.final_layer(h, c))

    def _positions(self, canvas: Grid) -> Tensor:
        """The part of the table that a patch uses: all of it, but for canvases smaller than it."""
        side = self.size // self.patch
        table = self.pos_embed.reshape(1, side, side, -1)
        return table[:, : canvas.rows, : canvas.columns].flatten(1, 2)


class Grid:
    """Cuts a canvas of `height` x `width` into r x r patches of tokens with side p, and joins them.

    Attributes:
        rows, columns: tokens of a patch along each axis.
        span: tokens of a patch.
    """

    def __init__(self, height: int, width: int, size: int, token: int) -> None:
        self.token = token
        self.rows, self.columns = min(height, size) // token, min(width, size) // token
        self.span = self.rows * self.columns
        self._down, self._across = height // min(height, size), width // min(width, size)

    def cut(self, x: Tensor) -> Tensor:
        """Canvas [B, C, H, W] to tokens [B, T, C p p], patch after patch, rows first in each."""
        batch, channels, p = len(x), x.shape[1], self.token
        x = x.reshape(batch, channels, self._down, self.rows, p, self._across, self.columns, p)
        # [B, patch row, patch column, token row, token column, C, p, p]
        return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, -1, channels * p**2)

    def join(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, p p C] (channel fastest) to the canvas [B, C, H, W]; `cut` undone."""
        batch, p = len(tokens), self.token
        x = tokens.reshape(batch, self._down, self._across, self.rows, self.columns, p, p, -1)
        # [B, C, patch row, token row, p, patch column, token column, p]
        x = x.permute(0, 7, 1, 3, 5, 2, 4, 6)
        return x.reshape(batch, x.shape[1], self._down * self.rows * p, -1)


class PatchEmbedding(nn.Module):
    """The convolution of kernel and stride p that embeds tokens, on tokens already cut out."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, C p p] to [B, T, D]."""
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)


class LabelEmbedding(nn.Module):
    """Classes as vectors; no class is a row of zeros, whose vector is the bias."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Linear(num_classes, width)

    def forward(self, labels: Tensor) -> Tensor:
        """One-hot rows [B, classes] to [B, D]."""
        vectors: Tensor = self.embedding_table(labels)
        return vectors


def pixel_coordinates(x: Tensor, cond: Conditioning) -> Tensor:
    """Each pixel's row and column in [-1, 1], [B, 2, H, W] in x's dtype.

    Those of the full image where `cond` says which part of it x is; else of x itself.
    """
    if cond.coords is not None:
        return cond.coords.flip(1).to(x.dtype)
    batch, _, height, width = x.shape
    rows, columns = (_axis(size, x.device) for size in (height, width))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(x.dtype)
    return place.expand(batch, -1, -1, -1)


def _axis(size: int, device: torch.device) -> Tensor:
    """2 (i / (size - 1) - 1/2); a single pixel is in the middle."""
    index = torch.arange(size, dtype=torch.float32, device=device)
    return 2 * (index / (size - 1) - 0.5) if size > 1 else index
