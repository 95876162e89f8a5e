"""What energies are trained on beside the denoising: a contrastive term, and the step size.

A loss of images is the sum of the denoising loss, of the contrast between the energies of clean
images and of what descent makes of disturbed ones, and of how a descent goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.corruption import GAUSSIAN
from tessera.diffusion.denoiser import Denoiser, column
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.energy import (
    Clamp,
    DescentOptions,
    adaptive_steps,
    descend,
    energy,
    energy_network,
)
from tessera.diffusion.objectives import DenoisingObjective, Reduction
from tessera.errors import TesseraError
from tessera.randomness import Draws


def contrastive(
    denoiser: Denoiser,
    x: Tensor,
    cond: Conditioning,
    sigma: Tensor,
    noise: Tensor,
    shift: Tensor,
    *,
    reject: bool = True,
    **descent: Unpack[DescentOptions],
) -> Tensor:
    """softplus(E⁺ - E⁻), [B]: clean images x must have less energy than what descent makes.

    The negatives are x + 3 `shift`, noised, after descent, cut to the range of images and noised by
    the same `noise` again. E is in the network's own scale, V / m.

    Args:
        noise, shift: unit normal, like x.
        reject, descent: see `descend`.
    """
    level = column(sigma, x)
    with torch.no_grad():
        start = x + 3 * shift + level * noise
        path = descend(denoiser, start, sigma, cond, reject=reject, **descent)
        end = path.z.clamp(-2, 2)
    both = torch.cat([x, end]) + torch.cat([level * noise] * 2)
    twice = cond.map(lambda tensor: torch.cat([tensor, tensor]))
    values = energy(denoiser, both, torch.cat([sigma, sigma]), twice)
    positive, negative = (values / energy_network(denoiser).multiplier).chunk(2)
    return F.softplus(positive - negative)


def refinement_energies(
    denoiser: Denoiser,
    z: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    **descent: Unpack[DescentOptions],
) -> Tensor:
    """E before each step of a descent from z, and after the last one, [S + 1, B].

    Every step is taken. The path can be differentiated, also by the step size. E is in the
    network's own scale, V / m.

    Args:
        descent: see `descend`.
    """
    path = descend(denoiser, z, sigma, cond, reject=False, final=True, **descent)
    return path.energies / energy_network(denoiser).multiplier


def refinement_loss(energies: Tensor, steps: Tensor | None = None) -> Tensor:
    """sigmoid((-sum of the drops + var(drops) / 10) / their number), [B]: steep and even descent.

    Args:
        energies: along a path, [S + 1, B], with S of 2 or more.
        steps: how many of them count for each image, int64 [B]; None for all.
    """
    drops = energies[:-1] - energies[1:]
    number = torch.arange(len(drops), device=drops.device)[:, None]
    count = torch.full_like(drops[0], len(drops)) if steps is None else steps.to(drops.dtype)
    mask = number < count
    total = (drops * mask).sum(dim=0)
    variance = ((drops - total / count).square() * mask).sum(dim=0) / (count - 1)
    return torch.sigmoid((0.1 * variance - total) / count)


@dataclass(frozen=True)
class EnergyTerms:
    """What an energy is trained on beside the denoising.

    Args:
        contrastive: weight of the contrastive term; 0 for none.
        refinement: weight of the refinement loss, which trains the learned step size; 0 for none.
        contrastive_steps, refinement_steps: of descent; None: more at higher noise, from 5 to 10
            and from 2 to 5.
        clamp: while descending, see `Clamp`.
        refines: "all", or "step_size" to keep the refinement loss from making energies steeper.
    """

    contrastive: float = 0.0
    refinement: float = 0.0
    contrastive_steps: int | None = None
    refinement_steps: int | None = None
    clamp: Clamp = "none"
    refines: Literal["all", "step_size"] = "all"


class EnergyObjective(nn.Module):
    """A denoising objective and the terms of an energy, at the same noise levels and classes.

    The terms of images are relative to a denoising loss that is the mean over pixels.

    Args:
        base: the denoising objective, of continuous or discrete noise levels.
        terms: what is added.

    Raises:
        TesseraError: a corruption of which energies know nothing, or too few steps.
    """

    def __init__(self, base: DenoisingObjective | DiscreteObjective, terms: EnergyTerms) -> None:
        super().__init__()
        if base.corruption is not GAUSSIAN:
            raise TesseraError("the terms of energies are those of white noise, not of blurring")
        if terms.refinement and terms.refinement_steps is not None and terms.refinement_steps < 2:
            raise TesseraError(
                f"refinement_steps={terms.refinement_steps}: the loss compares drops of the "
                "energy, and needs 2 steps or more"
            )
        self.base, self.terms = base, terms

    @property
    def reduction(self) -> Reduction:
        """That of the denoising objective."""
        return self.base.reduction

    def forward(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, draws: Draws
    ) -> dict[str, Tensor]:
        """Terms of clean images x [B, C, H, W], each [B]: those of the base, and "contrastive" and
        "refinement" without their weights; "loss" is the weighted sum.

        Draws what the base draws, and "contrastive_noise", "contrastive_shift" and
        "refinement_noise".

        Raises:
            TesseraError: the model has no energy, or no step size to learn.
        """
        # Before the base notes the losses by which it draws.
        sigma = self._sigma(denoiser, x, draws)
        loss_terms: dict[str, Tensor] = self.base(denoiser, x, cond, draws)
        if self.base.label_dropout > 0:
            cond = cond.drop_labels(draws.uniform("label_dropout") < self.base.label_dropout)
        extra: dict[str, Tensor] = {}
        if self.terms.contrastive:
            extra["contrastive"] = self._contrastive(denoiser, x, cond, sigma, draws)
        if self.terms.refinement:
            extra["refinement"] = self._refinement(denoiser, x, cond, sigma, draws)
        pixels = x[0].numel() if self.reduction == "sum" else 1
        loss = loss_terms["loss"]
        for name, value in extra.items():
            loss = loss + getattr(self.terms, name) * pixels * value
        return {**loss_terms, **extra, "loss": loss}

    def _sigma(self, denoiser: Denoiser, x: Tensor, draws: Draws) -> Tensor:
        if isinstance(self.base, DiscreteObjective):
            return self.base.sigma(denoiser, x.device, draws)
        return self.base.sigma(draws)

    def _contrastive(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, sigma: Tensor, draws: Draws
    ) -> Tensor:
        steps = self.terms.contrastive_steps
        return contrastive(
            denoiser,
            x,
            cond,
            sigma,
            draws.normal("contrastive_noise", *x.shape[1:]),
            draws.normal("contrastive_shift", *x.shape[1:]),
            step_size=energy_network(denoiser).step_size.detach(),
            steps=adaptive_steps(denoiser.time(sigma), 5) if steps is None else steps,
            clamp=self.terms.clamp,
        )

    def _refinement(
        self, denoiser: Denoiser, x: Tensor, cond: Conditioning, sigma: Tensor, draws: Draws
    ) -> Tensor:
        alpha = energy_network(denoiser).step_size
        if not alpha.requires_grad and torch.is_grad_enabled():
            raise TesseraError(
                "the refinement loss trains the step size, and this model's is fixed. Set "
                "network.learn_step_size=true, or the weight of the refinement to 0"
            )
        z = x + column(sigma, x) * draws.normal("refinement_noise", *x.shape[1:])
        steps: int | Tensor | None = self.terms.refinement_steps
        if steps is None:
            steps = adaptive_steps(denoiser.time(sigma), 2)
        path = refinement_energies(
            denoiser, z, sigma, cond, step_size=alpha, steps=steps, clamp=self.terms.clamp
        )
        loss = refinement_loss(path, None if isinstance(steps, int) else steps)
        return _only_by(alpha, loss) if self.terms.refines == "step_size" else loss


def _only_by(alpha: Tensor, loss: Tensor) -> Tensor:
    """The loss [B], which as a function of anything but the scalar alpha is constant."""
    if not torch.is_grad_enabled():
        return loss
    (slope,) = torch.autograd.grad(loss.sum(), alpha)
    return loss.detach() + (alpha - alpha.detach()) * slope / len(loss)
