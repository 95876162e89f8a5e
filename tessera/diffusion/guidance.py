"""Guidance: away from what a less informed denoiser says, towards what the better one says.

Classifier-free guidance (Ho & Salimans 2022), in a limited interval of noise levels (Kynkäänniemi
et al. 2024), and autoguidance by a weaker model (Karras et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.conditioning import NO_CLASS, Conditioning
from tessera.diffusion.denoiser import Denoiser, Posterior, Valued, Wrapper, column
from tessera.errors import TesseraError


class Guided(Wrapper):
    """D = D_ref + w (D_c - D_ref), where D_ref is the denoiser without class, or a weaker one.

    Costs two evaluations; one where w is 1, that is at noise levels outside the interval. The log
    variance is that of the conditional evaluation.

    Args:
        denoiser: the model to guide, D_c.
        scale: guidance weight w; 1 is no guidance, 0 is D_ref alone.
        interval: (low, high), noise levels low <= σ <= high where guidance acts; None: everywhere.
        weak: the reference of autoguidance, called with the same conditioning. None: the denoiser
            itself without class, evaluated in one doubled batch.
        channels: guide the first so many channels only; the others are those of D_c. None: all.

    Raises:
        TesseraError: no `weak` denoiser and a model without classes, or shapes that differ.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        interval: tuple[float, float] | None = None,
        weak: Denoiser | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__(denoiser)
        if weak is None and denoiser.num_classes == 0:
            raise TesseraError(
                "classifier-free guidance needs a model that was trained with classes; this one "
                "knows none. Leave out `guidance`, or guide by a weaker model"
            )
        if weak is not None and weak.shape != denoiser.shape:
            raise TesseraError(
                f"the model to guide makes images of shape {denoiser.shape}, the weaker one "
                f"{weak.shape}. Guide by a model of the same shape"
            )
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise TesseraError(
                f"`guidance_interval={interval[0]:g},{interval[1]:g}`: give the lower noise level "
                "first, then the higher one"
            )
        self.guided = True
        self.scale = scale
        self.interval = interval
        self.weak = weak
        self.channels = channels

    def around(self, denoiser: Denoiser) -> Guided:
        return Guided(denoiser, self.scale, self.interval, self.weak, self.channels)

    def for_step(self, sigma: float) -> Denoiser:
        weak = None if self.weak is None else self.weak.for_step(sigma)
        denoiser = self.denoiser.for_step(sigma)
        return Guided(denoiser, self.scale, self.interval, weak, self.channels)

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        """As every denoiser; free of synchronisation where `sigma` is on the CPU."""
        active = self._active(sigma)
        # Without any label both evaluations of classifier-free guidance are the same.
        nothing_to_guide = self.weak is None and cond.labels is None
        if self.scale == 1 or nothing_to_guide or not active.any():
            plain: Posterior = self.denoiser(z, sigma, cond)
            return plain
        if self.weak is None:
            conditional, reference = self._doubled(z, sigma, cond)
        else:
            conditional, reference = self.denoiser(z, sigma, cond), self.weak(z, sigma, cond).mean
        difference = conditional.mean - reference
        if active.all():
            mean = reference + self.scale * difference
        else:
            scale = torch.where(active, self.scale, 1.0).to(z.device, difference.dtype)
            mean = reference + scale.reshape(-1, 1, 1, 1) * difference
        if self.channels is not None:
            mean = torch.cat(
                [mean[:, : self.channels], conditional.mean[:, self.channels :]], dim=1
            )
        return Posterior(mean, conditional.log_variance)

    def value(self, z: Tensor, sigma: Tensor, cond: Conditioning, *, gradient: bool) -> Valued:
        """V = V_ref + w (V_c - V_ref), as of the estimates."""
        self._check_channels()
        active = self._active(sigma)
        nothing_to_guide = self.weak is None and cond.labels is None
        if self.scale == 1 or nothing_to_guide or not active.any():
            return self.denoiser.value(z, sigma, cond, gradient=gradient)
        if self.weak is None:
            both = _with_and_without(cond, len(z))
            twice = torch.cat([z, z]), torch.cat([sigma, sigma])
            energies, means = self.denoiser.value(*twice, both, gradient=gradient)
            own, reference = energies.chunk(2)
            mean, other = (None, None) if means is None else means.chunk(2)
        else:
            own, mean = self.denoiser.value(z, sigma, cond, gradient=gradient)
            reference, other = self.weak.value(z, sigma, cond, gradient=gradient)
        scale = torch.where(active, self.scale, 1.0).to(z.device, z.dtype).expand(len(z))
        energy = reference + scale * (own - reference)
        if mean is None or other is None:
            return Valued(energy, None)
        return Valued(energy, other + column(scale, z) * (mean - other))

    def check_energy(self) -> None:
        self._check_channels()
        self.denoiser.check_energy()
        if self.weak is not None:
            self.weak.check_energy()

    def _check_channels(self) -> None:
        if self.channels is not None:
            raise TesseraError(
                "guidance of some channels only follows no energy. Leave out guidance_channels, or "
                "the refinement"
            )

    def _active(self, sigma: Tensor) -> Tensor:
        if self.interval is None:
            return torch.ones((), dtype=torch.bool)
        return (sigma >= self.interval[0]) & (sigma <= self.interval[1])

    def _doubled(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Posterior, Tensor]:
        """The conditional posterior and the unconditional mean, from one batch of 2 B."""
        batch = len(z)
        both = _with_and_without(cond, batch)
        sigmas = sigma if sigma.ndim == 0 else torch.cat([sigma, sigma])
        posterior: Posterior = self.denoiser(torch.cat([z, z]), sigmas, both)
        variance = posterior.log_variance
        conditional = Posterior(
            posterior.mean[:batch], None if variance is None else variance[:batch]
        )
        return conditional, posterior.mean[batch:]


def _with_and_without(cond: Conditioning, batch: int) -> Conditioning:
    """The conditioning of a batch, and once more without class."""
    both = cond.map(lambda tensor: torch.cat([tensor, tensor]))
    assert both.labels is not None
    both.labels[batch:] = NO_CLASS
    return both
