"""A denoiser that begins as the best linear one of its images, so that training adds the rest.

Of images with mean μ and covariance C, the linear estimate of least squares from z = x + σ n is
μ + C (C + σ² I)⁻¹ (z - μ). Networks find it first and need tens of thousands of images for it (the
linear structure of scores: Wang & Vastola 2023), although one pass over the images gives it. Here C
is taken for diagonal in the cosine transform of uncorrelated colours, which holds for photographs
closely; the network estimates what is left, in units of its expected size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.blur import block_dct, block_idct
from tessera.diffusion.denoiser import Posterior, column
from tessera.diffusion.means import block_means, enlarge_means
from tessera.diffusion.preconditioning import Coefficients, Edm, Preconditioned
from tessera.errors import TesseraError
from tessera.networks.layers import full_precision

_FLOOR = 1e-10  # of variances, in squares of model space: what has less never changes


class LinearStatistics(nn.Module):
    """Means and spectrum of images; buffers, so that they are kept with a network's weights.

    Before `measure` all images are taken for black, and known exactly.

    Args:
        shape: (C, H, W) of the images in model space, H = W.
        num_classes: of which each gets a mean of its own.

    Attributes:
        mean: [K + 1, C, H, W] in pixels, of each class, and at last of all images.
        axes: [C, C], uncorrelated colours as columns.
        power: [2, C, H, W], variances of the cosine transform along these, given the class, and
            without.

    Example:
        >>> statistics = LinearStatistics((3, 8, 8), 0)
        >>> statistics.measure([(torch.rand(64, 3, 8, 8), None)])
        >>> z, sigma = torch.randn(2, 3, 8, 8), torch.tensor([1e-4, 100.0])
        >>> estimate, error = statistics(z, sigma, None)
        >>> estimate.shape, bool(error[0] < error[1])
        (torch.Size([2, 3, 8, 8]), True)
    """

    mean: Tensor
    axes: Tensor
    power: Tensor

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes + 1, *shape))
        self.register_buffer("axes", torch.eye(shape[0]))
        self.register_buffer("power", torch.zeros(2, *shape))

    def measure(self, images: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Take means and spectrum from images.

        Means of few images are drawn towards what they would be without them, by what their
        scatter says (an estimate of James and Stein's kind, for each frequency).

        Args:
            images: batches of x [B, C, H, W] in model space, and classes int64 [B] or None.
        """
        shape = self.power.shape[1:]
        classes = len(self.mean) - 1
        sums = torch.zeros(classes + 1, *shape, dtype=torch.float64)
        counts = torch.zeros(classes + 1, dtype=torch.float64)
        products = torch.zeros(shape[0], *shape, dtype=torch.float64)
        for x, labels in images:
            y = block_dct(x.to("cpu", torch.float64), shape[-1])
            known = torch.full((len(y),), classes)
            if classes and labels is not None:
                known = labels.cpu().where(labels.cpu() >= 0, classes)
            sums.index_add_(0, known, y)
            counts.index_add_(0, known, torch.ones(len(y), dtype=torch.float64))
            products += torch.einsum("bchw,bdhw->cdhw", y, y)
        total = counts.sum().clamp(min=1)
        overall = sums.sum(0) / total
        spread = products / total - overall[:, None] * overall[None]
        _, axes = torch.linalg.eigh(spread.sum(dim=(2, 3)))
        plain = _along(axes, spread).clamp(min=0)
        overall = _turned(axes.T, _towards_flat(_turned(axes, overall), plain, total))
        means, power = self._of_classes(axes, overall, plain, sums[:classes], counts[:classes])
        both = torch.cat([means, overall[None]])
        self.mean.copy_(block_idct(both, shape[-1]))
        self.axes.copy_(axes)
        self.power.copy_(torch.stack([power, plain]))

    def _of_classes(
        self, axes: Tensor, overall: Tensor, plain: Tensor, sums: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Means of the classes, and the variances about them; all of the cosine transform."""
        present = counts > 0
        if not present.any():
            return overall.expand_as(sums), plain
        number = counts.clamp(min=1)[:, None, None, None]
        means = torch.where(present[:, None, None, None], sums / number, overall)
        share = (counts / counts.sum())[:, None, None, None]
        turned = _turned(axes, means - overall)
        between = (share * turned.square()).sum(0)
        within = (plain - between).clamp(min=0)
        chance = within * (int(present.sum()) - 1) / counts.sum()
        real = (between - chance).clamp(min=0)
        kept = real / (real + within / number).clamp(min=_FLOOR)
        lost = (share * ((1 - kept) * turned).square()).sum(0)
        return overall + _turned(axes.T, kept * turned), within + lost

    def forward(self, z: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best linear estimate of x [B, C, H, W], and the expected size of its error, [B].

        Args:
            z: noised images, float32 [B, C, H, W].
            sigma: their noise levels, float32 [B].
            labels: classes int64 [B], -1 for none; or None.

        Raises:
            TesseraError: the images are of another size.
        """
        side = self.power.shape[-1]
        if z.shape[-2:] != self.power.shape[-2:]:
            height, width = z.shape[-2:]
            raise TesseraError(
                f"this model begins with a linear estimate of {side}x{side} images, and cannot "
                f"make parts of images or others, such as {height}x{width}. Leave out what changes "
                "the size, take layout=windows, or train with preconditioning.kind=edm"
            )
        if labels is None or len(self.mean) == 1:
            mean, power = self.mean[-1:], self.power[1:]
        else:
            mean = self.mean[labels]  # -1 is the last one: of all images
            power = self.power[(labels < 0).long()]
        power = power.clamp(min=_FLOOR)
        noise = column(sigma, z).square()
        gain = power / (power + noise)
        turned = torch.einsum("dc,bdhw->bchw", self.axes, z - mean)
        known = block_idct(gain * block_dct(turned, side), side)
        estimate = mean + torch.einsum("cd,bdhw->bchw", self.axes, known)
        return estimate, (gain * noise).mean(dim=(1, 2, 3)).sqrt()


def _turned(axes: Tensor, x: Tensor) -> Tensor:
    """Coordinates of colours along axes, of x [..., C, H, W]."""
    return torch.einsum("dc,...dhw->...chw", axes, x)


def _along(axes: Tensor, covariance: Tensor) -> Tensor:
    """Variances [C, H, W] along axes, of covariances [C, C, H, W] of colours."""
    return torch.einsum("ac,bc,abhw->chw", axes, axes, covariance)


def _towards_flat(mean: Tensor, power: Tensor, count: Tensor) -> Tensor:
    """The mean image with less of what may be chance; its mean colour is kept."""
    square = mean.square()
    kept = (1 - power / count / square.clamp(min=_FLOOR)).clamp(min=0)
    kept[:, 0, 0] = 1
    return kept * mean


class LinearDenoiser(Preconditioned):
    """The best linear denoiser of the training images, and a network for the rest.

    D(z; σ) = L(z; σ) + e(σ) F(c_in z, L / σ_d; c_noise), with the linear estimate L, the expected
    size e of its error, and EDM's c_in and c_noise. While a network's last layer is zero, it is
    linear.

    Args:
        network: has a module `statistics` (`LinearStatistics`); see `Preconditioned` for the rest.
        preconditioning: EDM's.
        shape, num_classes: see `Preconditioned`.
        shown: whether the network sees L as further channels of its input.
    """

    def __init__(
        self,
        network: nn.Module,
        preconditioning: Edm,
        shape: tuple[int, int, int],
        num_classes: int,
        shown: bool,
    ) -> None:
        super().__init__(network, preconditioning, shape, num_classes)
        self._shown, self._spread = shown, preconditioning.sigma_data
        # Parts of the network have none of their own.
        self._statistics = (cast(LinearStatistics, network.statistics),)

    def begin(self, images: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        self.statistics.measure(images)

    @property
    def statistics(self) -> LinearStatistics:
        """What was measured of the training images."""
        return self._statistics[0]

    def of_means(self, z: Tensor, sigma: Tensor, cond: Conditioning, factor: int) -> Posterior:
        """Estimate x by L(z; σ) of all pixels, and by a network that sees the means of blocks.

        D(z; σ) = L(z; σ) + e(σ) enlarge_means(F(c_in z̄, L̄ / σ_d; c_noise), f) with means z̄ and L̄,
        and c_in and c_noise of σ / f: only what is added to the linear estimate is coarse.
        """
        with full_precision(z.device):
            sigma = sigma.to(z.device, torch.float32, non_blocking=True).reshape(-1)
            estimate, error = self.statistics(z, sigma.expand(len(z)), cond.labels)
            c = self.preconditioning.coefficients(sigma / factor)
            inputs = [c.input[:, None, None, None] * block_means(z, factor)]
            if self._shown:
                inputs.append(block_means(estimate, factor) / self._spread)
        raw = self.network(torch.cat(inputs, dim=1), c.noise.expand(len(z)), cond)
        with full_precision(z.device):
            outputs = raw if isinstance(raw, tuple) else (raw,)
            large = (enlarge_means(output.to(torch.float32), factor) for output in outputs)
            *stages, mean = (torch.addcmul(estimate, column(error, z), f) for f in large)
            return Posterior(mean, None, tuple(stages))

    def _around_network(
        self, z: Tensor, sigma: Tensor, c: Coefficients, cond: Conditioning
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        _, _, inputs = super()._around_network(z, sigma, c, cond)
        estimate, error = self.statistics(z, sigma.expand(len(z)), cond.labels)
        if self._shown:
            inputs.append(estimate / self._spread)
        return estimate, column(error, z), inputs
