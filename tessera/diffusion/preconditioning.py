"""From network to denoiser: D(z; σ) = c_skip z + c_out F(c_in z; c_noise) (EDM, table 1)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.diffusion.denoiser import Denoiser, EnergyNetwork, Posterior, Valued
from tessera.diffusion.means import block_means, enlarge_means
from tessera.diffusion.schedules import iddpm_table, vp_sigma
from tessera.errors import TesseraError
from tessera.networks.layers import full_precision


class Coefficients(NamedTuple):
    """The four functions of σ, each shaped like σ."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Preconditioning(Protocol):
    """How a network's input and output are scaled, and which noise levels it was made for."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip, c_out, c_in and c_noise at noise levels σ (float32)."""
        ...

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest supported noise level, of the same dtype and shape."""
        ...


@dataclass(frozen=True)
class Edm:
    """EDM (Karras et al. 2022): unit variance of the network's input and training target."""

    sigma_data: float = 0.5
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def coefficients(self, sigma: Tensor) -> Coefficients:
        variance = sigma**2 + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / variance,
            out=sigma * self.sigma_data * variance.rsqrt(),
            input=variance.rsqrt(),
            noise=sigma.log() / 4,
        )

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class Vp:
    """Variance preserving (Song et al. 2021); the network predicts the noise.

    Args:
        beta_d, beta_min: of the schedule σ(t).
        timesteps: M; the network's noise label runs from 0 to M - 1.
        epsilon_t: smallest time trained on; its σ is `sigma_min`.
        released_sigma_min: let `sigma_min` be 2^-10, the value that float32 cancellation leaves
            for ε_t = 1e-5 in the released baselines, instead of the exact 0.0010005.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    timesteps: int = 1000
    epsilon_t: float = 1e-5
    released_sigma_min: bool = False

    @property
    def sigma_min(self) -> float:
        return 2.0**-10 if self.released_sigma_min else self._sigma(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        return self._sigma(1.0)

    def _sigma(self, t: float) -> float:
        time = torch.tensor(t, dtype=torch.float64, device="cpu")
        return vp_sigma(time, self.beta_d, self.beta_min).item()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        # The label is float32 with log(1 + σ²), not the exact `vp_time`: Fourier embeddings
        # magnify its rounding, and the released networks know the rounded labels.
        log = (1 + sigma**2).log()
        time = ((self.beta_min**2 + 2 * self.beta_d * log).sqrt() - self.beta_min) / self.beta_d
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            input=(sigma**2 + 1).rsqrt(),
            noise=(self.timesteps - 1) * time,
        )

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class Ve:
    """Variance exploding (Song et al. 2021)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        return Coefficients(skip=one, out=sigma, input=one, noise=(0.5 * sigma).log())

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class Iddpm:
    """Improved DDPM (Nichol & Dhariwal 2021): the network knows M noise levels only.

    Args:
        c_1, c_2: of the cosine schedule's table, see `iddpm_table`.
        timesteps: M.
    """

    c_1: float = 0.001
    c_2: float = 0.008
    timesteps: int = 1000

    @property
    def sigma_min(self) -> float:
        return float(self.table(torch.device("cpu"))[-2])

    @property
    def sigma_max(self) -> float:
        return float(self.table(torch.device("cpu"))[0])

    @property
    def levels(self) -> Tensor:
        """The supported noise levels that are not 0, float64 [M] on the CPU, rising."""
        return self.table(torch.device("cpu"))[:-1].flip(0).to(torch.float64)

    def table(self, device: torch.device) -> Tensor:
        """The supported noise levels, float32 [M + 1], falling to 0."""
        return _table_on(self, device)

    def index(self, sigma: Tensor) -> Tensor:
        """Position of the nearest entry of the table, int64, shaped like σ."""
        distance = sigma.to(torch.float32)[..., None] - self.table(sigma.device)
        return distance.abs().argmin(dim=-1)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=-sigma,
            input=(sigma**2 + 1).rsqrt(),
            noise=(self.timesteps - 1 - self.index(sigma)).to(torch.float32),
        )

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.table(sigma.device)[self.index(sigma)].to(sigma.dtype)


@lru_cache
def _table_on(preconditioning: Iddpm, device: torch.device) -> Tensor:
    """Kept for each device, because a copy from the host would make every call wait."""
    c = preconditioning
    return iddpm_table(c.timesteps, c.c_1, c.c_2, torch.float32).to(device)


class Preconditioned(Denoiser):
    """A network and its preconditioning: the denoiser of Gaussian corruption.

    Everything but the network runs in float32, outside of autocast. A low-resolution image of the
    conditioning is enlarged and follows the scaled input as further channels. Of a network with
    more output channels than the images have (learned variances), the first ones are used. Of a
    network that returns several outputs (a stack of bricks while it is trained), the last one gives
    the mean, the others the stages.

    Args:
        network: (input [B, C, H, W], noise [B], `Conditioning`) to raw output [B, >= C, H, W], or
            to a tuple of such.
        preconditioning: the scaling.
        shape: (C, H, W) of the images trained on.
        num_classes: number of classes that the network knows.
    """

    def __init__(
        self,
        network: nn.Module,
        preconditioning: Preconditioning,
        shape: tuple[int, int, int],
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning
        self.shape = shape
        self.num_classes = num_classes
        self.sigma_min = preconditioning.sigma_min
        self.sigma_max = preconditioning.sigma_max

    def around(self, network: nn.Module) -> Self:
        """The same denoiser around another network, such as a part of its own."""
        other = copy.copy(self)
        other._modules = {**self._modules, "network": network}
        return other

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """Estimate x from z [B, C, H, W] at noise levels σ, [B] or one number for all."""
        with full_precision(z.device):
            z = z.to(torch.float32)
            sigma = sigma.to(z.device, torch.float32, non_blocking=True).reshape(-1)
            c = self.preconditioning.coefficients(sigma)
            known, size, inputs = self._around_network(z, sigma, c, cond)
            if cond.image is not None:
                image = cond.image.to(z.device, torch.float32)
                sides = (z.shape[-2], z.shape[-1])
                inputs.append(F.interpolate(image, sides, mode="bilinear", align_corners=False))
            scaled = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
        raw = self.network(scaled, c.noise.expand(len(z)), cond)
        with full_precision(z.device):
            *stages, mean = (
                torch.addcmul(known, size, f[:, : z.shape[1]].to(torch.float32))
                for f in (raw if isinstance(raw, tuple) else (raw,))
            )
            last = raw[-1] if isinstance(raw, tuple) else raw
            return Posterior(mean, self._log_variance(last, sigma), tuple(stages))

    def of_means(self, z: Tensor, sigma: Tensor, cond: Conditioning, factor: int) -> Posterior:
        """Estimate x from the means of blocks of z, which have noise of level σ / f.

        D(z; σ) = enlarge_means(D(means of z; σ / f), f).

        Args:
            z, sigma: as of a call, float32.
            cond: as of a call, with the coordinates of the means.
            factor: side f of the blocks, pixels.
        """
        seen: Posterior = self(block_means(z, factor), sigma / factor, cond)
        stages = tuple(enlarge_means(stage, factor) for stage in seen.stages)
        return Posterior(enlarge_means(seen.mean, factor), None, stages)

    def _around_network(
        self, z: Tensor, sigma: Tensor, c: Coefficients, cond: Conditioning
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the output is added to, the factor of the output, and the parts of the input."""
        skip, out, scale = (v[:, None, None, None] for v in (c.skip, c.out, c.input))
        return skip * z, out, [scale * z]

    def _log_variance(self, raw: Tensor, sigma: Tensor) -> Tensor | None:
        """Log variance of the reverse step, of networks that learn it, from their raw output."""
        return None

    def value(self, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool) -> Valued:
        """V = ((1 - c_skip) |z|² / 2 - m E c_out / c_in) / (σ √(1 + σ²)), [B].

        Its gradient at z is (z - D) / (σ √(1 + σ²)).
        """
        network = self.energy_network()
        watched = _Watched(network, gradient)
        mean = self.around(watched)(z, sigma, cond).mean.to(z.dtype)
        assert watched.energy is not None
        sigma = sigma.to(z.device, torch.float32)
        c = self.preconditioning.coefficients(sigma)
        skip, factor, sigma = (t.to(z.dtype) for t in (c.skip, -c.out / c.input, sigma))
        own = factor * network.multiplier * watched.energy.to(z.dtype)
        quadratic = (1 - skip) * z.square().sum(dim=(1, 2, 3)) / 2
        energy = (quadratic + own) / (sigma * (1 + sigma**2).sqrt())
        return Valued(energy, mean if gradient else None)

    def check_energy(self) -> None:
        self.energy_network()

    def energy_network(self, sigma: float = 0.0) -> EnergyNetwork:
        network: Any = self.network
        if not hasattr(network, "energy_and_output"):
            raise TesseraError(
                "this model has no energy to descend on: its network is a "
                f"{type(network).__name__}. Choose an energy network (network.kind=energy_dit), or "
                "leave out the refinement and the terms of energies"
            )
        return cast(EnergyNetwork, network)

    @property
    def levels(self) -> Tensor | None:
        c = self.preconditioning
        return c.levels if isinstance(c, Iddpm) else None

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest supported noise level; keeps dtype and shape."""
        return self.preconditioning.round_sigma(sigma)


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
