"""A whole recipe, and the errors of parts that do not fit each other."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, PositiveFloat, model_validator

from tessera.channels import is_picture
from tessera.recipes.schema.base import Listed, Section, Side
from tessera.recipes.schema.data import (
    AugmentConfig,
    BandsViewConfig,
    CodecConfig,
    CoordsConfig,
    DataConfig,
    FullViewConfig,
    PatchViewConfig,
    PixelCodecConfig,
    ViewConfig,
)
from tessera.recipes.schema.diffusion import (
    EdmObjectiveConfig,
    EdmPreconditioningConfig,
    EnergyConfig,
    LinearPreconditioningConfig,
    ObjectiveConfig,
    PreconditioningConfig,
)
from tessera.recipes.schema.networks import NetworkConfig
from tessera.recipes.schema.sampling import EdmSamplerConfig, SamplerConfig
from tessera.recipes.schema.training import (
    EmaConfig,
    EvaluateConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)

_MOST_NUMBERS = 2**26  # of the mean images that a model keeps


class Recipe(Section):
    """Everything that makes a model: data, network, diffusion, training, and how it is sampled."""

    name: str = Field(description="for people, and of the run's folder")
    description: str = Field("", description="for people, in a line")
    data: DataConfig = Field(description="the images")
    codec: CodecConfig = Field(
        PixelCodecConfig(), description="between images and what the network sees"
    )
    view: ViewConfig = Field(FullViewConfig(), description="what of the images a step trains on")
    coords: CoordsConfig | None = Field(
        None, description="coordinates as input; null: x and y if the view is of patches"
    )
    augment: AugmentConfig | None = Field(
        None, description="disturbed images, which the network is told of; null for none"
    )
    low_resolution: Side | None = Field(
        None, description="side of the small image that the network enlarges (super-resolution)"
    )
    network: NetworkConfig = Field(description="what is trained")
    preconditioning: PreconditioningConfig = Field(
        EdmPreconditioningConfig(),
        description="what the network is given and what its output means",
    )
    objective: ObjectiveConfig = Field(
        EdmObjectiveConfig(), description="noise levels of the training, and weights of the loss"
    )
    energy: EnergyConfig | None = Field(
        None, description="what an energy network is trained on beside the objective"
    )
    snr_splits: Annotated[tuple[PositiveFloat, ...], Listed] = Field(
        (),
        max_length=64,
        description="thresholds of the signal-to-noise ratio between experts, falling",
    )
    expert: int | None = Field(
        None, ge=0, description="train this expert's noise levels only; 0 is the cleanest"
    )
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(), description="how gradients change weights"
    )
    ema: tuple[EmaConfig, ...] = Field(
        (EmaConfig(),),
        min_length=1,
        max_length=16,
        description="averages of the weights, the first is the default",
    )
    training: TrainingConfig = Field(TrainingConfig(), description="how long, how much at once")
    sampling: SamplerConfig = Field(
        EdmSamplerConfig(), description="how samples are made unless told otherwise"
    )
    evaluate: EvaluateConfig | None = Field(
        None, description="scores while training; null for none"
    )
    validation: ValidationConfig = Field(
        ValidationConfig(),
        description="the loss on other images, where data.validation or data.held_out names some",
    )
    run: RunConfig = Field(RunConfig(), description="the run's folder and what is written to it")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's images in model space."""
        return self.codec.shape(self.data)

    @property
    def start_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the picture that the model starts from; None if it starts from noise.

        The network sees it (`low_resolution`), or the sampler begins with it, enlarged.
        """
        block = self.fitted_sampling.enlarges
        side = self.low_resolution if block is None else self.shape[1] // block
        return None if side is None else (self.shape[0], side, side)

    @property
    def fitted_sampling(self) -> SamplerConfig:
        """The sampler, with what it leaves open taken from the training."""
        return self.fit(self.sampling)

    def fit(self, sampler: SamplerConfig) -> SamplerConfig:
        """A sampler, with what it leaves open taken from the training.

        Raises:
            ValueError: it cannot sample from models that are trained so.
        """
        energy = self.network.has_energy or self.network.external
        return sampler.fitted(self.objective, bounded=self.codec.of_pixels, energy=energy)

    @property
    def coord_frequencies(self) -> int | None:
        """Of the network's coordinate channels; None if it has none."""
        if self.network.own_coordinates:
            return 0
        if self.coords is not None:
            return self.coords.frequencies
        return 0 if self.view.needs_coordinates else None

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """Sides of all images that the network is trained on, in model space, small to large."""
        side = self.shape[1]
        if isinstance(self.view, BandsViewConfig):
            return tuple(sorted({band.crop or side // band.factor for band in self.view.bands}))
        if not isinstance(self.view, PatchViewConfig):
            return (side,)
        if self.view.sizes is not None:
            return self.view.sizes
        if not self.codec.of_pixels:
            return (side // 2, side)
        return (side // 4, side // 2, side)

    @property
    def augment_dim(self) -> int:
        """Number of augmentation labels that the network is built for."""
        return self.augment.label_dim if self.augment is not None else 0

    @property
    def ema_names(self) -> list[str]:
        """A name for each average: its half-life in images, numbered if that repeats."""
        names: list[str] = []
        for ema in self.ema:
            name = f"{ema.halflife_images:.0f}"
            names.append(name if name not in names else f"{name}-{len(names)}")
        return names

    @model_validator(mode="after")
    def _codec_fits(self) -> Self:
        self.codec.check(self.data)
        if self.augment is not None and not self.codec.takes_images:
            raise ValueError(
                "augment works on images and not on latents; set augment=null, and data.xflip=true "
                "for mirrored images, or codec.encode=online, which augments images and encodes "
                "them then"
            )
        if self.run.save_vae and self.codec.of_pixels:
            raise ValueError(
                "run.save_vae: a model of pixels has no VAE to be saved; leave it out, or set "
                "codec.kind=vae"
            )
        return self

    @model_validator(mode="after")
    def _scores_see_colours(self) -> Self:
        features = "classifier" if self.evaluate is None else self.evaluate.features
        if features != "classifier" and not is_picture(self.data.channels):
            raise ValueError(
                f"evaluate.features={features} looks at grey or RGB images, and "
                f"data.channels is {self.data.channels}; set evaluate.features=classifier"
            )
        return self

    @model_validator(mode="after")
    def _sides_fit(self) -> Self:
        if not self.network.fits(self.shape[1]):
            latents = (
                "" if self.codec.of_pixels else f" makes latents of side {self.shape[1]}, which"
            )
            raise ValueError(
                f"data.resolution ({self.data.resolution}){latents} must be {self.network.sides}"
            )
        self.network.check(self.shape[1])
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        splits = self.snr_splits
        if list(splits) != sorted(set(splits), reverse=True):
            raise ValueError(f"snr_splits {splits} must fall from expert to expert, like 4,0.25")
        if self.expert is not None and not 0 < len(splits) >= self.expert:
            raise ValueError(
                f"expert {self.expert} does not exist: snr_splits has {len(splits)} thresholds"
                + (
                    f", which make experts 0 to {len(splits)}"
                    if splits
                    else "; set some, like 0.25"
                )
            )
        return self

    @model_validator(mode="after")
    def _are_of_one_family(self) -> Self:
        for name, section in (("objective", self.objective), ("sampling", self.sampling)):
            if section.family not in (self.network.family, None):
                needed = "mar" if self.network.family == "masked" else "another"
                raise ValueError(
                    f"network.kind={self.network.kind} and {name}.kind={section.kind} do not go "
                    f"together: set {name}.kind={needed}, or change the network"
                )
        if self.network.family == "masked":
            for name, given in {
                "augment": self.augment is not None,
                "coords": self.coords is not None,
                f"view.kind={self.view.kind}": self.view.needs_coordinates,
                "snr_splits": bool(self.snr_splits),
            }.items():
                if given:
                    raise ValueError(
                        f"network.kind={self.network.kind} is trained on whole images at all noise "
                        f"levels, and told nothing but the class; leave out {name}"
                    )
            prediction = getattr(self.preconditioning, "prediction", None)
            if prediction != "eps":
                raise ValueError(
                    f"network.kind={self.network.kind} makes tokens by a discrete process, whose "
                    "noise it predicts: set preconditioning.kind=discrete and "
                    "preconditioning.prediction=eps"
                )
        return self

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if self.objective.needs_levels and not self.preconditioning.has_levels:
            raise ValueError(
                f"objective.kind={self.objective.kind} needs a model that knows discrete noise "
                "levels; set preconditioning.kind=discrete (or iddpm), or choose another objective"
            )
        if self.network.learns_variance and not self.preconditioning.has_steps:
            raise ValueError(
                "network.learn_variance needs the steps that the variance is of: set "
                "preconditioning.kind=discrete, or leave it out"
            )
        if self.network.learns_variance and not self.objective.trains_variance:
            raise ValueError(
                "network.learn_variance is trained by objective.kind=discrete only; choose that, "
                "or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _statistics_fit(self) -> Self:
        section = self.preconditioning
        if not section.of_images:
            return self
        kind = f"preconditioning.kind={section.kind}"
        if self.view.crops:
            raise ValueError(
                f"{kind} estimates whole images: set view.kind=full, or bands without crops, or "
                "preconditioning.kind=edm"
            )
        if self.objective.from_pictures or self.objective.external or self.network.external:
            raise ValueError(
                f"{kind} is made for white noise and for networks of the library: leave out own "
                "parts and objective.kind=blur, or set preconditioning.kind=edm"
            )
        if self.network.has_energy:
            raise ValueError(f"{kind} has no energy: set preconditioning.kind=edm")
        numbers = (self.data.num_classes + 1) * math.prod(self.shape)
        means = isinstance(section, LinearPreconditioningConfig) and section.classes
        if means and numbers > _MOST_NUMBERS:
            raise ValueError(
                f"{kind} would keep a mean image of each of {self.data.num_classes:,} classes, "
                f"{numbers:,} numbers; set preconditioning.classes=false"
            )
        return self

    @model_validator(mode="after")
    def _energy_fits(self) -> Self:
        network, terms = self.network, self.energy or EnergyConfig()
        if self.energy is not None and not (network.has_energy or network.external):
            raise ValueError(
                f"energy: a network of kind {network.kind} has no energy to train. Set network.kind"
                "=energy_dit, or energy=null"
            )
        if self.energy is not None and (self.objective.from_pictures or self.objective.external):
            raise ValueError(
                "energy: its terms are those of images with white noise; with objective.kind="
                f"{self.objective.kind}, set energy=null"
            )
        if terms.refinement and not (network.learns_step_size or network.external):
            raise ValueError(
                "energy.refinement trains the step size of descent: set network.learn_step_size="
                "true, or energy.refinement=0"
            )
        if network.learns_step_size and not (terms.refinement or self.objective.external):
            raise ValueError(
                "network.learn_step_size: nothing would train the step size. Set energy.refinement,"
                " its weight in the loss, like 0.1"
            )
        if network.has_energy and network.recomputes and self.training.compile:
            raise ValueError(
                "network.recompute: a compiled energy keeps what it computes. Set network.recompute"
                "=false, or training.compile=false"
            )
        if network.has_energy and self.training.precision == "fp16":
            raise ValueError(
                "training.precision=fp16: an energy's gradient is taken inside of the network, "
                "where no loss scale reaches, and float16 loses its small values. Set bf16 or fp32"
            )
        return self

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        block = self.fitted_sampling.enlarges
        if block is not None and (self.shape[1] % block or block == self.shape[1]):
            raise ValueError(
                f"objective.block ({block}) must divide the side of the images ({self.shape[1]}) "
                "into at least two blocks"
            )
        if self.low_resolution is None:
            return self
        if block is not None and self.low_resolution * block != self.shape[1]:
            raise ValueError(
                f"low_resolution ({self.low_resolution}) and objective.block ({block}) speak of "
                "different pictures to start from; leave out low_resolution"
            )
        if self.data.resolution % self.low_resolution or self.low_resolution == self.shape[1]:
            raise ValueError(
                f"low_resolution ({self.low_resolution}) must be a part of data.resolution "
                f"({self.data.resolution}) that it is a multiple of"
            )
        if not self.network.takes_image or not self.codec.of_pixels or self.view.needs_coordinates:
            raise ValueError(
                "low_resolution works with U-Nets and DiTs on whole images of pixels only"
            )
        return self

    @model_validator(mode="after")
    def _coordinates_fit(self) -> Self:
        if self.network.own_coordinates and self.coords is not None and self.coords.frequencies:
            raise ValueError(
                f"coords.frequencies: networks of kind {self.network.kind} always see the plain "
                "coordinates; set it to 0, or leave out coords"
            )
        return self

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        view, side = self.view, self.shape[1]
        if not isinstance(view, PatchViewConfig):
            return self
        sizes = self.patch_sizes
        halvings = len(sizes) - 1
        if view.sizes is None and side % 2**halvings:
            often = "twice" if halvings == 2 else "once"
            raise ValueError(
                f"images of side {side} cannot be halved {often}, as the usual patches need; "
                "set view.sizes"
            )
        if list(sizes) != sorted(set(sizes)):
            raise ValueError(f"view.sizes {_text(sizes)} must rise from small to large")
        if sizes[-1] > side:
            raise ValueError(
                f"view.sizes has patches of {sizes[-1]} pixels, but the images have {side}"
            )
        self._check_alignment(sizes)
        for size in sizes:
            if not self.network.fits(size):
                raise ValueError(
                    f"patches of {size} pixels do not fit the network: their side must be "
                    f"{self.network.sides}. Set view.sizes, or change the network"
                )
        for name in ("probabilities", "multipliers"):
            values = getattr(view, name)
            if values is not None and len(values) != len(sizes):
                raise ValueError(
                    f"view.{name} has {len(values)} entries, but there are {len(sizes)} sizes: "
                    f"{_text(sizes)}"
                )
        if view.probabilities is None and len(sizes) > 3:
            raise ValueError(
                "view.real_p can be distributed over up to 3 sizes only; set view.probabilities"
            )
        if view.probabilities is not None and abs(sum(view.probabilities) - 1) > 1e-6:
            raise ValueError(
                f"view.probabilities add up to {sum(view.probabilities):g}; they must make 1"
            )
        return self

    @model_validator(mode="after")
    def _bands_fit(self) -> Self:
        view, side = self.view, self.shape[1]
        if not isinstance(view, BandsViewConfig):
            return self
        if not self.objective.has_bands or self.energy is not None:
            raise ValueError(
                f"view.kind=bands draws noise levels band by band, which objective.kind="
                f"{self.objective.kind}{' with energy' if self.energy is not None else ''} cannot: "
                "set objective.kind=edm (or vp, ve) and energy=null, or view.kind=full"
            )
        if view.coarse and self.network.has_energy:
            raise ValueError(
                "view.bands: the energy of means of blocks is none of the whole image. Set factor "
                "to 1, or a network without energy"
            )
        if view.coarse and self.preconditioning.has_levels:
            raise ValueError(
                "view.bands: means of blocks have lower noise than their pixels, and "
                f"preconditioning.kind={self.preconditioning.kind} knows some levels only. Set "
                "preconditioning.kind=edm, or factor to 1"
            )
        for index, band in enumerate(view.bands):
            seen, key = band.crop or side // band.factor, "factor" if band.factor > 1 else "crop"
            value = getattr(band, key)
            name = f"view.bands.{index}.{key}={value}"
            if side % band.factor:
                raise ValueError(f"{name} must divide the side of the images ({side})")
            if band.crop is not None and band.crop >= side:
                raise ValueError(f"{name}: the images have {side} pixels; set it to null for all")
            count = self.network.stages
            if band.bricks is not None and (count == 1 or band.bricks > count):
                raise ValueError(
                    f"view.bands.{index}.bricks={band.bricks}: this network "
                    + (
                        f"has {count} bricks"
                        if count > 1
                        else "cannot be cut into bricks: set "
                        "network.kind=lego with network.joint=true, or bricks=null"
                    )
                )
            if not self.network.fits(seen):
                raise ValueError(
                    f"{name}: the network sees {seen} pixels a side, which must be "
                    f"{self.network.sides}. Choose another one, or change the network"
                )
        return self

    def _check_alignment(self, sizes: tuple[int, ...]) -> None:
        """Raise for patches that the objective cannot cut out."""
        grid, side = self.objective.alignment, self.shape[1]
        wrong = [size for size in sizes if size % grid]
        if not wrong:
            return
        fitting = [size for size in range(grid, side + 1, grid) if self.network.fits(size)]
        raise ValueError(
            f"patches of {wrong[0]} pixels cannot be cut into the objective's blocks of "
            f"{grid}x{grid}: their side must be a multiple of {grid} that fits the network: "
            f"{_shortened(fitting)}. Set view.sizes"
        )


def _text(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _shortened(values: list[int]) -> str:
    """Numbers for a message, the middle of many left out."""
    if len(values) <= 8:
        return _text(tuple(values)) or "none does"
    return f"{_text(tuple(values[:4]))}, ..., {_text(tuple(values[-2:]))}"
