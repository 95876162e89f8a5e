"""Diffusion transformers (Peebles & Xie 2023), plain or as the gradient of a scalar energy.

The energy transformer reads the noisy image and gives one number E. Its output as a network is
m dE/dx, so that preconditioning, guidance, objectives and samplers treat it as any other. Training
it differentiates that gradient once more, see `second_order`. Parameters carry the names of the
released checkpoints, but that `blocks` are `layers` here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.conditioning import Conditioning, full_grid
from tessera.errors import TesseraError
from tessera.model import Tuning
from tessera.networks.layers import full_precision
from tessera.networks.lego import Grid, PatchEmbedding
from tessera.networks.second_order import AttentionKind, TwiceBlock
from tessera.networks.transformer import (
    DiTBlock,
    FinalLayer,
    TimestepEmbedding,
    sincos,
    sincos_table,
)

Head = Literal["mean_then_linear", "linear_then_mean"]
"""Of an energy: two layers on the mean of all tokens, or the mean of two layers on each."""

SMALLEST_STEP = 1e-4
"""Step sizes of energy descent are at least this."""


class TrunkOptions(TypedDict, total=False):
    """The keyword arguments of `Trunk`."""

    out_channels: int | None
    patch: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float
    recompute: bool


class Trunk(nn.Module):
    """What both kinds of transformer share: from the noisy image to tokens.

    Tokens stand at the places of a sin-cos table. Where an image is a crop, or of another size than
    those trained on, the table is evaluated between its entries, at the tokens' places in the
    complete image stretched to `side`.

    Args:
        block: makes a block of so many channels, heads, and MLPs wider by a factor.
        side: of the complete images, pixels; a multiple of `patch`.
        in_channels: of the input.
        num_classes: 0 for a network without classes. No class is an embedding of its own.
        augment_dim: number of augmentation labels; 0 for none.
        out_channels: of the image that is put out; `in_channels` by default.
        patch: side p of a token, pixels.
        depth: number of blocks.
        width: D of the tokens; a multiple of 4.
        heads: attention heads; must divide the width.
        mlp_ratio: hidden width of the MLPs as a multiple of the width.
        recompute: compute blocks again in the backward pass, for less memory.

    Raises:
        TesseraError: sizes that do not fit.
    """

    pos_embed: Tensor

    def __init__(
        self,
        block: Callable[[int, int, float], DiTBlock],
        side: int,
        in_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        *,
        out_channels: int | None = None,
        patch: int = 2,
        depth: int = 12,
        width: int = 384,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        layers = [block(width, heads, mlp_ratio) for _ in range(depth)]
        if side % patch or width % 4:
            raise TesseraError(
                f"a DiT of width {width} on images of {side} pixels with tokens of {patch}: the "
                "width must be a multiple of 4, and the side of the images one of the tokens'"
            )
        self.side, self.patch, self.width = side, patch, width
        self.channels = out_channels or in_channels
        self.num_classes, self.recompute = num_classes, recompute
        rows = side // patch
        self.register_buffer("pos_embed", sincos_table(width, rows, rows))
        self.x_embedder = PatchEmbedding(in_channels, width, patch)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelTable(num_classes, width) if num_classes else None
        self.map_augment = nn.Linear(augment_dim, width) if augment_dim else None
        self.layers = nn.ModuleList(layers)

    def _initialise(self) -> None:
        """Every block starts as the identity (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DiTBlock | FinalLayer):
                modulation = module.adaLN_modulation[1]
                assert isinstance(modulation, nn.Linear)
                nn.init.zeros_(modulation.weight)
        for embedder in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.map_augment):
            if isinstance(embedder, nn.Linear):
                nn.init.normal_(embedder.weight, std=0.02)

    def fits(self, side: int) -> bool:
        """Whether an image may have this height or width, pixels."""
        return side > 0 and side % self.patch == 0

    def check_canvas(self, height: int, width: int) -> None:
        """Whether tokens tile an image.

        Raises:
            TesseraError: they do not.
        """
        if not (self.fits(height) and self.fits(width)):
            raise TesseraError(
                f"an image of {height}x{width} pixels (height x width) does not divide into tokens "
                f"of {self.patch} pixels; height and width must be multiples of {self.patch}"
            )

    def _tokens(
        self, x: Tensor, noise: Tensor, cond: Conditioning, *, twice: bool
    ) -> tuple[Tensor, Tensor, Grid]:
        """What comes out of the last block, the conditioning vector, and how tokens lie.

        Args:
            twice: whether gradients by x are differentiated again.
        """
        height, width = x.shape[-2:]
        self.check_canvas(height, width)
        grid = Grid(height, width, max(height, width), self.patch)
        c = self._embed(noise, cond)
        h = self.x_embedder(grid.cut(x))
        h = h + self.positions(x, cond).to(h.dtype)
        for block in self.layers:
            h = self._block(block, h, c, grid.rows * grid.columns, twice)
        return h, c, grid

    def _block(self, block: nn.Module, h: Tensor, c: Tensor, span: int, twice: bool) -> Tensor:
        output: Tensor = block(h, c, span)
        return output

    def _embed(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """The conditioning vector, float32 [B, D]."""
        with full_precision(noise.device):
            c: Tensor = self.t_embedder(noise)
            if self.y_embedder is not None:
                c = c + self.y_embedder(cond.labels, len(c))
            if self.map_augment is not None and cond.augment is not None:
                c = c + self.map_augment(cond.augment)
            return c

    def positions(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Codes of the tokens' places, float32 [1 or B, T, D]."""
        size = (x.shape[-2], x.shape[-1])
        if cond.coords is None and size == (self.side, self.side):
            return self.pos_embed
        coords = cond.coords if cond.coords is not None else full_grid(size, x.device)[None]
        # float32 where there is no float64 (Apple's).
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        pixels = (coords.to(exact) + 1) * ((self.side - 1) / 2)
        first = pixels[..., :: self.patch, :: self.patch]
        last = pixels[..., self.patch - 1 :: self.patch, self.patch - 1 :: self.patch]
        place = ((first + last) / 2 - (self.patch - 1) / 2) / self.patch
        # Coordinates are float32: without rounding, those of whole pixels would miss the table.
        columns, rows = ((place * 1024).round() / 1024).flatten(2).unbind(dim=1)
        return sincos(columns, rows, self.width)


class LabelTable(nn.Module):
    """Classes as vectors; no class is the last row."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        """Labels [B], -1 for no class, or None for a batch without, to [B, D]."""
        table = self.embedding_table
        null = table.num_embeddings - 1
        if labels is None:
            return table.weight[null].expand(batch, -1)
        labels = labels.to(table.weight.device)
        vectors: Tensor = table(torch.where(labels < 0, null, labels))
        return vectors


class DiT(Trunk):
    """A diffusion transformer that puts out an image.

    Args:
        shape, options: see `Trunk`.
        learn_variance: put out as many channels again, (1 - v) / 2 of the v in [-1, 1] that the
            released networks put out: the place of a step's log variance between the larger and
            the smaller bound.

    Example:
        >>> network = DiT(16, 4, 10, depth=1, width=32, heads=2, patch=2)
        >>> network(torch.randn(3, 4, 16, 16), torch.zeros(3), Conditioning()).shape
        torch.Size([3, 4, 16, 16])
    """

    def __init__(
        self, *shape: int, learn_variance: bool = False, **options: Unpack[TrunkOptions]
    ) -> None:
        super().__init__(DiTBlock, *shape, **options)
        self.learn_variance = learn_variance
        outputs = self.patch**2 * self.channels * (1 + learn_variance)
        self.final_layer = FinalLayer(self.width, outputs)
        self._initialise()
        nn.init.zeros_(self.final_layer.linear.weight)

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated transformer blocks, in the order of their use."""
        yield from self.layers

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """Scaled input x [B, C_in, H, W] and noise conditioning [B] to raw output [B, C, H, W].

        Raises:
            TesseraError: the image does not divide into tokens.
        """
        h, c, grid = self._tokens(x, noise, cond, twice=False)
        output = grid.join(self.final_layer(h, c))
        if not self.learn_variance:
            return output
        image, variance = output.chunk(2, dim=1)
        return torch.cat([image, (1 - variance) / 2], dim=1)

    def _block(self, block: nn.Module, h: Tensor, c: Tensor, span: int, twice: bool) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            output: Tensor = checkpoint(block, h, c, span, use_reentrant=False)
            return output
        return super()._block(block, h, c, span, twice)


class EnergyDiT(Trunk):
    """A diffusion transformer that gives a scalar energy E, and as its output m dE/dx.

    Gradients are enabled inside for the inner one, so that it works under `torch.no_grad()`. With
    gradients enabled outside, the output can be differentiated by parameters and input.

    The constant of an energy changes no gradient and no difference: the last bias is not trained.
    With the default m = 1 the head must learn to be large, as the mean over T tokens divides
    gradients by T; m = T (the sum of tokens) is well scaled.

    Args:
        shape, options: see `Trunk`; the gradient is given by the first `out_channels`, and blocks
            are recomputed in each of the passes.
        head: see `Head`.
        multiplier: m.
        step_size: of energy descent, see `diffusion.energy`; kept with the weights.
        learn_step_size: make it a parameter.
        step_size_lr: multiplier of its learning rate.
        attention: how attention is made differentiable twice, see `second_order`.
    """

    def __init__(
        self,
        *shape: int,
        head: Head = "mean_then_linear",
        multiplier: float = 1.0,
        step_size: float = 0.01,
        learn_step_size: bool = False,
        step_size_lr: float = 1.0,
        attention: AttentionKind = "recompute",
        **options: Unpack[TrunkOptions],
    ) -> None:
        again = options.get("recompute", False)
        block = functools.partial(TwiceBlock, attention=attention, recompute=again)
        super().__init__(block, *shape, **options)
        self.multiplier, self.step_size_lr = multiplier, step_size_lr
        self.energy_layer = EnergyHead(self.width, head)
        # Of one element, because FSDP does not shard numbers without axes.
        alpha = torch.full((1,), step_size)
        if learn_step_size:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)
        self._initialise()

    def blocks(self) -> Iterator[nn.Module]:
        """What is compiled or sharded as one: all of it.

        A compiled block has no second derivative; the whole, with its inner gradient, has a first.
        Shards gathered block by block would be gone when the inner gradient needs them.
        """
        yield self

    def tuning(self) -> dict[str, Tuning]:
        """The step size has a learning rate of its own, and does not decay."""
        if not self.alpha.requires_grad:
            return {}
        return {"alpha": Tuning(lr=self.step_size_lr, decay=False)}

    def reports(self) -> dict[str, Tensor]:
        """The step size while it learns."""
        return {"step_size": self.alpha} if self.alpha.requires_grad else {}

    @property
    def step_size(self) -> Tensor:
        """Of energy descent, 0-dim and at least `SMALLEST_STEP`, with a gradient also there."""
        if not hasattr(self.alpha, "full_tensor"):
            return _at_least(self.alpha[0], SMALLEST_STEP)
        # A shard; by way of `forward`, for which FSDP gathers the parameters.
        size: Tensor = self(self.pos_embed, self.pos_embed, Conditioning(), want="step_size")
        return size

    def energy(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """E of scaled inputs x [B, C_in, H, W] at noise conditioning [B], float32 [B]."""
        energy: Tensor = self(x, noise, cond, want="energy")
        return energy

    def energy_and_output(
        self, x: Tensor, noise: Tensor, cond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """E [B] and m dE/dx [B, C, H, W] of one evaluation."""
        energy, output = self(x, noise, cond, want="both")
        return energy, output

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Conditioning,
        *,
        want: Literal["output", "energy", "both", "step_size"] = "output",
    ) -> Any:
        """Scaled input x [B, C_in, H, W] and noise conditioning [B] to m dE/dx [B, C, H, W].

        Args:
            want: "energy" for E [B] instead, "both" for (E, m dE/dx), "step_size" for that alone.

        Raises:
            TesseraError: the image does not divide into tokens, or float16 is asked for.
        """
        if want == "step_size":
            return _at_least(self.alpha[0], SMALLEST_STEP)
        _refuse_float16(x.device)
        if want == "energy":
            # Blocks that are recomputed are so by the same means as for two derivatives.
            return self._energy(x, noise, cond, twice=self.recompute and torch.is_grad_enabled())
        twice = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            energy, gradient = self._functional(x, noise, cond)
        else:
            with _differentiable(x, noise, cond) as (x, noise, cond):
                energy = self._energy(x, noise, cond, twice=twice)
                (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=twice)
            energy = energy if twice else energy.detach()
        output = gradient[:, : self.channels] * self.multiplier
        if twice and self.alpha.requires_grad:
            # Where no loss trains it, DDP would wait for its gradient and never average any.
            output = output + 0 * self.alpha
        return (energy, output) if want == "both" else output

    def _functional(self, x: Tensor, noise: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """E and dE/dx in the one form that compilers differentiate further."""

        def total(u: Tensor) -> tuple[Tensor, Tensor]:
            energy = self._energy(u, noise, cond, twice=True)
            return energy.sum(), energy

        gradient, energy = torch.func.grad(total, has_aux=True)(x)
        return energy, gradient

    def _energy(self, x: Tensor, noise: Tensor, cond: Conditioning, *, twice: bool) -> Tensor:
        h, _, _ = self._tokens(x, noise, cond, twice=twice)
        with full_precision(x.device):
            energy: Tensor = self.energy_layer(h.to(torch.promote_types(h.dtype, torch.float32)))
            return energy

    def _block(self, block: nn.Module, h: Tensor, c: Tensor, span: int, twice: bool) -> Tensor:
        assert isinstance(block, TwiceBlock)
        if twice:
            return block.twice(h, c, span)
        return super()._block(block, h, c, span, twice)


class EnergyHead(nn.Module):
    """Tokens [B, T, D] to one number each image, [B]."""

    def __init__(self, width: int, head: Head) -> None:
        super().__init__()
        self.head = head
        self.energy_head = nn.Sequential(
            nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, 1)
        )
        constant = self.energy_head[2].bias
        assert isinstance(constant, Tensor)
        constant.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        if self.head == "mean_then_linear":
            h = h.mean(dim=1, keepdim=True)
        energy: Tensor = self.energy_head(h).mean(dim=(1, 2))
        return energy


@contextlib.contextmanager
def _differentiable(
    x: Tensor, noise: Tensor, cond: Conditioning
) -> Iterator[tuple[Tensor, Tensor, Conditioning]]:
    """A region with gradients, by x, which is a tensor of its own unless it already has one.

    Tensors of `torch.inference_mode()` know no gradients, so they are copied.
    """
    inherited = torch.is_grad_enabled() and x.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        x, noise = _outside_inference(x), _outside_inference(noise)
        cond = cond.map(_outside_inference)
        yield x if inherited else x.detach().requires_grad_(), noise, cond


def _at_least(value: Tensor, least: float) -> Tensor:
    """The larger one, with the gradient of `value` also where it is smaller."""
    return value + (value.clamp(min=least) - value).detach()


def _outside_inference(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _refuse_float16(device: torch.device) -> None:
    """
    Raises:
        TesseraError: autocast to float16 is on.
    """
    if (
        torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
        and torch.get_autocast_dtype(device.type) == torch.float16
    ):
        raise TesseraError(
            "an energy's gradient is taken inside of the network, where no loss scale reaches, and "
            "float16 loses its small values. Set training.precision to bf16 or fp32"
        )
