"""Training on the steps of a discrete process: weighted squared errors, variance and KL terms.

Luhman & Luhman 2022; Nichol & Dhariwal 2021 (hybrid loss, choice of steps by their past losses).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tessera import distributed
from tessera.conditioning import Conditioning
from tessera.diffusion.corruption import GAUSSIAN, Corruption
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.discrete import Process
from tessera.diffusion.objectives import EVERYWHERE, Reduction
from tessera.diffusion.variational import Bound
from tessera.errors import TesseraError
from tessera.randomness import Draws

Weight = Literal["sqrt_snr", "p2", "snr", "snr+1", "truncated_snr"]


def weights(process: Process, name: Weight) -> Tensor:
    """Weight of the squared error of x at each step; float64 [N].

    sqrt_snr: √SNR; p2: SNR √(1 - ᾱ) (P2 weighting with k = 1, γ = ½); snr: plain error of the
    noise; snr+1: of v; truncated_snr: max(SNR, 1).
    """
    snr = process.snr
    return {
        "sqrt_snr": snr.sqrt(),
        "p2": snr * (1 - process.alpha_bar).sqrt(),
        "snr": snr,
        "snr+1": snr + 1,
        "truncated_snr": snr.clamp(min=1),
    }[name]


class LossHistory(nn.Module):
    """The last losses of each step, and the probabilities that follow from them.

    Buffers, so that checkpoints hold them: a resumed run draws the same steps.

    Args:
        steps: N.
        length: losses remembered for each step.
        uniform: share of the probability that is spread evenly.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, steps: int, length: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        self.length, self.uniform = length, uniform
        # The last row takes what is not to be remembered.
        self.register_buffer("losses", torch.zeros(steps + 1, length))
        self.register_buffer("counts", torch.zeros(steps + 1, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Proportional to √(mean of squared losses), or uniform until all are known; [N]."""
        size = self.losses[:-1].square().mean(dim=1).sqrt()
        known = (self.counts[:-1] >= self.length).all() & (size.sum() > 0)
        size = torch.where(known, size, torch.ones_like(size))
        even = known.to(size.dtype) * self.uniform
        return size / size.sum() * (1 - even) + even / len(size)

    @torch.no_grad()
    def update(self, index: Tensor, losses: Tensor) -> None:
        """Remember the losses [B] of steps `index` [B], in this order, of all processes."""
        index, losses = _of_all(index), _of_all(losses.detach().to(self.losses.dtype))
        index = torch.where(losses.isfinite(), index, len(self.losses) - 1)
        same = index[:, None] == index
        position = same.tril(-1).sum(dim=1)  # among the batch's losses of the same step
        total = same.sum(dim=1)
        slot = (self.counts[index] + position) % self.length
        # Of more than `length` losses of a step, the last ones stay.
        row = torch.where(total - position <= self.length, index, len(self.losses) - 1)
        self.losses[row, slot] = losses.nan_to_num()
        self.counts.index_add_(0, index, torch.ones_like(index))


def _of_all(tensor: Tensor) -> Tensor:
    if not distributed.active():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.world())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class DiscreteObjective(nn.Module):
    """Loss of a denoiser at the levels that it knows.

    Of a denoiser that gives several estimates (the bricks of a jointly trained stack), the loss is
    the mean over all of them.

    Args:
        levels: number of noise levels of the denoiser.
        weight: see `weights`.
        loss: "mse", the weighted squared error, plus the variational term for networks that learn
            the variance, in which the mean has no gradient; "kl", the variational term alone;
            "rescaled_kl", that times the number of levels.
        rescale_variance: multiply the variational term of "mse" by levels / 1000.
        timesteps: "uniform", or "loss_second_moment" to draw steps by their past losses, but not
            in `eval` mode: losses are then of the same steps for the same draws.
        small_variance: for networks that learn none, use β̃ instead of β in the "kl" losses.
        label_dropout: share of images trained without their class, for guidance.
        sigma_range: train on noise levels low <= σ < high only, as one of several experts.
        corruption: what makes z of x.
    """

    reduction: ClassVar[Reduction] = "mean"

    def __init__(
        self,
        levels: int,
        *,
        weight: Weight = "sqrt_snr",
        loss: Literal["mse", "kl", "rescaled_kl"] = "mse",
        rescale_variance: bool = False,
        timesteps: Literal["uniform", "loss_second_moment"] = "uniform",
        small_variance: bool = False,
        label_dropout: float = 0.1,
        sigma_range: tuple[float, float] = EVERYWHERE,
        corruption: Corruption = GAUSSIAN,
    ) -> None:
        super().__init__()
        self.weight, self.loss, self.rescale_variance = weight, loss, rescale_variance
        self.small_variance, self.label_dropout = small_variance, label_dropout
        self.sigma_range, self.corruption = sigma_range, corruption
        self.history = LossHistory(levels) if timesteps == "loss_second_moment" else None
        self._tables: _Tables | None = None

    def forward(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, draws: Draws
    ) -> dict[str, Tensor]:
        """Loss terms of clean images x [B, C, H, W], each [B] and a mean over pixels.

        "loss" is optimised; "mse" and, with learned variances, "vb" (bits per dimension) are its
        parts. "quartile", 0 to 3 from the cleanest, is that of the step among those drawn from.
        Draws "timestep", "noise", and "label_dropout" if there is any.

        Raises:
            TesseraError: the denoiser knows a continuous range of noise levels.
        """
        tables = self._tables_for(denoiser, x.device)
        if self.label_dropout > 0:
            cond = cond.drop_labels(draws.uniform("label_dropout") < self.label_dropout)
        index, importance = self._draw(tables, draws)
        sigma = tables.sigmas[index]
        z = self.corruption(x, sigma, draws)
        posterior = denoiser(z, sigma, cond)
        terms: dict[str, Tensor] = {}
        if self.loss == "mse":
            errors = [(d - x).square().mean(dim=(1, 2, 3)) for d in posterior.estimates]
            terms["mse"] = loss = tables.weights[index] * torch.stack(errors).mean(dim=0)
            if posterior.log_variance is not None:
                mean = posterior.mean.detach()
                terms["vb"] = tables.bound.terms(index, x, mean, posterior.log_variance)
                if self.rescale_variance:
                    terms["vb"] = terms["vb"] * (len(tables.sigmas) / 1000)
                loss = loss + terms["vb"]
        else:
            variance = posterior.log_variance
            bounds = [tables.bound.terms(index, x, d, variance) for d in posterior.estimates]
            loss = torch.stack(bounds).mean(dim=0)
            if self.loss == "rescaled_kl":
                loss = loss * len(tables.sigmas)
        if self.history is not None:
            if self.training:
                self.history.update(index, loss)
            loss = loss * importance
        first, count = tables.owned
        quartile = (index - first) * 4 // count
        return {"loss": loss, "loss_per_pixel": loss, **terms, "quartile": quartile}

    def sigma(self, denoiser: Denoiser, device: torch.device, draws: Draws) -> Tensor:
        """The noise levels [B] that the loss of these draws is taken at, before it is taken."""
        tables = self._tables_for(denoiser, device)
        return tables.sigmas[self._draw(tables, draws)[0]]

    def _draw(self, tables: _Tables, draws: Draws) -> tuple[Tensor, Tensor]:
        """Steps [B], and the factors that make up for drawing some more often than others."""
        first, count = tables.owned
        if self.history is None or not self.training:
            return first + draws.integers("timestep", count), tables.weights.new_ones(())
        probabilities = self.history.probabilities()[first : first + count]
        probabilities = probabilities / probabilities.sum()
        ends = probabilities.cumsum(0)
        drawn = draws.uniform("timestep").to(ends.dtype) * ends[-1]
        index = torch.searchsorted(ends, drawn, right=True).clamp(max=count - 1)
        return first + index, 1 / (count * probabilities[index])

    def _tables_for(self, denoiser: Denoiser, device: torch.device) -> _Tables:
        if self._tables is None or self._tables.sigmas.device != device:
            levels = denoiser.levels
            if levels is None:
                raise TesseraError(
                    "the discrete objective needs a model that knows discrete noise levels. Set "
                    "preconditioning.kind=discrete (or iddpm), or choose another objective"
                )
            self._tables = _Tables(self, levels, device)
        return self._tables


class _Tables:
    """What the objective looks up by step, on the device."""

    def __init__(self, own: DiscreteObjective, levels: Tensor, device: torch.device) -> None:
        process = Process.of_sigmas(levels)
        self.sigmas = levels.to(device, torch.float32)
        self.weights = weights(process, own.weight).to(device, torch.float32)
        self.bound = Bound(process, device, own.small_variance)
        self.owned = owned(levels, own.sigma_range)


def owned(levels: Tensor, sigma_range: tuple[float, float]) -> tuple[int, int]:
    """(first, count) of the rising levels with low <= σ < high.

    Raises:
        TesseraError: there are none.
    """
    if sigma_range == EVERYWHERE:
        return 0, len(levels)
    inside = ((levels >= sigma_range[0]) & (levels < sigma_range[1])).nonzero()[:, 0].tolist()
    if not inside:
        raise TesseraError(
            f"the expert owns noise levels {sigma_range[0]:g} to {sigma_range[1]:g}, and the "
            "process has none of them. Choose other snr_splits"
        )
    return inside[0], len(inside)
