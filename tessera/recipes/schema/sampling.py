"""The samplers: noise levels and solvers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, PositiveFloat, model_validator

from tessera.recipes.schema.base import (
    Clamp,
    Factor,
    Listed,
    NonNegative,
    Options,
    Probability,
    Section,
    SomeSteps,
    Steps,
    Usual,
)
from tessera.recipes.schema.diffusion import BlurObjectiveConfig, ObjectiveSection

SPACING = "number, list (90,60,60,20,20) or ddimN; empty for all of the process"
OF_CONTINUOUS = "noise levels for models of a continuous range, like linear or cosine"
CHURN = "noise added on the way; 0: none, deterministic"
CHURN_FROM, CHURN_TO = "lowest noise level where any is added", "highest one"
CHURN_SPREAD = "spread of what is added"
LAST, FIRST = "of the last step; cut to what the model supports", "of the first step; likewise"
LONG_STEPS = "larger: shorter steps at low noise"
OWN_RANGE = "none: the method's own"
SOLVER = "heun, of second order, or euler: half the evaluations"


def _check_range(sigma_min: float | None, sigma_max: float | None) -> None:
    if sigma_min is not None and sigma_max is not None and sigma_min >= sigma_max:
        raise ValueError(f"`sigma_min={sigma_min:g}` must be less than `sigma_max={sigma_max:g}`")


class EdmLevelsConfig(Section):
    """EDM's noise levels, evenly spaced in σ^(1/ρ)."""

    kind: Literal["edm"] = "edm"
    steps: Steps = Field(18, description="number of them")
    sigma_min: PositiveFloat = Field(0.002, description=LAST)
    sigma_max: PositiveFloat = Field(80, description=FIRST)
    rho: PositiveFloat = Field(7, description=LONG_STEPS)

    @model_validator(mode="after")
    def _range_falls(self) -> Self:
        _check_range(self.sigma_min, self.sigma_max)
        return self


class MethodLevelsConfig(Section):
    """The noise levels of VP, VE or improved DDPM."""

    kind: Literal["vp", "ve", "iddpm"] = Field(description="whose noise levels")
    steps: Steps = Field(18, description="number of them")
    sigma_min: PositiveFloat | None = Field(None, description=OWN_RANGE)
    sigma_max: PositiveFloat | None = Field(None, description=OWN_RANGE)
    epsilon_s: PositiveFloat = Field(1e-3, description="last time of VP")

    @model_validator(mode="after")
    def _range_falls(self) -> Self:
        _check_range(self.sigma_min, self.sigma_max)
        return self


class ProcessLevelsConfig(Section):
    """The noise levels of a discrete process."""

    kind: Literal["process"] = "process"
    steps: str = Field("", description=SPACING)
    noise_schedule: str | None = Field(None, description=OF_CONTINUOUS)


class ListedLevelsConfig(Section):
    """Noise levels one by one, as fitted to a model."""

    kind: Literal["list"] = "list"
    sigmas: Annotated[tuple[PositiveFloat, ...], Listed] = Field(
        min_length=1,
        max_length=100_000,
        description="where the steps begin, falling; the last one ends at 0",
    )


LevelsConfig = Annotated[
    EdmLevelsConfig | MethodLevelsConfig | ProcessLevelsConfig | ListedLevelsConfig,
    Field(discriminator="kind"),
]


class RefineSection(Section):
    """What every refinement says of itself."""

    needs_energy: ClassVar[bool] = False
    """Works with denoisers whose estimates are the gradient of an energy."""


class McmcRefineConfig(RefineSection):
    """Descent on the model's energy after each step, which a sample rejects where it rises."""

    needs_energy = True

    kind: Literal["mcmc"] = "mcmc"
    step_size: PositiveFloat | None = Field(None, description="of descent; none: the model's own")
    steps: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="of descent; none: 5 to 10, more at higher noise"
    )
    clamp: Clamp = Field(
        "none", description="of samples while they descend: none, clean (as released) or noisy"
    )
    reject: bool = Field(True, description="leave out steps that raise a sample's energy")
    level: Literal["state", "step"] = Field(
        "state", description="noise level of the energy: that of the sample; step: as released"
    )


class ExternalRefineConfig(RefineSection):
    """A hook of the caller's own, that improves x after each step: `Parts.refine` makes it."""

    kind: Literal["external"] = "external"
    name: str = Field("", description="for people who read the recipe")
    options: Options = Field({}, description="keyword arguments of the function")


def _usual_kind(value: Any) -> Any:
    """Keys of descent say so by themselves; others are those of the caller's own hook."""
    if not isinstance(value, Mapping) or "kind" in value:
        return value
    own = value.keys() & (McmcRefineConfig.model_fields.keys() - {"kind"})
    return {"kind": "mcmc" if own else "external", **value}


RefineConfig = Annotated[
    Annotated[McmcRefineConfig | ExternalRefineConfig, Field(discriminator="kind")],
    BeforeValidator(_usual_kind),
]


class SamplerSection(Section):
    """What every sampler has, and says of itself."""

    family: ClassVar[str] = "denoiser"
    """From which kind of model it samples."""

    starts_from_noise: ClassVar[bool] = True
    """False where a picture is what it starts from, or where nobody but the caller knows."""

    @property
    def enlarges(self) -> int | None:
        """How many times it enlarges the picture that it starts from; None: it starts from noise.

        Known once the section is `fitted`.
        """
        return None

    def fitted(self, objective: ObjectiveSection, *, bounded: bool, energy: bool) -> Self:
        """The section with what it leaves open taken from how the model was trained.

        Args:
            objective: that of the training.
            bounded: the values of x do not leave [-1, 1].
            energy: the network has an energy, or may have one.

        Raises:
            ValueError: it cannot sample from models that were trained so.
        """
        if objective.from_pictures and self.starts_from_noise:
            raise ValueError(
                "models of this objective start from pictures, not from noise: `sampler=relay` "
                "(in recipes sampling.kind=relay) samples from them"
            )
        return self


class DenoisingSamplerSection(SamplerSection):
    """What every sampler of denoisers has."""

    OWN_LEVELS: ClassVar[tuple[str, ...]] = ()
    """Keys of the sampler that place its own noise levels."""

    levels: LevelsConfig | None = Field(
        None,
        description="other noise levels than the sampler's own: levels.kind=edm, vp, ve, iddpm, "
        "process or list, and levels.steps=N or levels.sigmas=80,10,1",
    )
    refine: RefineConfig | None = Field(
        None,
        description="improves x after each step: refine.kind=mcmc, of energies, and "
        "refine.steps=N, refine.step_size=0.01, ...",
    )

    def fitted(self, objective: ObjectiveSection, *, bounded: bool, energy: bool) -> Self:
        self.check_refine(energy)
        return super().fitted(objective, bounded=bounded, energy=energy)

    def check_refine(self, energy: bool) -> None:
        """Raise for a refinement that descends on the energy of a model that has none.

        Raises:
            ValueError: in words for the user.
        """
        if self.refine is not None and self.refine.needs_energy and not energy:
            raise ValueError(
                f"refine.kind={self.refine.kind} descends on the energy of a model, and this one "
                "has none: choose another refinement, or train with network.kind=energy_dit"
            )

    @model_validator(mode="after")
    def _one_set_of_levels(self) -> Self:
        given = [
            name
            for name in self.OWN_LEVELS
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.levels is not None and given:
            raise ValueError(
                f"{', '.join(given)} and levels both say where the steps are; give one of them"
            )
        return self


class EdmSamplerConfig(DenoisingSamplerSection):
    """EDM, algorithm 2 (deterministic with s_churn 0)."""

    OWN_LEVELS = ("steps", "sigma_min", "sigma_max", "rho")

    kind: Literal["edm"] = "edm"
    steps: SomeSteps = Field(18, description="number of them")
    solver: Literal["heun", "euler"] = Field("heun", description=SOLVER)
    sigma_min: PositiveFloat = Field(0.002, description=LAST)
    sigma_max: PositiveFloat = Field(80, description=FIRST)
    rho: float = Field(7, ge=0.01, le=1000, description=LONG_STEPS)
    s_churn: Annotated[NonNegative, Usual(0, 100)] = Field(0, description=CHURN)
    s_min: NonNegative = Field(0, description=CHURN_FROM)
    s_max: NonNegative = Field(math.inf, description=CHURN_TO)
    s_noise: NonNegative = Field(1, description=CHURN_SPREAD)
    sde_scale: Probability = Field(0, description="share of new noise in every step's")
    reuse_noise: bool = Field(False, description="corrections add the new noise of their step")

    @model_validator(mode="after")
    def _range_falls(self) -> Self:
        _check_range(self.sigma_min, self.sigma_max)
        return self


class RelaySamplerConfig(DenoisingSamplerSection):
    """Relay diffusion: from an enlarged picture to a sharp one.

    Keys of the blur that are null are those of the training (objective.kind=blur).
    """

    OWN_LEVELS = ("steps", "sigma_min", "sigma_max", "rho", "sigma_start")
    starts_from_noise = False

    kind: Literal["relay"] = "relay"
    steps: SomeSteps = Field(
        18, description="from sigma_max on; those above sigma_start are left out"
    )
    sigma_min: PositiveFloat = Field(0.008, description=LAST)
    sigma_max: PositiveFloat = Field(80, description=FIRST)
    rho: float = Field(7, ge=0.01, le=1000, description=LONG_STEPS)
    sigma_start: PositiveFloat = Field(0.9, description="noise that the enlarged picture may get")
    s_block: NonNegative = Field(0.15, description="strength of noise in blocks of pixels")
    s_noise: Probability = Field(0.2, description="share of new noise in every step's")
    correction: Literal["directions", "estimates", "none"] = Field(
        "directions", description="as released, of first order; of second order; or none"
    )
    reuse_noise: bool = Field(False, description="corrections add the new noise of their step")
    s_churn: Annotated[NonNegative, Usual(0, 100)] = Field(0, description=CHURN)
    s_min: NonNegative = Field(0, description=CHURN_FROM)
    s_max: NonNegative = Field(math.inf, description=CHURN_TO)
    churn_noise: NonNegative = Field(1, description=CHURN_SPREAD)
    block: Factor | None = Field(None, description="how many times the picture is enlarged")
    blur_sigma_max: NonNegative | None = Field(None, description="strongest blur, in pixels")
    prob_length: PositiveFloat | None = Field(
        None, description="ties blur to noise; above that of the training: less blur is assumed"
    )
    min_scale: Probability | None = Field(None, description="what is left of any frequency")
    p_mean: FiniteFloat | None = Field(None, description="of the noise levels of the training")
    p_std: PositiveFloat | None = Field(None, description="likewise")
    unit_variance: bool | None = Field(
        None, description="block noise leaves the noise its variance"
    )

    @model_validator(mode="after")
    def _range_falls(self) -> Self:
        _check_range(self.sigma_min, self.sigma_max)
        return self

    @property
    def enlarges(self) -> int | None:
        return self.block

    def fitted(self, objective: ObjectiveSection, *, bounded: bool, energy: bool) -> Self:
        self.check_refine(energy)
        if isinstance(objective, BlurObjectiveConfig):
            if self.block not in (None, objective.block):
                raise ValueError(
                    f"`block={self.block}`: the model was trained with objective.block="
                    f"{objective.block}, which cannot be changed in sampling. Leave it out"
                )
            names = (*BLUR_KEYS, "unit_variance")
            missing = [name for name in names if getattr(self, name) is None]
            return self.model_copy(update={name: getattr(objective, name) for name in missing})
        if not objective.external:
            raise ValueError(
                "the sampler relay sharpens pictures that were blurred: train with "
                "objective.kind=blur, or choose another sampler"
            )
        left_out = [name for name in BLUR_KEYS if getattr(self, name) is None]
        if left_out:
            raise ValueError(
                "an external objective does not say how pictures were blurred: give sampling's "
                f"{', '.join(left_out)}"
            )
        return self


BLUR_KEYS = ("block", "blur_sigma_max", "prob_length", "min_scale", "p_mean", "p_std")
"""Of the blur, in the objective and in the sampler."""


class AblationSamplerConfig(DenoisingSamplerSection):
    """EDM, algorithm 1 generalised: any time steps, schedule σ(t) and scaling s(t)."""

    OWN_LEVELS = ("steps", "rho", "c_1", "c_2", "timesteps")

    kind: Literal["ablation"] = "ablation"
    steps: SomeSteps = Field(18, description="number of them")
    solver: Literal["heun", "euler"] = Field("heun", description=SOLVER)
    discretization: Literal["edm", "vp", "ve", "iddpm"] = Field(
        "edm", description="where the steps are: edm, vp, ve or iddpm"
    )
    schedule: Literal["linear", "vp", "ve"] = Field(
        "linear", description="noise level over time: linear, vp or ve"
    )
    scaling: Literal["none", "vp"] = Field(
        "none", description="of x over time: none, or vp, which keeps its variance"
    )
    sigma_min: PositiveFloat | None = Field(None, description=OWN_RANGE)
    sigma_max: PositiveFloat | None = Field(None, description=OWN_RANGE)
    rho: float = Field(7, ge=0.01, le=1000, description=f"of edm; {LONG_STEPS}")
    epsilon_s: PositiveFloat = Field(1e-3, description="last time of vp")
    c_1: PositiveFloat = Field(
        0.001, description="of iddpm: least share of the signal that a step keeps"
    )
    c_2: PositiveFloat = Field(0.008, description="of iddpm: offset of its cosine")
    timesteps: Steps = Field(1000, description="of iddpm: number of its process's steps")
    alpha: PositiveFloat = Field(1, description="second evaluation after this share of a step")
    s_churn: Annotated[NonNegative, Usual(0, 100)] = Field(0, description=CHURN)
    s_min: NonNegative = Field(0, description=CHURN_FROM)
    s_max: NonNegative = Field(math.inf, description=CHURN_TO)
    s_noise: NonNegative = Field(1, description=CHURN_SPREAD)

    @model_validator(mode="after")
    def _range_falls(self) -> Self:
        _check_range(self.sigma_min, self.sigma_max)
        return self


class ProcessSamplerConfig(DenoisingSamplerSection):
    """What samplers of discrete processes share."""

    OWN_LEVELS = ("steps", "noise_schedule")

    steps: Annotated[str, Usual()] = Field("", description=SPACING)
    clip: Literal["auto", "none", "static", "dynamic"] = Field(
        "auto",
        description="estimates of x: none, static or dynamic; auto: dynamic if guided, else "
        "static, and none of latents",
    )
    quantile: Probability = Field(0.995, description="of dynamic clipping")
    noise_schedule: str | None = Field(None, description=OF_CONTINUOUS)

    def fitted(self, objective: ObjectiveSection, *, bounded: bool, energy: bool) -> Self:
        """Estimates that may leave [-1, 1] are clipped only if `clip` says how."""
        section = super().fitted(objective, bounded=bounded, energy=energy)
        if section.clip == "auto" and not bounded:
            return section.model_copy(update={"clip": "none"})
        return section


class DdpmSamplerConfig(ProcessSamplerConfig):
    """Ancestral sampling (Ho et al. 2020), with learned variances where there are any."""

    kind: Literal["ddpm"] = "ddpm"
    variance: Literal["learned", "large", "small"] = Field(
        "learned", description="of a step: learned where it was, else small; large; or small"
    )


class DdimSamplerConfig(ProcessSamplerConfig):
    """DDIM (Song et al. 2021)."""

    kind: Literal["ddim"] = "ddim"
    eta: Annotated[NonNegative, Usual(0, 1)] = Field(
        0.0, description="amount of noise; 0 is deterministic"
    )


class ExternalSamplerConfig(DenoisingSamplerSection):
    """A sampler of the caller's own: `Parts.sampler` makes it."""

    starts_from_noise = False

    kind: Literal["external"] = "external"
    name: str = Field("", description="for people who read the recipe")
    options: Options = Field({}, description="keyword arguments of the function")


class MarSamplerConfig(SamplerSection):
    """MAR: tokens in random order, several at a time."""

    family = "masked"

    kind: Literal["mar"] = "mar"
    num_iter: Annotated[Steps, Usual(1, 256)] = Field(
        64, description="iterations; at most as many as there are tokens"
    )
    head_steps: Annotated[str, Usual()] = Field(
        "100", description=f"of each token's diffusion: {SPACING}"
    )
    temperature: Annotated[NonNegative, Usual(0, 2)] = Field(
        1.0, description="factor of the noise that these add"
    )
    guidance: Annotated[FiniteFloat, Usual(0, 8)] = Field(1.0, description="weight; 1 is none")
    guidance_schedule: Literal["linear", "constant"] = Field(
        "linear", description="linear: from 1 up to the weight, as the image fills; or constant"
    )
    clip: Literal["auto", "none", "static"] = Field(
        "auto", description="static cuts estimates of tokens to [-1, 1]; auto: those of pixels"
    )

    def fitted(self, objective: ObjectiveSection, *, bounded: bool, energy: bool) -> Self:
        """The range of latents is not known, that of pixels is."""
        section = super().fitted(objective, bounded=bounded, energy=energy)
        if section.clip != "auto":
            return section
        return section.model_copy(update={"clip": "static" if bounded else "none"})


SamplerConfig = Annotated[
    EdmSamplerConfig
    | AblationSamplerConfig
    | RelaySamplerConfig
    | DdpmSamplerConfig
    | DdimSamplerConfig
    | MarSamplerConfig
    | ExternalSamplerConfig,
    Field(discriminator="kind"),
]

SAMPLERS: dict[str, type[SamplerConfig]] = {
    "edm": EdmSamplerConfig,
    "ablation": AblationSamplerConfig,
    "ddpm": DdpmSamplerConfig,
    "ddim": DdimSamplerConfig,
    "relay": RelaySamplerConfig,
    "mar": MarSamplerConfig,
    "external": ExternalSamplerConfig,
}
"""The samplers by their kind."""
