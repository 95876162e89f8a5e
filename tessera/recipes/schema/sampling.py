"""The samplers."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from tessera.recipes.schema.base import NonNegative, Probability, Section, Steps


def _check_range(sigma_min: float | None, sigma_max: float | None) -> None:
    if sigma_min is not None and sigma_max is not None and sigma_min >= sigma_max:
        raise ValueError(f"`sigma_min={sigma_min:g}` must be less than `sigma_max={sigma_max:g}`")


class EdmSampler(Section):
    """EDM, algorithm 2 (deterministic with s_churn 0)."""

    kind: Literal["edm"] = "edm"
    steps: Steps = 18
    solver: Literal["heun", "euler"] = "heun"
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80
    rho: float = Field(7, ge=0.01, le=1000)
    s_churn: NonNegative = 0
    s_min: NonNegative = 0
    s_max: NonNegative = math.inf
    s_noise: NonNegative = 1

    @model_validator(mode="after")
    def _range_falls(self) -> Self:
        _check_range(self.sigma_min, self.sigma_max)
        return self


class AblationSampler(Section):
    """EDM, algorithm 1 generalised: any time steps, schedule σ(t) and scaling s(t)."""

    kind: Literal["ablation"] = "ablation"
    steps: Steps = 18
    solver: Literal["heun", "euler"] = "heun"
    discretization: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    schedule: Literal["linear", "vp", "ve"] = "linear"
    scaling: Literal["none", "vp"] = "none"
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None
    rho: float = Field(7, ge=0.01, le=1000)
    epsilon_s: PositiveFloat = 1e-3
    c_1: PositiveFloat = 0.001
    c_2: PositiveFloat = 0.008
    timesteps: Steps = 1000
    alpha: PositiveFloat = 1
    s_churn: NonNegative = 0
    s_min: NonNegative = 0
    s_max: NonNegative = math.inf
    s_noise: NonNegative = 1

    @model_validator(mode="after")
    def _range_falls(self) -> Self:
        _check_range(self.sigma_min, self.sigma_max)
        return self


class ProcessSampler(Section):
    """What samplers of discrete processes share."""

    steps: str = Field(
        "", description="number, list (90,60,60,20,20) or ddimN; empty for all of the process"
    )
    clip: Literal["auto", "none", "static", "dynamic"] = Field(
        "auto",
        description="estimates of x; auto: dynamic if guided, else static; none of latents",
    )
    quantile: Probability = Field(0.995, description="of dynamic clipping")
    noise_schedule: str | None = Field(
        None, description="noise levels for models of a continuous range, like linear or cosine"
    )


class DdpmSampler(ProcessSampler):
    """Ancestral sampling (Ho et al. 2020), with learned variances where there are any."""

    kind: Literal["ddpm"] = "ddpm"
    variance: Literal["learned", "large", "small"] = "learned"


class DdimSampler(ProcessSampler):
    """DDIM (Song et al. 2021)."""

    kind: Literal["ddim"] = "ddim"
    eta: NonNegative = Field(0.0, description="amount of noise; 0 is deterministic")


SamplerConfig = Annotated[
    EdmSampler | AblationSampler | DdpmSampler | DdimSampler, Field(discriminator="kind")
]
