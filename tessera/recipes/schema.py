"""The configuration of everything, as frozen, validated models; `kind` selects from a union."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


def _listed(value: Any) -> Any:
    """`1,2,2` and a single number for a list, as people type them on a command line."""
    if isinstance(value, str):
        return [part.strip(" '\"") for part in value.split(",")]
    return [value] if isinstance(value, int | float) else value


def _text(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


Listed = BeforeValidator(_listed)
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


# ------------------------------------------------------------------------------------------ data


class DataConfig(Section):
    """The training images and how they are read."""

    path: str | None = Field(
        None, description="archive (.zip), packed set or image folder; with a VAE: latents"
    )
    resolution: PositiveInt = Field(description="height and width of the images, pixels")
    channels: Literal[1, 3] = 3
    num_classes: int = Field(0, ge=0, description="0 trains without labels")
    xflip: bool = Field(False, description="double the set by mirrored copies")
    max_images: PositiveInt | None = Field(None, description="train on a random subset")
    order: Literal["epochs", "windowed"] = Field(
        "epochs", description="a fresh shuffle each epoch, or EDM's windowed shuffle"
    )
    cache: bool = Field(False, description="keep decoded images in memory")
    workers: int = Field(
        2, ge=0, description="threads that read ahead; 0 reads in the training step"
    )


class PixelCodec(Section):
    """uint8 pixels to [-1, 1]."""

    kind: Literal["pixels"] = "pixels"


class VaeCodec(Section):
    """The latents of a variational autoencoder, (z - shift) * scale; data.path is a set of them.

    The defaults are those of Stable Diffusion's.
    """

    kind: Literal["vae"] = "vae"
    model: str = Field(
        "stabilityai/sd-vae-ft-ema",
        description="folder or Hugging Face id of an AutoencoderKL of diffusers",
    )
    channels: PositiveInt = Field(4, description="of the latents")
    downsample: PositiveInt = Field(8, description="side of the images / side of the latents")
    scale: PositiveFloat = 0.18215
    shift: float = 0


CodecConfig = Annotated[PixelCodec | VaeCodec, Field(discriminator="kind")]


class FullView(Section):
    """Every step trains on whole images."""

    kind: Literal["full"] = "full"


class PatchView(Section):
    """Every step trains on random patches of one size, and where they lie (Patch Diffusion)."""

    kind: Literal["patches"] = "patches"
    real_p: Probability = Field(0.5, description="probability of the largest size")
    sizes: Annotated[tuple[PositiveInt, ...], Listed] | None = Field(
        None, description="sides from small to large; null: R/4, R/2, R (latents: R/2, R)"
    )
    probabilities: Annotated[tuple[Probability, ...], Listed] | None = Field(
        None, description="of the sizes; null: from real_p"
    )
    multipliers: Annotated[tuple[PositiveInt, ...], Listed] | None = Field(
        None, description="batches of a step, for each size s; null: R / s"
    )
    schedule: Literal["stochastic", "progressive"] = Field(
        "stochastic", description="a size drawn for each step, or from small to large"
    )
    per_pixel: bool = Field(
        False, description="give a patch the weight of a full image, not that of its pixels"
    )


ViewConfig = Annotated[FullView | PatchView, Field(discriminator="kind")]


class CoordsConfig(Section):
    """The position of each pixel in the full image, as further channels of the network's input."""

    frequencies: int = Field(
        0, ge=0, description="0: x and y; F: sines and cosines at 2^0, ..., 2^(F-1)"
    )


class AugmentConfig(Section):
    """Non-leaky augmentation (EDM, section F.2): multipliers of `p` per transform; 0 = absent."""

    p: Probability = 0.12
    xflip: NonNegative = 1e8
    yflip: NonNegative = 1
    rotate_int: NonNegative = 0
    translate_int: NonNegative = 0
    translate_int_max: NonNegative = 0.125
    scale: NonNegative = 1
    scale_std: NonNegative = 0.2
    rotate_frac: NonNegative = 1
    rotate_frac_max: NonNegative = 1
    aniso: NonNegative = 1
    aniso_std: NonNegative = 0.2
    aniso_rotate_prob: Probability = 0.5
    translate_frac: NonNegative = 1
    translate_frac_std: NonNegative = 0.125
    brightness: NonNegative = 0
    brightness_std: NonNegative = 0.2
    contrast: NonNegative = 0
    contrast_std: NonNegative = 0.5
    lumaflip: NonNegative = 0
    hue: NonNegative = 0
    hue_max: NonNegative = 1
    saturation: NonNegative = 0
    saturation_std: NonNegative = 1

    @property
    def label_dim(self) -> int:
        """Number of augmentation labels that the network sees."""
        widths = {
            "xflip": 1, "yflip": 1, "rotate_int": 2, "translate_int": 2, "scale": 1,
            "rotate_frac": 2, "aniso": 2, "translate_frac": 2, "brightness": 1, "contrast": 1,
            "lumaflip": 1, "hue": 2, "saturation": 1,
        }  # fmt: skip
        return sum(width for name, width in widths.items() if getattr(self, name) > 0)


# -------------------------------------------------------------------------------------- networks


class UNetSection(Section):
    """What every U-Net has."""

    channel_mult: Annotated[tuple[PositiveInt, ...], Listed] = ()

    def fits(self, side: int) -> bool:
        """Whether the network takes images of this height or width."""
        return side % (1 << (len(self.channel_mult) - 1)) == 0

    @property
    def sides(self) -> str:
        """Which heights and widths it takes, and why."""
        levels = len(self.channel_mult)
        return (
            f"a multiple of {2 ** (levels - 1)}, because network.channel_mult has {levels} levels"
        )


class SongUNetConfig(UNetSection):
    """DDPM++ and NCSN++ (Song et al. 2021), as in EDM."""

    kind: Literal["song_unet"] = "song_unet"
    model_channels: PositiveInt = 128
    channel_mult: Annotated[tuple[PositiveInt, ...], Listed] = (1, 2, 2, 2)
    channel_mult_emb: PositiveInt = 4
    num_blocks: PositiveInt = 4
    attn_resolutions: Annotated[tuple[PositiveInt, ...], Listed] = (16,)
    dropout: Probability = 0.10
    embedding: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: PositiveInt = 1
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    resample_filter: Annotated[tuple[int, ...], Listed] = (1, 1)
    implicit_mlp: bool = Field(
        False, description="a pixel-wise perceptron before the first 3x3 convolution"
    )


class AdmUNetConfig(UNetSection):
    """The ADM U-Net (Dhariwal & Nichol 2021), as in EDM."""

    kind: Literal["adm_unet"] = "adm_unet"
    model_channels: PositiveInt = 192
    channel_mult: Annotated[tuple[PositiveInt, ...], Listed] = (1, 2, 3, 4)
    channel_mult_emb: PositiveInt = 4
    num_blocks: PositiveInt = 3
    attn_resolutions: Annotated[tuple[PositiveInt, ...], Listed] = (32, 16, 8)
    dropout: Probability = 0.10


class BrickConfig(Section):
    """One brick: side of its patches and of its tokens in pixels, number of blocks."""

    size: PositiveInt
    patch: PositiveInt = 2
    depth: PositiveInt

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"size ({self.size}) must be a multiple of patch ({self.patch})")
        return self


class LegoConfig(Section):
    """LEGO bricks (Zheng et al. 2024): a stack of transformers on patches of several sizes."""

    kind: Literal["lego"] = "lego"
    bricks: tuple[BrickConfig, ...] = Field(min_length=1, description="first to last")
    width: PositiveInt = Field(384, description="of the tokens; a multiple of heads and of 4")
    heads: PositiveInt = 6
    mlp_ratio: PositiveFloat = 4
    joint: bool = Field(True, description="train every brick's output, so that bricks can skip")
    positions: Literal["fixed", "learned"] = Field(
        "fixed", description="table of token positions; learned in the released models"
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width ({self.width}) must be a multiple of heads ({self.heads}) and of 4"
            )
        return self

    def fits(self, side: int) -> bool:
        """Whether the bricks tile a canvas of this height or width; see `networks.lego.Lego`."""
        return all(side % (b.patch if side < b.size else b.size) == 0 for b in self.bricks)

    @property
    def sides(self) -> str:
        """Which heights and widths fit, and why."""
        step = math.lcm(*(brick.size for brick in self.bricks))
        small = [str(side) for side in range(1, step) if self.fits(side)]
        sizes = " or ".join([f"a multiple of {step}", *([", ".join(small)] if small else [])])
        return f"{sizes}, to be tiled by network.bricks"


class PatchedUNetConfig(Section):
    """The patched U-Net (Luhman & Luhman 2022): a U-Net on P x P patches as pixels."""

    kind: Literal["patched_unet"] = "patched_unet"
    patch_size: PositiveInt = Field(4, description="side P of a patch, pixels; 1 for none")
    model_channels: PositiveInt = 128
    channel_mult: Annotated[tuple[PositiveFloat, ...], Listed] = Field(
        (), description="widths as multiples, fractions allowed; empty: by the patched grid"
    )
    num_blocks: PositiveInt = 2
    attn_resolutions: Annotated[tuple[PositiveInt, ...], Listed] = Field(
        (16, 8), description="sides of the patched grid with self-attention"
    )
    heads: PositiveInt = 4
    decoder_heads: PositiveInt | None = Field(None, description="null: as many as heads")
    head_channels: PositiveInt | None = Field(None, description="width of a head, not a number")
    attention_order: Literal["split", "legacy"] = Field(
        "split", description="rows of the qkv weight; legacy: head by head"
    )
    resblock_updown: bool = Field(False, description="resample inside of residual blocks")
    dropout: Probability = 0.0
    null_class: bool = Field(True, description="learn an embedding of no class, for guidance")
    learn_variance: bool = Field(False, description="a head for the variance of reverse steps")
    eps: PositiveFloat = Field(1e-5, description="of the affine group norms")
    recompute: bool = Field(False, description="recompute blocks going back, for less memory")

    def fits(self, side: int) -> bool:
        """Whether the network takes images of this height or width."""
        levels = len(self.channel_mult)
        return side % (self.patch_size << max(levels - 1, 0)) == 0

    @property
    def sides(self) -> str:
        """Which heights and widths it takes, and why."""
        levels = len(self.channel_mult)
        return (
            f"a multiple of {self.patch_size << max(levels - 1, 0)}, because network.patch_size is "
            f"{self.patch_size} and network.channel_mult has {levels} levels"
        )


NetworkConfig = Annotated[
    SongUNetConfig | AdmUNetConfig | LegoConfig | PatchedUNetConfig, Field(discriminator="kind")
]


# ------------------------------------------------------------------------------------- diffusion


class EdmPreconditioning(Section):
    """EDM (Karras et al. 2022), table 1."""

    kind: Literal["edm"] = "edm"
    sigma_data: PositiveFloat = 0.5


class VpPreconditioning(Section):
    """Variance preserving (Song et al. 2021), EDM table 1."""

    kind: Literal["vp"] = "vp"
    beta_d: PositiveFloat = 19.9
    beta_min: PositiveFloat = 0.1
    timesteps: PositiveInt = 1000
    epsilon_t: PositiveFloat = 1e-5
    released_sigma_min: bool = Field(
        False, description="σ(ε_t) as float32 cancellation leaves it in the released baselines"
    )


class VePreconditioning(Section):
    """Variance exploding (Song et al. 2021), EDM table 1."""

    kind: Literal["ve"] = "ve"
    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat = 100


class IddpmPreconditioning(Section):
    """Improved DDPM (Nichol & Dhariwal 2021), EDM table 1; the network has 2 C output channels."""

    kind: Literal["iddpm"] = "iddpm"
    c_1: PositiveFloat = 0.001
    c_2: PositiveFloat = 0.008
    timesteps: PositiveInt = 1000


class DiscretePreconditioning(Section):
    """The T steps of a variance-preserving process (DDPM, improved DDPM, PDM)."""

    kind: Literal["discrete"] = "discrete"
    schedule: str = Field("linear", description="linear, linear0.025 (its end), ..., or cosine")
    timesteps: PositiveInt = 1000
    spacing: str = Field("", description="train on these steps only, like 250 or ddim50")
    prediction: Literal["x0", "eps", "v"] = Field("x0", description="what the network predicts")
    rescale_timesteps: bool = Field(False, description="tell the network 1000 t / timesteps")


PreconditioningConfig = Annotated[
    EdmPreconditioning
    | VpPreconditioning
    | VePreconditioning
    | IddpmPreconditioning
    | DiscretePreconditioning,
    Field(discriminator="kind"),
]


class ObjectiveSection(Section):
    """What every objective has."""

    label_dropout: Probability = Field(
        0.0, description="share of images trained without their class, for guidance"
    )


class EdmObjective(ObjectiveSection):
    """EDM, equation 6: log-normal σ, weight (σ² + σ_d²) / (σ σ_d)²."""

    kind: Literal["edm"] = "edm"
    p_mean: float = -1.2
    p_std: PositiveFloat = 1.2
    sigma_data: PositiveFloat = 0.5


class VpObjective(ObjectiveSection):
    """Variance preserving: uniform t, weight 1 / σ²."""

    kind: Literal["vp"] = "vp"
    beta_d: PositiveFloat = 19.9
    beta_min: PositiveFloat = 0.1
    epsilon_t: PositiveFloat = 1e-5


class VeObjective(ObjectiveSection):
    """Variance exploding: log-uniform σ, weight 1 / σ²."""

    kind: Literal["ve"] = "ve"
    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat = 100


class DiscreteObjective(ObjectiveSection):
    """The steps of a discrete process: weighted error, and a bound for learned variances."""

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


ObjectiveConfig = Annotated[
    EdmObjective | VpObjective | VeObjective | DiscreteObjective, Field(discriminator="kind")
]


# -------------------------------------------------------------------------------------- sampling


class EdmSampler(Section):
    """EDM, algorithm 2 (deterministic with s_churn 0)."""

    kind: Literal["edm"] = "edm"
    steps: PositiveInt = 18
    solver: Literal["heun", "euler"] = "heun"
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80
    rho: PositiveFloat = 7
    s_churn: NonNegative = 0
    s_min: NonNegative = 0
    s_max: NonNegative = math.inf
    s_noise: NonNegative = 1


class AblationSampler(Section):
    """EDM, algorithm 1 generalised: any time steps, schedule σ(t) and scaling s(t)."""

    kind: Literal["ablation"] = "ablation"
    steps: PositiveInt = 18
    solver: Literal["heun", "euler"] = "heun"
    discretization: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    schedule: Literal["linear", "vp", "ve"] = "linear"
    scaling: Literal["none", "vp"] = "none"
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None
    rho: PositiveFloat = 7
    epsilon_s: PositiveFloat = 1e-3
    c_1: PositiveFloat = 0.001
    c_2: PositiveFloat = 0.008
    timesteps: PositiveInt = 1000
    alpha: PositiveFloat = 1
    s_churn: NonNegative = 0
    s_min: NonNegative = 0
    s_max: NonNegative = math.inf
    s_noise: NonNegative = 1


class ProcessSampler(Section):
    """What samplers of discrete processes share."""

    steps: str = Field(
        "", description="number, list (90,60,60,20,20) or ddimN; empty for all of the process"
    )
    clip: Literal["auto", "none", "static", "dynamic"] = Field(
        "auto", description="estimates of the image; auto: dynamic with guidance, static without"
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


# -------------------------------------------------------------------------------------- training


class OptimizerConfig(Section):
    """Adam or AdamW, and the course of the learning rate over images seen."""

    kind: Literal["adam", "adamw"] = "adam"
    lr: PositiveFloat = 1e-3
    betas: Annotated[tuple[Probability, Probability], Listed] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of the whole gradient")
    rampup_images: int = Field(10_000_000, ge=0, description="linear warm-up from 0")
    decay: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant"
    decay_start_images: int = Field(0, ge=0, description="images before the decay begins")
    final_lr: NonNegative = Field(0, description="where cosine and linear decay end")

    @model_validator(mode="after")
    def _decay_has_a_start(self) -> Self:
        if self.decay == "inverse_sqrt" and self.decay_start_images == 0:
            raise ValueError("decay=inverse_sqrt needs decay_start_images above 0")
        return self


class EmaConfig(Section):
    """One exponential moving average of the weights."""

    halflife_images: PositiveFloat = 500_000
    rampup_ratio: PositiveFloat | None = Field(
        0.05, description="half-life at most this share of the images seen; null for no ramp-up"
    )


class TrainingConfig(Section):
    """How long, how much at once, in which precision."""

    images: PositiveInt = Field(200_000_000, description="images to train on, in all")
    batch: PositiveInt = Field(512, description="images of one optimiser step, over all devices")
    micro_batch: PositiveInt | None = Field(
        None, description="images of one forward pass on one device; less memory, same result"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    channels_last: bool = True
    parallel: Literal["ddp", "fsdp"] = "ddp"
    loss_scale: PositiveFloat | None = Field(
        None, description="fixed loss scale; by default 1, and dynamic in fp16"
    )
    nonfinite: Literal["skip", "replace"] = Field(
        "skip", description="skip steps with NaN or infinite gradients, or replace them (as EDM)"
    )
    max_skipped: PositiveInt = Field(20, description="skipped steps in a row that end the run")
    seed: int = Field(0, ge=0)
    initial_weights: str | None = Field(
        None, description="pipeline or run whose averaged weights the training starts from"
    )

    @model_validator(mode="after")
    def _replaceable(self) -> Self:
        # A dynamic scale finds its value by overflowing, and must not learn from the overflows.
        if self.nonfinite == "replace" and self.precision == "fp16" and self.loss_scale is None:
            raise ValueError("nonfinite=replace in fp16 needs a fixed loss_scale, for example 100")
        return self

    @model_validator(mode="after")
    def _whole_rounds(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})"
            )
        return self


class PreviewConfig(Section):
    """Sample grids made while training, always from the same seeds."""

    every_images: PositiveInt = 2_500_000
    rows: PositiveInt = 8
    columns: PositiveInt = 8


Metric = Literal["fd", "fid", "sfid", "is", "kid", "pr"]


class EvaluateConfig(Section):
    """Scores of samples from the averaged weights while training; the best model is kept."""

    metrics: Annotated[tuple[Metric, ...], Listed] = Field(
        ("fd",), min_length=1, description="the first decides which model is best"
    )
    every_images: PositiveInt = 5_000_000
    images: int = Field(5_000, ge=2, description="samples for a score, always of the same seeds")
    batch: PositiveInt = 64
    features: Literal["classifier", "inception", "dinov2"] = "classifier"
    weights: str | None = Field(None, description="file with the weights of the extractor")
    reference: str | None = Field(
        None, description="reference file or real images; by default the training images"
    )

    @model_validator(mode="after")
    def _of_these_features(self) -> Self:
        only = [metric for metric in self.metrics if metric in ("fid", "sfid", "is")]
        if only and self.features != "inception":
            raise ValueError(
                f"{', '.join(only)} need evaluate.features=inception; the distance on "
                "other features is called fd"
            )
        if "kid" in self.metrics and self.images < 1000:
            raise ValueError("kid needs at least 1,000 evaluate.images")
        return self


class RunConfig(Section):
    """The run folder and what is written to it."""

    dir: str | None = Field(None, description="run folder; by default runs/<recipe>-<number>")
    log_every_images: PositiveInt = 50_000
    checkpoint_every_images: PositiveInt = 2_500_000
    keep: PositiveInt = Field(2, description="checkpoints kept")
    preview: PreviewConfig | None = PreviewConfig()
    tensorboard: bool = True
    wandb: str | None = Field(None, description="Weights & Biases project")


class Recipe(Section):
    """Everything that makes a model: data, network, diffusion, training, and how it is sampled."""

    name: str
    description: str = ""
    data: DataConfig
    codec: CodecConfig = PixelCodec()
    view: ViewConfig = FullView()
    coords: CoordsConfig | None = Field(
        None, description="coordinates as input; null: x and y if the view is of patches"
    )
    augment: AugmentConfig | None = None
    low_resolution: PositiveInt | None = Field(
        None, description="side of the small image that the network enlarges (super-resolution)"
    )
    network: NetworkConfig
    preconditioning: PreconditioningConfig = EdmPreconditioning()
    objective: ObjectiveConfig = EdmObjective()
    snr_splits: Annotated[tuple[PositiveFloat, ...], Listed] = Field(
        (), description="thresholds of the signal-to-noise ratio between experts, falling"
    )
    expert: int | None = Field(
        None, ge=0, description="train this expert's noise levels only; 0 is the cleanest"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: tuple[EmaConfig, ...] = Field((EmaConfig(),), min_length=1)
    training: TrainingConfig = TrainingConfig()
    sampling: SamplerConfig = EdmSampler()
    evaluate: EvaluateConfig | None = None
    run: RunConfig = RunConfig()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's images in model space."""
        if isinstance(self.codec, VaeCodec):
            side = self.data.resolution // self.codec.downsample
            return self.codec.channels, side, side
        return self.data.channels, self.data.resolution, self.data.resolution

    @property
    def coord_frequencies(self) -> int | None:
        """Of the network's coordinate channels; None if it has none."""
        if isinstance(self.network, LegoConfig):
            return 0
        if self.coords is not None:
            return self.coords.frequencies
        return 0 if isinstance(self.view, PatchView) else None

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """Sides of all images that the network is trained on, in model space, small to large."""
        side = self.shape[1]
        if not isinstance(self.view, PatchView):
            return (side,)
        if self.view.sizes is not None:
            return self.view.sizes
        if isinstance(self.codec, VaeCodec):
            return (side // 2, side)
        return (side // 4, side // 2, side)

    @property
    def augment_dim(self) -> int:
        """Number of augmentation labels that the network is built for."""
        return self.augment.label_dim if self.augment is not None else 0

    @model_validator(mode="after")
    def _latents_fit(self) -> Self:
        data, codec = self.data, self.codec
        if not isinstance(codec, VaeCodec):
            return self
        if data.channels != 3:
            raise ValueError("codec.kind=vae makes latents of RGB images; set data.channels=3")
        if data.resolution % codec.downsample:
            raise ValueError(
                f"data.resolution ({data.resolution}) must be a multiple of codec.downsample "
                f"({codec.downsample}), because each latent pixel stands for so many of the image"
            )
        if self.augment is not None:
            raise ValueError(
                "augment works on images and not on latents; set augment=null, and data.xflip=true "
                "for mirrored images"
            )
        return self

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if not self.network.fits(self.shape[1]):
            latents = (
                f" makes latents of side {self.shape[1]}, which"
                if isinstance(self.codec, VaeCodec)
                else ""
            )
            raise ValueError(
                f"data.resolution ({self.data.resolution}){latents} must be {self.network.sides}"
            )
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
    def _steps_fit(self) -> Self:
        preconditioning = self.preconditioning
        tabled = isinstance(preconditioning, DiscretePreconditioning | IddpmPreconditioning)
        if isinstance(self.objective, DiscreteObjective) and not tabled:
            raise ValueError(
                "objective.kind=discrete needs a model that knows discrete noise levels; set "
                "preconditioning.kind=discrete (or iddpm), or choose another objective"
            )
        learns = isinstance(self.network, PatchedUNetConfig) and self.network.learn_variance
        if learns and not isinstance(preconditioning, DiscretePreconditioning):
            raise ValueError(
                "network.learn_variance needs the steps that the variance is of: set "
                "preconditioning.kind=discrete, or leave it out"
            )
        if learns and not isinstance(self.objective, DiscreteObjective):
            raise ValueError(
                "network.learn_variance is trained by objective.kind=discrete only; choose that, "
                "or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _small_images_fit(self) -> Self:
        if self.low_resolution is None:
            return self
        if self.data.resolution % self.low_resolution or self.low_resolution == self.shape[1]:
            raise ValueError(
                f"low_resolution ({self.low_resolution}) must be a part of data.resolution "
                f"({self.data.resolution}) that it is a multiple of"
            )
        pixels = isinstance(self.codec, PixelCodec) and not isinstance(self.view, PatchView)
        if isinstance(self.network, LegoConfig) or not pixels:
            raise ValueError("low_resolution works with U-Nets on whole images of pixels only")
        if self.evaluate is not None:
            raise ValueError(
                "evaluate cannot score models that enlarge images (low_resolution) while they are "
                "trained; leave it out, and score samples of small images afterwards"
            )
        return self

    @model_validator(mode="after")
    def _bricks_know_coordinates(self) -> Self:
        if not isinstance(self.network, LegoConfig):
            return self
        if self.coords is not None and self.coords.frequencies:
            raise ValueError(
                "coords.frequencies: bricks always see the plain coordinates; set it to 0, or "
                "leave out coords"
            )
        if isinstance(self.preconditioning, IddpmPreconditioning):
            raise ValueError(
                "preconditioning.kind: iddpm needs a network that learns variances, which bricks "
                "do not; choose edm, vp or ve"
            )
        return self

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        view, side = self.view, self.shape[1]
        if not isinstance(view, PatchView):
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
    def _adm_attention(self) -> Self:
        network = self.network
        if not isinstance(network, AdmUNetConfig):
            return self
        for level, mult in enumerate(network.channel_mult):
            resolution, width = self.shape[1] >> level, network.model_channels * mult
            if resolution in network.attn_resolutions and width % 64:
                raise ValueError(
                    f"network.attn_resolutions asks for attention at {resolution}, where the ADM "
                    f"network is {width} channels wide; its heads need a multiple of 64 channels. "
                    f"Change network.model_channels or leave {resolution} out"
                )
        return self
