"""How a model is trained, scored meanwhile, and what a run writes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tessera.precision import Precision
from tessera.recipes.schema.base import (
    Factor,
    HalfLife,
    Images,
    ImagesFromZero,
    Listed,
    NonNegative,
    Probability,
    Section,
    UserPath,
)


class OptimizerConfig(Section):
    """Adam or AdamW, and the course of the learning rate over images seen."""

    kind: Literal["adam", "adamw"] = Field(
        "adam", description="adam, or adamw, which decays weights apart from the gradient"
    )
    lr: PositiveFloat = Field(1e-3, description="learning rate")
    lr_batch: PositiveInt | None = Field(
        None, description="batch that lr is meant for; another one scales it; null: whatever it is"
    )
    betas: Annotated[tuple[Probability, Probability], Listed] = Field(
        (0.9, 0.999), description="of Adam's averages of the gradient and of its square"
    )
    eps: PositiveFloat = Field(1e-8, description="added to the root of that square")
    weight_decay: NonNegative = Field(0, description="strength; of adamw apart from the gradient")
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of the whole gradient")
    rampup_images: ImagesFromZero = Field(10_000_000, description="linear warm-up from 0")
    decay: Literal["constant", "cosine", "linear", "inverse_sqrt"] = Field(
        "constant", description="course of lr after the warm-up"
    )
    decay_start_images: ImagesFromZero = Field(0, description="images before the decay begins")
    final_lr: NonNegative = Field(0, description="where cosine and linear decay end")

    @model_validator(mode="after")
    def _decay_has_a_start(self) -> Self:
        if self.decay == "inverse_sqrt" and self.decay_start_images == 0:
            raise ValueError("decay=inverse_sqrt needs decay_start_images above 0")
        return self

    def for_batch(self, batch: int) -> OptimizerConfig:
        """With the learning rate of steps over `batch` images: lr x batch / lr_batch."""
        if self.lr_batch is None:
            return self
        return self.model_copy(update={"lr": self.lr * batch / self.lr_batch, "lr_batch": None})


class EmaConfig(Section):
    """One exponential moving average of the weights."""

    halflife_images: HalfLife = Field(
        500_000, description="images after which a weight counts half"
    )
    rampup_ratio: PositiveFloat | None = Field(
        0.05, description="half-life at most this share of the images seen; null for no ramp-up"
    )


class TrainingConfig(Section):
    """How long, how much at once, in which precision."""

    images: Images = Field(200_000_000, description="images to train on, in all")
    minutes: PositiveFloat | None = Field(
        None, description="end well after so many minutes of steps, though images are left"
    )
    batch: PositiveInt = Field(
        512, le=2**20, description="images of one optimiser step, over all devices"
    )
    micro_batch: PositiveInt | None = Field(
        None, description="images of one forward pass on one device; less memory, same result"
    )
    precision: Precision = Field(
        "auto", description="auto: bf16 where the device multiplies it natively, else fp32"
    )
    compile: bool = Field(
        False, description="compile the step by torch.compile: slow to start, then faster"
    )
    channels_last: bool = Field(
        True, description="memory layout of convolutions, faster on most devices"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: a copy of the model on each, or its parts shared out"
    )
    loss_scale: PositiveFloat | None = Field(
        None, description="fixed loss scale; by default 1, and dynamic in fp16"
    )
    nonfinite: Literal["skip", "replace"] = Field(
        "skip", description="skip steps with NaN or infinite gradients, or replace them (as EDM)"
    )
    max_skipped: PositiveInt = Field(20, description="skipped steps in a row that end the run")
    seed: int = Field(0, ge=0, description="of all random draws of the run")
    initial_weights: UserPath | None = Field(
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

    every_images: Images = Field(2_500_000, description="images of the training between two grids")
    rows: Factor = Field(8, description="of the grid")
    columns: Factor = Field(8, description="of the grid")
    labels: Annotated[tuple[int | str, ...] | None, Listed] = Field(
        None, min_length=1, description="classes shown, by number or name; null: one after another"
    )

    @model_validator(mode="after")
    def _room_for_labels(self) -> Self:
        if self.labels is not None and len(self.labels) > self.rows * self.columns:
            raise ValueError(
                f"labels has {len(self.labels)} classes, and rows x columns shows "
                f"{self.rows * self.columns} images"
            )
        return self


Metric = Literal["fd", "fid", "sfid", "is", "kid", "pr"]


class EvaluateConfig(Section):
    """Scores of samples from the averaged weights while training; the best model is kept."""

    metrics: Annotated[tuple[Metric, ...], Listed] = Field(
        ("fd",), min_length=1, description="the first decides which model is best"
    )
    every_images: Images = Field(5_000_000, description="images of the training between two scores")
    images: int = Field(5_000, ge=2, description="samples for a score, always of the same seeds")
    batch: PositiveInt = Field(64, description="samples made at once")
    features: Literal["classifier", "inception", "dinov2"] = Field(
        "classifier",
        description="what the scores compare: those of a classifier, Inception, DINOv2",
    )
    weights: UserPath | None = Field(None, description="file with the weights of the extractor")
    reference: UserPath | None = Field(
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
        if self.weights is not None and self.features == "classifier":
            raise ValueError(
                "the classifier has no file of weights, it is trained on the real images; "
                "evaluate.weights goes with evaluate.features=inception or dinov2"
            )
        if "kid" in self.metrics and self.images < 1000:
            raise ValueError("kid needs at least 1,000 evaluate.images")
        return self


class ValidationConfig(Section):
    """The loss of the averaged weights on images that are not trained on (`data.validation`)."""

    every_images: Images = Field(
        2_500_000, description="images of the training between two measurements"
    )
    images: PositiveInt = Field(10_000, description="images of the set, always the same; at most")


class RunConfig(Section):
    """The run folder and what is written to it."""

    dir: UserPath | None = Field(None, description="run folder; by default runs/<recipe>-<number>")
    log_every_images: Images = Field(
        50_000, description="images of the training between two lines of the log"
    )
    checkpoint_every_images: Images = Field(
        2_500_000, description="images of the training between two checkpoints"
    )
    keep: PositiveInt = Field(2, description="checkpoints kept")
    save_vae: bool = Field(
        False, description="save the VAE of a model of latents in its pipeline folders"
    )
    preview: PreviewConfig | None = Field(
        PreviewConfig(), description="grids of samples while training; null for none"
    )
    histograms_every_images: Images | None = Field(
        None, description="histograms of weights and gradients, to TensorBoard and wandb"
    )
    tensorboard: bool = Field(True, description="write events for TensorBoard")
    wandb: str | None = Field(None, description="Weights & Biases project")
    report: bool = Field(
        False, description="`tessera train` writes report.html into the run folder at its end"
    )
    timeout_minutes: PositiveFloat = Field(
        30, description="longest that one of several processes waits for the others"
    )
