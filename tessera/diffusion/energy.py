"""Energies of denoisers, and descent on them.

A denoiser around an `EnergyNetwork` is the gradient of a scalar V(z; σ, class). V is scaled such
that its gradient at x_t = z / √(1 + σ²), the variance-preserving form of z, is the denoiser's
estimate of the noise, (z - D) / σ. For networks that predict the noise, V is m E, the network's
energy times its multiplier. Guidance mixes energies as it mixes estimates.

A step of descent is x_t - α (noise), as in iterative reasoning by energies (Du et al. 2024).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Required, TypedDict

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, EnergyNetwork, column

Clamp = Literal["none", "clean", "noisy"]
"""What is done to x_t after each step of descent: nothing, or cut to ±2 √ᾱ, the range of an image
without noise (as the released code does, which wipes noisy ones), or to ±(2 √ᾱ + 4 √(1 - ᾱ))."""

MOST_STEPS = 10


class Landscape(NamedTuple):
    """Where a batch stands.

    Attributes:
        energy: V, [B].
        noise: its gradient at x_t, the estimate of the noise, [B, C, H, W].
    """

    energy: Tensor
    noise: Tensor


def landscape(denoiser: Denoiser, z: Tensor, sigma: Tensor, cond: Conditioning) -> Landscape:
    """Energy and its gradient at z [B, C, H, W] and noise levels σ [B], in z's dtype.

    Costs one evaluation of the denoiser. Differentiable where gradients are enabled.

    Raises:
        TesseraError: the denoiser is no gradient of an energy.
    """
    energy, mean = denoiser.value(z, sigma, cond, gradient=True)
    assert mean is not None
    return Landscape(energy, (z - mean) / column(sigma, z))


def energy(denoiser: Denoiser, z: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """V [B] at z [B, C, H, W] and noise levels σ [B]; half the cost of `landscape`.

    Raises:
        TesseraError: see `landscape`.
    """
    return denoiser.value(z, sigma, cond, gradient=False).energy


def energy_network(denoiser: Denoiser, sigma: float = 0.0) -> EnergyNetwork:
    """The network of a denoiser, which has an energy; of experts, that at noise level σ.

    Raises:
        TesseraError: it has none.
    """
    return denoiser.energy_network(sigma)


def adaptive_steps(time: Tensor, base: int) -> Tensor:
    """Steps of descent at time t / T in [0, 1]: base (1 + 2 t / T) rounded down, 1 to 10; int64."""
    return (base * (1 + 2 * time.to(torch.float64))).long().clamp(1, MOST_STEPS)


def bounds(clamp: Clamp, sigma: Tensor) -> Tensor | None:
    """Largest absolute value of z that `clamp` allows at noise levels σ, shaped like σ."""
    return {"none": None, "clean": torch.full_like(sigma, 2), "noisy": 2 + 4 * sigma}[clamp]


class Descent(NamedTuple):
    """Where a descent ended.

    Attributes:
        z: [B, C, H, W].
        energies: V before each step, and after the last one if that was evaluated, [steps (+1), B].
        accepted: steps that each image took, int64 [B].
    """

    z: Tensor
    energies: Tensor
    accepted: Tensor


class DescentOptions(TypedDict, total=False):
    """The keyword arguments of `descend` that all who descend pass on."""

    step_size: Required[float | Tensor]
    steps: Required[int | Tensor]
    clamp: Clamp


def descend(
    denoiser: Denoiser,
    z: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    *,
    step_size: float | Tensor,
    steps: int | Tensor,
    clamp: Clamp = "none",
    reject: bool = True,
    final: bool = False,
    stop_early: bool = False,
) -> Descent:
    """Gradient descent on the energy at noise levels σ [B]: x_t - α (noise), step by step.

    Each step costs one evaluation of energy and gradient, and rejection one of the energy in all.
    With gradients enabled, the path can be differentiated by parameters, z and the step size.

    Args:
        step_size: α; negative to ascend.
        steps: for all images, or of each, int64 [B]; then all make the steps of the most patient
            one, or `MOST_STEPS`, and the others stay where they are.
        clamp: see `Clamp`.
        reject: an image does not take a step that would raise its energy. As it would try the same
            one again, it stays there.
        final: evaluate the energy after the last step also without rejection.
        stop_early: end when no image moves any more, which must be asked for at every step.
    """
    count = steps if isinstance(steps, int) else MOST_STEPS
    if isinstance(steps, Tensor) and stop_early:
        count = int(steps.max())
    scale, limit = column((1 + sigma**2).sqrt(), z), bounds(clamp, sigma)
    edge = None if limit is None else column(limit, z)
    allowed = torch.full_like(sigma, count) if isinstance(steps, int) else steps
    allowed = allowed.to(z.device)
    here = landscape(denoiser, z, sigma, cond)
    energies, accepted = [here.energy], torch.zeros(len(z), dtype=torch.int64, device=z.device)
    active = torch.ones(len(z), dtype=torch.bool, device=z.device)
    for step in range(count):
        moved = z - step_size * scale * here.noise
        moved = moved if edge is None else moved.clamp(-edge, edge)
        take = active & (step < allowed)
        last = step == count - 1
        there = here
        if not last:
            there = landscape(denoiser, moved, sigma, cond)
        elif reject or final:
            there = Landscape(energy(denoiser, moved, sigma, cond), here.noise)
        if reject:
            take = active = take & (there.energy <= here.energy)
        accepted = accepted + take
        z = torch.where(take[:, None, None, None], moved, z)
        here = Landscape(
            torch.where(take, there.energy, here.energy),
            torch.where(take[:, None, None, None], there.noise, here.noise),
        )
        if not last or reject or final:
            energies.append(here.energy)
        if stop_early and not bool(take.any()):
            break
    return Descent(z, torch.stack(energies), accepted)
