"""The contract of samplers, objectives and wrappers: z at noise level σ to an estimate of x."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from tessera.conditioning import Conditioning
from tessera.diffusion.schedules import vp_time
from tessera.errors import TesseraError
from tessera.model import Model


@dataclass(frozen=True)
class Posterior:
    """What a denoiser says about the clean image x given z = A(σ) x + σ n.

    Attributes:
        mean: float32 [B, C, H, W], estimate of x in model space.
        log_variance: float32 [B, C, H, W], log variance of the denoiser's reverse step, for
            networks that learn it; None for all others.
        stages: estimates of x by earlier parts of the network (a stack's bricks), in order and
            without the last, which is `mean`; empty for networks of one part.
    """

    mean: Tensor
    log_variance: Tensor | None = None
    stages: tuple[Tensor, ...] = ()

    @property
    def estimates(self) -> tuple[Tensor, ...]:
        """All estimates of x, in order; the last one is `mean`."""
        return (*self.stages, self.mean)


def by_owner(
    owner: Tensor,
    z: Tensor,
    sigma: Tensor,
    cond: Conditioning,
    estimate: Callable[[int, Tensor, Tensor, Conditioning], Posterior],
) -> Posterior:
    """The posterior of a batch whose images are estimated in different ways.

    Args:
        owner: number of the way of each image, int64 [B]; read on the host, so best on the CPU.
        z, sigma, cond: of the batch, σ [B] where `owner` is.
        estimate: called with a way's number and its part of the batch; with all of it, untouched,
            where there is one way only.
    """
    present = sorted(set(owner.tolist()))
    if len(present) == 1:
        return estimate(present[0], z, sigma, cond)
    rows = [(owner == number).nonzero()[:, 0] for number in present]
    parts = []
    for number, row in zip(present, rows, strict=True):
        ours = row.to(z.device)
        parts.append(estimate(number, z[ours], sigma[row], cond[ours]))
    return joined(parts, rows)


def joined(parts: Sequence[Posterior], rows: Sequence[Tensor]) -> Posterior:
    """The posterior of a batch from those of its parts.

    Args:
        parts: what different denoisers say; what not all of them know is left out.
        rows: for each part the numbers of its images in the batch, int64.
    """
    order = torch.cat([*rows]).argsort().to(parts[0].mean.device)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([*tensors])[order]

    variances = [part.log_variance for part in parts if part.log_variance is not None]
    stages = [part.stages for part in parts]
    same = len({len(each) for each in stages}) == 1
    return Posterior(
        join([part.mean for part in parts]),
        join(variances) if len(variances) == len(parts) else None,
        tuple(map(join, zip(*stages, strict=True))) if same else (),
    )


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


class Valued(NamedTuple):
    """What a denoiser that is the gradient of an energy says, in z's dtype.

    Attributes:
        energy: V [B], see `diffusion.energy`.
        mean: the estimate of x, [B, C, H, W], if it was asked for.
    """

    energy: Tensor
    mean: Tensor | None


class Denoiser(Model):
    """Estimates the clean image: (z [B, C, H, W], σ [B], `Conditioning`) to `Posterior`.

    Wrappers (guidance, experts, skipping) are denoisers themselves, so they nest; see `Wrapper`.

    Attributes:
        shape, num_classes: see `Model`.
        sigma_min, sigma_max: noise levels that the denoiser supports.
        guided: guidance acts on its estimates, which may leave the range of images by it.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf
    guided: bool = False

    @abstractmethod
    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """Estimate x from z [B, C, H, W] at noise levels σ [B]; computed in float32.

        σ may be on the CPU wherever z is: samplers pass it there, so that wrappers which decide by
        it need no synchronisation with the device.
        """

    def for_step(self, sigma: float) -> Denoiser:
        """The denoiser of a sampler's step that begins at noise level σ.

        Samplers ask once a step, so that wrappers which change with the noise level do not change
        between the two evaluations of a second-order step. Itself by default.
        """
        return self

    @property
    def levels(self) -> Tensor | None:
        """Of denoisers that know some noise levels only: all, float64 [N] on the CPU, rising.

        None for denoisers of a continuous range.
        """
        return None

    def for_levels(self, levels: Tensor) -> Denoiser:
        """The denoiser of a reverse process that visits these noise levels only, rising.

        Its `log_variance` is that of the steps between them; itself where none is learned.
        """
        return self

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest supported noise level; keeps dtype and shape. The identity by default."""
        return sigma

    def time(self, sigma: Tensor) -> Tensor:
        """t / T of noise levels σ, float64; T counts all steps of the process trained on.

        Of denoisers of a continuous range, that of the linear schedule in continuous time.
        """
        return vp_time(sigma.to(torch.float64), 19.9, 0.1).clamp(0, 1)

    def value(self, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool) -> Valued:
        """The energy V of which the estimate of the noise is the gradient, see `diffusion.energy`.

        Args:
            z, sigma, cond: as of a call, σ [B].
            gradient: whether the estimate of x is asked for, too, at twice the cost.

        Raises:
            TesseraError: there is no such energy. By default there is none.
        """
        self._refuse_energy()

    def check_energy(self) -> None:
        """Refuse to give energies, before any is asked for, if there are none.

        Raises:
            TesseraError: there are none.
        """
        self._refuse_energy()

    def energy_network(self, sigma: float = 0.0) -> EnergyNetwork:
        """The network that has the energy; of experts, that at noise level σ.

        Raises:
            TesseraError: there is none.
        """
        self._refuse_energy()

    def _refuse_energy(self) -> NoReturn:
        raise TesseraError(
            f"energies cannot be followed through a denoiser of kind {type(self).__name__}. Leave "
            "out the refinement"
        )


class Wrapper(Denoiser):
    """A denoiser around another one, of which everything holds that a subclass does not change.

    A subclass changes `forward`, and says in `around` how it is put around a part of the inner one.

    Args:
        denoiser: the inner one.
    """

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape, self.num_classes = denoiser.shape, denoiser.num_classes
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.guided = denoiser.guided

    @abstractmethod
    def around(self, denoiser: Denoiser) -> Denoiser:
        """The same wrapper around `denoiser`, which is made from the inner one."""

    def for_step(self, sigma: float) -> Denoiser:
        return self._around(self.denoiser.for_step(sigma))

    @property
    def levels(self) -> Tensor | None:
        return self.denoiser.levels

    def for_levels(self, levels: Tensor) -> Denoiser:
        return self._around(self.denoiser.for_levels(levels))

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.denoiser.round_sigma(sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return self.denoiser.time(sigma)

    def energy_network(self, sigma: float = 0.0) -> EnergyNetwork:
        return self.denoiser.energy_network(sigma)

    def _around(self, denoiser: Denoiser) -> Denoiser:
        return self if denoiser is self.denoiser else self.around(denoiser)


def column(values: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1] of the dtype and on the device of x."""
    return values.to(x.device, x.dtype)[:, None, None, None]
