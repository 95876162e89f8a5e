"""Preconditioning and objectives."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, FiniteFloat, PositiveFloat, model_validator

from tessera.recipes.schema.base import (
    Clamp,
    Factor,
    NonNegative,
    Options,
    Probability,
    Section,
    Steps,
)


class PreconditioningSection(Section):
    """What every preconditioning says of itself."""

    has_levels: ClassVar[bool] = False
    """Knows discrete noise levels."""

    has_steps: ClassVar[bool] = False
    """Knows the steps of a reverse process between them, whose variance can be learned."""

    doubles_channels: ClassVar[bool] = False
    """Its networks put out a variance, too, which it leaves out."""

    of_images: ClassVar[bool] = False
    """Is taken from the training images, and knows whole ones only."""


class EdmPreconditioningConfig(PreconditioningSection):
    """EDM (Karras et al. 2022), table 1."""

    kind: Literal["edm"] = "edm"
    sigma_data: PositiveFloat = Field(0.5, description="spread of the data, -1 to 1")


class LinearPreconditioningConfig(PreconditioningSection):
    """EDM's, around the best linear denoiser of the training images, which the network adds to."""

    of_images = True

    kind: Literal["linear"] = "linear"
    sigma_data: PositiveFloat = Field(0.5, description="spread of the data, -1 to 1")
    classes: bool = Field(True, description="measure a mean image of each class")


class VpPreconditioningConfig(PreconditioningSection):
    """Variance preserving (Song et al. 2021), EDM table 1."""

    kind: Literal["vp"] = "vp"
    beta_d: PositiveFloat = Field(19.9, description="slope of β(t), from β_min to β_min + β_d")
    beta_min: PositiveFloat = Field(0.1, description="β(0)")
    timesteps: Steps = Field(1000, description="number of steps that the network is told of")
    epsilon_t: PositiveFloat = Field(1e-5, description="earliest time")
    released_sigma_min: bool = Field(
        False, description="σ(ε_t) as float32 cancellation leaves it in the released baselines"
    )


class VePreconditioningConfig(PreconditioningSection):
    """Variance exploding (Song et al. 2021), EDM table 1."""

    kind: Literal["ve"] = "ve"
    sigma_min: PositiveFloat = Field(0.02, description="lowest noise level")
    sigma_max: PositiveFloat = Field(100, description="highest noise level")


class IddpmPreconditioningConfig(PreconditioningSection):
    """Improved DDPM (Nichol & Dhariwal 2021), EDM table 1; the network has 2 C output channels."""

    has_levels = True
    doubles_channels = True

    kind: Literal["iddpm"] = "iddpm"
    c_1: PositiveFloat = Field(0.001, description="least share of the signal that a step keeps")
    c_2: PositiveFloat = Field(0.008, description="offset of the cosine schedule")
    timesteps: Steps = Field(1000, description="number of steps of the process")


class DiscretePreconditioningConfig(PreconditioningSection):
    """The T steps of a variance-preserving process (DDPM, improved DDPM, PDM)."""

    has_levels = True
    has_steps = True

    kind: Literal["discrete"] = "discrete"
    schedule: str = Field("linear", description="linear, linear0.025 (its end), ..., or cosine")
    timesteps: Steps = Field(1000, description="number of steps of the process")
    spacing: str = Field("", description="train on these steps only, like 250 or ddim50")
    prediction: Literal["x0", "eps", "v"] = Field("x0", description="what the network predicts")
    rescale_timesteps: bool = Field(False, description="tell the network 1000 t / timesteps")


PreconditioningConfig = Annotated[
    EdmPreconditioningConfig
    | LinearPreconditioningConfig
    | VpPreconditioningConfig
    | VePreconditioningConfig
    | IddpmPreconditioningConfig
    | DiscretePreconditioningConfig,
    Field(discriminator="kind"),
]


class ObjectiveSection(Section):
    """What every objective has, and says of itself."""

    needs_levels: ClassVar[bool] = False
    """Draws from discrete noise levels."""

    trains_variance: ClassVar[bool] = False
    """Has a term for the variance of reverse steps."""

    has_bands: ClassVar[bool] = False
    """Can be restricted to any range of noise levels, and its noise is white."""

    external: ClassVar[bool] = False
    """The caller's own: nothing is known of it."""

    family: ClassVar[str | None] = "denoiser"
    """Of which kind of model it is the objective; None: of any."""

    from_pictures: ClassVar[bool] = False
    """Its models do not know pure noise: sampling starts from a picture."""

    label_dropout: Probability = Field(
        0.0, description="share of images trained without their class, for guidance"
    )

    @property
    def alignment(self) -> int:
        """Images are cut on a grid of so many pixels only; 1: anywhere."""
        return 1

    def simplest(self) -> Self:
        """The same with noise levels that are drawn without looking at tensors' values."""
        return self


class EdmObjectiveConfig(ObjectiveSection):
    """EDM, equation 6: log-normal σ, weight (σ² + σ_d²) / (σ σ_d)²."""

    has_bands = True

    kind: Literal["edm"] = "edm"
    p_mean: FiniteFloat = Field(-1.2, description="mean of ln σ in training")
    p_std: PositiveFloat = Field(1.2, description="spread of ln σ in training")
    sigma_data: PositiveFloat = Field(0.5, description="spread of the data, -1 to 1")


class VpObjectiveConfig(ObjectiveSection):
    """Variance preserving: uniform t, weight 1 / σ²."""

    has_bands = True

    kind: Literal["vp"] = "vp"
    beta_d: PositiveFloat = Field(19.9, description="slope of β(t), from β_min to β_min + β_d")
    beta_min: PositiveFloat = Field(0.1, description="β(0)")
    epsilon_t: PositiveFloat = Field(1e-5, description="earliest time that is trained on")


class VeObjectiveConfig(ObjectiveSection):
    """Variance exploding: log-uniform σ, weight 1 / σ²."""

    has_bands = True

    kind: Literal["ve"] = "ve"
    sigma_min: PositiveFloat = Field(0.02, description="lowest noise level that is trained on")
    sigma_max: PositiveFloat = Field(100, description="highest noise level that is trained on")


class DiscreteObjectiveConfig(ObjectiveSection):
    """The steps of a discrete process: weighted error, and a bound for learned variances."""

    needs_levels = True
    trains_variance = True

    kind: Literal["discrete"] = "discrete"
    label_dropout: Probability = Field(
        0.1, description="share of images trained without their class, for guidance"
    )
    weight: Literal["sqrt_snr", "p2", "snr", "snr+1", "truncated_snr"] = Field(
        "sqrt_snr", description="of the squared error of x at a signal-to-noise ratio"
    )
    loss: Literal["mse", "kl", "rescaled_kl"] = Field(
        "mse", description="mse adds the bound for learned variances only; kl is the bound alone"
    )
    rescale_variance: bool = Field(False, description="multiply the bound by steps / 1000")
    timesteps: Literal["uniform", "loss_second_moment"] = Field(
        "uniform", description="how steps are drawn; by their past losses"
    )
    small_variance: bool = Field(False, description="of kl losses without a learned variance")

    def simplest(self) -> Self:
        return self.model_copy(update={"timesteps": "uniform"})


class BlurObjectiveConfig(ObjectiveSection):
    """Deblurring and denoising of a relay's later stages: EDM's weight, blur time uniform."""

    from_pictures = True

    kind: Literal["blur"] = "blur"
    block: Factor = Field(4, description="how many times larger than those it starts from")
    blur_sigma_max: NonNegative = Field(3, description="of the blur at the highest noise, pixels")
    prob_length: float = Field(
        0.93, gt=0, le=1, description="share of the log-normal noise levels that is trained on"
    )
    min_scale: Probability = Field(1e-3, description="what is left of every frequency")
    p_mean: FiniteFloat = Field(-1.2, description="mean of ln σ in training")
    p_std: PositiveFloat = Field(1.2, description="spread of ln σ in training")
    block_scale: NonNegative = Field(0.15, description="strength of noise in blocks of pixels")
    unit_variance: bool = Field(
        False, description="divide by √(1 + block_scale²), as in the paper; released weights: no"
    )
    sigma_data: PositiveFloat = Field(0.5, description="spread of the data, -1 to 1")
    sigma_floor: PositiveFloat = Field(7.5e-3, description="lower noise levels are raised to it")
    released_floor: bool = Field(False, description="the floor as the released code computes it")
    max_weight: PositiveFloat = Field(1e5, description="of the squared error, at most")

    @property
    def alignment(self) -> int:
        return self.block


class EnergyConfig(Section):
    """What an energy is trained on beside the denoising objective."""

    contrastive: NonNegative = Field(
        0, description="weight of the energies of images against those of disturbed ones"
    )
    refinement: NonNegative = Field(
        0, description="weight of how descents go, which trains network.learn_step_size"
    )
    contrastive_steps: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="of descent; null: 5 to 10, more at higher noise"
    )
    refinement_steps: Annotated[int, Field(ge=2, le=1024)] | None = Field(
        None, description="of descent; null: 2 to 5, more at higher noise"
    )
    clamp: Clamp = Field("none", description="of images while they descend: none, clean or noisy")
    refines: Literal["all", "step_size"] = Field(
        "all", description="what the refinement's weight trains; step_size keeps energies as flat"
    )

    @model_validator(mode="after")
    def _all_is_used(self) -> Self:
        for term in ("contrastive", "refinement"):
            steps = getattr(self, f"{term}_steps")
            if steps is not None and not getattr(self, term):
                raise ValueError(f"{term}_steps={steps} needs a weight: set {term} above 0")
        if self.refines != "all" and not self.refinement:
            raise ValueError(f"refines={self.refines} needs a weight: set refinement above 0")
        return self


class MarObjectiveConfig(ObjectiveSection):
    """MAR: tokens are taken away, and each is denoised given the others.

    The tokens' diffusion is the process of the preconditioning.
    """

    needs_levels = True
    family = "masked"

    kind: Literal["mar"] = "mar"
    label_dropout: Probability = Field(
        0.1, description="share of images trained without their class, for guidance"
    )
    mask_ratio_min: float = Field(
        0.7, ge=0, lt=1, description="least share of the tokens that a step takes away"
    )
    repeats: Factor = Field(4, description="noise levels at which each token is trained at once")


class ExternalObjectiveConfig(ObjectiveSection):
    """An objective of the caller's own: `Parts.objective` makes it."""

    external = True
    family = None

    kind: Literal["external"] = "external"
    name: str = Field("", description="for people who read the recipe")
    options: Options = Field({}, description="keyword arguments of the function")


ObjectiveConfig = Annotated[
    EdmObjectiveConfig
    | VpObjectiveConfig
    | VeObjectiveConfig
    | DiscreteObjectiveConfig
    | BlurObjectiveConfig
    | MarObjectiveConfig
    | ExternalObjectiveConfig,
    Field(discriminator="kind"),
]
