"""Energies of denoisers, and descent on them.

A denoiser around an `EnergyNetwork` is the gradient of a scalar V(z; σ, class). V is scaled such
that its gradient at x_t = z / √(1 + σ²), the variance-preserving form of z, is the denoiser's
estimate of the noise, (z - D) / σ. For networks that predict the noise, V is m E, the network's
energy times its multiplier. Guidance mixes energies as it mixes estimates.

A step of descent is x_t - α (noise), as in iterative reasoning by energies (Du et al. 2024).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from tessera.conditioning import NO_CLASS, Conditioning
from tessera.diffusion.denoiser import Denoiser, Wrapper
from tessera.diffusion.discrete import Discrete
from tessera.diffusion.experts import Experts
from tessera.diffusion.guidance import Guided
from tessera.diffusion.preconditioning import Preconditioned
from tessera.diffusion.schedules import vp_time
from tessera.errors import TesseraError

Clamp = Literal["none", "clean", "noisy"]
"""What is done to x_t after each step of descent: nothing, or cut to ±2 √ᾱ, the range of an image
without noise (as the released code does, which wipes noisy ones), or to ±(2 √ᾱ + 4 √(1 - ᾱ))."""

MOST_STEPS = 10


class EnergyNetwork(Protocol):
    """A network whose output is `multiplier` times the gradient of its energy."""

    multiplier: float

    @property
    def step_size(self) -> Tensor:
        """Of descent, 0-dim."""
        ...

    def energy(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """E [B]."""
        ...

    def energy_and_output(
        self, x: Tensor, noise: Tensor, cond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """E [B] and the output [B, C, H, W]."""
        ...


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
    energy, mean = _evaluate(denoiser, z, sigma, cond, gradient=True)
    assert mean is not None
    return Landscape(energy, (z - mean) / column(sigma, z))


def energy(denoiser: Denoiser, z: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """V [B] at z [B, C, H, W] and noise levels σ [B]; half the cost of `landscape`.

    Raises:
        TesseraError: see `landscape`.
    """
    return _evaluate(denoiser, z, sigma, cond, gradient=False)[0]


def _evaluate(
    denoiser: Denoiser, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """V [B] and, if asked for, the estimate of the image, in z's dtype."""
    if isinstance(denoiser, Guided):
        return _guided(denoiser, z, sigma, cond, gradient=gradient)
    if isinstance(denoiser, Experts):
        return _routed(denoiser, z, sigma, cond, gradient=gradient)
    if not isinstance(denoiser, Preconditioned):
        raise TesseraError(
            f"energies cannot be followed through a denoiser of kind {type(denoiser).__name__}. "
            "Leave out the refinement"
        )
    network = energy_network(denoiser)
    watched = _Watched(network, gradient)
    mean = denoiser.around(watched)(z, sigma, cond).mean.to(z.dtype)
    assert watched.energy is not None
    # V = ((1 - c_skip) |z|² / 2 - m E c_out / c_in) / (σ √(1 + σ²)), whose gradient at z is
    # (z - D) / (σ √(1 + σ²)).
    sigma = sigma.to(z.device, torch.float32)
    c = denoiser.preconditioning.coefficients(sigma)
    skip, factor, sigma = (t.to(z.dtype) for t in (c.skip, -c.out / c.input, sigma))
    own = factor * network.multiplier * watched.energy.to(z.dtype)
    quadratic = (1 - skip) * z.square().sum(dim=(1, 2, 3)) / 2
    value = (quadratic + own) / (sigma * (1 + sigma**2).sqrt())
    return value, mean if gradient else None


class _Watched(nn.Module):
    """In an energy network's place in its denoiser: keeps the energy beside the output.

    Without the gradient, the output is zeros.
    """

    def __init__(self, network: EnergyNetwork, gradient: bool) -> None:
        super().__init__()
        self._network, self._gradient = [network], gradient
        self.energy: Tensor | None = None

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        if self._gradient:
            self.energy, output = self._network[0].energy_and_output(x, noise, cond)
            return output
        self.energy = self._network[0].energy(x, noise, cond)
        return torch.zeros_like(x)


def _guided(
    denoiser: Guided, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """V = V_ref + w (V_c - V_ref), and the same of the estimates."""
    if denoiser.channels is not None:
        raise TesseraError(
            "guidance of some channels only follows no energy. Leave out guidance_channels, or the "
            "refinement"
        )
    inner, weak = denoiser.denoiser, denoiser.weak
    if weak is None and cond.labels is None:
        return _evaluate(inner, z, sigma, cond, gradient=gradient)
    low, high = denoiser.interval or (0.0, float("inf"))
    scale = torch.where((sigma >= low) & (sigma <= high), denoiser.scale, 1.0).to(z.device, z.dtype)
    if (denoiser.interval is not None and (scale == 1).all()) or denoiser.scale == 1:
        return _evaluate(inner, z, sigma, cond, gradient=gradient)
    if weak is None:
        both = cond.map(lambda tensor: torch.cat([tensor, tensor]))
        assert both.labels is not None
        both.labels[len(z) :] = NO_CLASS
        energies, means = _evaluate(
            inner, torch.cat([z, z]), torch.cat([sigma, sigma]), both, gradient=gradient
        )
        (own, reference) = energies.chunk(2)
        (mean, other) = (None, None) if means is None else means.chunk(2)
    else:
        own, mean = _evaluate(inner, z, sigma, cond, gradient=gradient)
        reference, other = _evaluate(weak, z, sigma, cond, gradient=gradient)
    value = reference + scale * (own - reference)
    if mean is None or other is None:
        return value, None
    return value, other + column(scale, z) * (mean - other)


def _routed(
    denoiser: Experts, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Each image by the expert of its noise level."""
    owner = denoiser.owner(sigma)
    value = z.new_zeros(len(z))
    mean = torch.zeros_like(z) if gradient else None
    for number, expert in enumerate(denoiser.denoisers()):
        rows = (owner == number).nonzero()[:, 0]
        if not len(rows):
            continue
        here = rows.to(z.device)
        own, estimate = _evaluate(expert, z[here], sigma[rows], cond[here], gradient=gradient)
        value = value.index_copy(0, here, own)
        if mean is not None and estimate is not None:
            mean = mean.index_copy(0, here, estimate)
    return value, mean


def innermost(denoiser: Denoiser, sigma: float = 0.0) -> Preconditioned:
    """The denoiser inside of all wrappers; of experts, the one at noise level σ.

    Raises:
        TesseraError: there is none around a network.
    """
    while isinstance(denoiser, Wrapper | Experts):
        if isinstance(denoiser, Wrapper):
            denoiser = denoiser.denoiser
        else:
            level = torch.tensor(sigma, dtype=torch.float64)
            denoiser = denoiser.denoisers()[int(denoiser.owner(level))]
    if not isinstance(denoiser, Preconditioned):
        raise TesseraError("only a denoiser around a network can have an energy")
    return denoiser


def energy_network(denoiser: Denoiser, sigma: float = 0.0) -> EnergyNetwork:
    """The network of a denoiser, which has an energy; of experts, see `innermost`.

    Raises:
        TesseraError: it has none.
    """
    network: Any = innermost(denoiser, sigma).network
    if not hasattr(network, "energy_and_output"):
        raise TesseraError(
            "this model has no energy to descend on: its network is a "
            f"{type(network).__name__}. Choose an energy network (network.kind=energy_dit), or "
            "leave out the refinement and the terms of energies"
        )
    return cast(EnergyNetwork, network)


def adaptive_steps(time: Tensor, base: int) -> Tensor:
    """Steps of descent at time t / T in [0, 1]: base (1 + 2 t / T) rounded down, 1 to 10; int64."""
    return (base * (1 + 2 * time.to(torch.float64))).long().clamp(1, MOST_STEPS)


def time_of(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    """t / T of noise levels σ, float64; T counts all steps of the process trained on.

    For denoisers of a continuous range, that of the linear schedule in continuous time.
    """
    scaling = innermost(denoiser).preconditioning
    if isinstance(scaling, Discrete):
        steps = torch.tensor(scaling.steps, dtype=torch.float64, device=sigma.device)
        return steps[scaling.index(sigma)] / scaling.timesteps
    return vp_time(sigma.to(torch.float64), 19.9, 0.1).clamp(0, 1)


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


def column(values: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1] of the dtype and on the device of x."""
    return values.to(x.device, x.dtype)[:, None, None, None]
