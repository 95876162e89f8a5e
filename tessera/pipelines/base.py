"""What all pipelines share: from seeds to batches to pixels, saving, and facts about samples."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tessera.data.codec import Codec
from tessera.errors import TesseraError
from tessera.files import user_path
from tessera.images import to_pil
from tessera.model import Model, with_tensors
from tessera.pipelines import counting
from tessera.pipelines import folder as folders
from tessera.pipelines.labels import Label, Seeds, choose_labels, class_index, shortened
from tessera.pipelines.options import Option, Output, check_batch, check_output
from tessera.pipelines.plan import OnStep, Plan, SampledBatch, counting_steps
from tessera.pipelines.samples import Samples, facts_html
from tessera.pipelines.signature import PerModel
from tessera.progress import in_notebook, quantity
from tessera.progress import progress as progress_bar
from tessera.recipes.build import build_codec, build_model
from tessera.recipes.loading import dump_recipe
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.schema import Recipe
from tessera.sampling.core import NoiseSource, SamplerState, means
from tessera.sampling.seeds import SeedNoise


class Pipeline(ABC):
    """A model ready to make images; every kind of pipeline is one.

    Attributes:
        kind: of the pipeline, as its folder names it.
        recipe: how the model was made, with the sampler that it is used with.
        model: its weights are an average over the training.
        codec: turns its samples into images.
        images_seen: images that it was trained on.
        class_names: one for each class, or None.
        ema: name of the average, its half-life in images; one of `emas`.
        emas: names of the averages that the folder holds, the default first.
        checksum: SHA-256 of the weights file; None for a model that was not loaded from a folder.
        reported: what refinements say about the samples of the last call, such as the
            "acceptance_rate" of descent on energies.

    Example:
        >>> from tessera.pipelines.loading import build_pipeline
        >>> from tessera.recipes.loading import load_recipe
        >>> pipe = build_pipeline(load_recipe("quickstart-digits"))  # or tessera.load("runs/a")
        >>> pipe.sample(range(4), labels=3, guidance=1.5, steps=2).shape
        (4, 16, 16, 1)
    """

    kind: ClassVar[str]
    of_model: ClassVar[type[Model] | None] = None
    """What it samples from if that is trained as one; None where it is put together."""
    model: Model
    _warned = False

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        *,
        images_seen: int = 0,
        class_names: Sequence[str] | None = None,
        ema: str | None = None,
        emas: Sequence[str] = (),
        other_emas: Mapping[str, Mapping[str, Tensor]] | None = None,
        checksum: str | None = None,
        parts: Parts = NO_PARTS,
    ) -> None:
        """Args:
        other_emas: network state dicts of further averages by their names, to be saved along.
        parts: what the caller handed over in place of the recipe's external parts.
        """
        self.recipe, self.own_parts = recipe, parts
        self.model = model.eval()
        self.codec: Codec = build_codec(recipe.codec)
        self.images_seen = images_seen
        self.class_names = None if class_names is None else tuple(class_names)
        self.ema = ema if ema is not None else recipe.ema_names[0]
        self._others: dict[str, Mapping[str, Tensor]] = dict(other_emas or {})
        self.emas = tuple(emas) or (self.ema, *self._others)
        self.checksum = checksum
        self.reported: dict[str, float] = {}

    def _rows(self) -> dict[str, str]:
        """Facts for people."""
        names = f": {shortened(self.class_names)}" if self.class_names else ""
        return {
            "recipe": self.recipe.name,
            "shape": str(tuple(self.model.shape)),
            "classes": f"{self.model.num_classes or 'none'}{names}",
            "parameters": quantity(sum(p.numel() for p in self.model.parameters())),
            "images seen": f"{self.images_seen:,}",
            "ema": self.ema,
            "device": str(self.device),
        }

    def __repr__(self) -> str:
        lines = (f"  {name:<12} {value}" for name, value in self._rows().items())
        return "\n".join([f"pipeline of kind {self.kind}", *lines])

    def _repr_html_(self) -> str:
        return facts_html(f"pipeline of kind {self.kind}", self._rows())

    # ------------------------------------------------------------------ what each kind is made of

    @classmethod
    def open(cls, opened: folders.Opened) -> Self:
        """The pipeline of a folder whose configuration and parts were read."""
        model = build_model(opened.recipe, opened.own_parts)
        entry = opened.load_weights(model.network)
        if opened.recipe.training.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(
            opened.recipe,
            model,
            images_seen=opened.config.images_seen,
            class_names=opened.config.class_names,
            ema=entry.name,
            emas=[weights.name for weights in opened.config.weights],
            checksum=entry.sha256,
            parts=opened.own_parts,
        )

    @abstractmethod
    def options(self, sampler: str | None = None) -> list[Option]:
        """All options of `sample` that this model takes, with their defaults.

        Args:
            sampler: another kind than the recipe's.

        Raises:
            TesseraError: there is none of that kind.
        """

    @abstractmethod
    def plan(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None, **options: Any
    ) -> Plan:
        """What `sample_batches` was asked for, checked and ready for `run`.

        Args:
            options: see `sample_batches`.

        Raises:
            TesseraError: those of `sample_batches`.
        """

    def check_edits(self) -> None:
        """Check that the model can keep a part of a picture: whether `plan` takes `edit`.

        Raises:
            TesseraError: it cannot. By default none can.
        """
        raise TesseraError(
            f"{self.recipe.name} is a pipeline of kind {self.kind}, which makes whole pictures. "
            "Models of masked tokens (network.kind=mar) keep a part and make the rest"
        )

    def parts(self) -> dict[str, folders.WritePart]:
        """Sub-folders of the saved pipeline: (kind, function that writes it) by name."""
        return {}

    # ---------------------------------------------------------------------- saving, moving

    def save(self, folder: str | Path, *, codec: bool = False) -> None:
        """Write the pipeline folder, whole or not at all; an existing one is replaced.

        The weights in memory are saved; of a loaded pipeline, that is the average it was loaded
        with.

        Args:
            codec: save the autoencoder of a model of latents along, so that the folder makes
                images where there is no other copy.

        Raises:
            CheckpointError: something else than a pipeline is in the way.
            TesseraError: the codec has nothing to save.
        """
        parts = self.parts()
        if codec:
            parts["codec"] = ("codec", self.codec.save)
        folders.write_folder(
            user_path(folder),
            self.kind,
            dump_recipe(self.recipe),
            self._states(),
            images_seen=self.images_seen,
            class_names=self.class_names,
            parts=parts,
        )

    def _states(self) -> dict[str, Mapping[str, Tensor]]:
        """The network's state dict for each named average, the default first."""
        return {self.ema: self.model.network.state_dict(), **self._others}

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`."""
        self.model.to(device)
        return self

    def networks(self) -> list[nn.Module]:
        """The networks of the model: one, or one of each of its parts."""
        return self.model.networks()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def copied(self) -> Self:
        """The same pipeline with weights of its own."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other._others = {
            name: {key: tensor.clone() for key, tensor in state.items()}
            for name, state in self._others.items()
        }
        return other

    def without_weights(self) -> Self:
        """The same pipeline on tensors without data, to count what it would compute."""
        other = copy.copy(self)
        other.model = _on_meta(self.model)
        return other

    def cost(self, **options: Any) -> counting.Cost:
        """What the model costs; sampling with these options of `sample_batches`.

        Raises:
            TesseraError: an option that this model cannot have, or it cannot be counted.
        """
        with counting.explained(self.recipe):
            pipe = self.without_weights()
            plan = pipe.plan([0], None, **pipe.with_start(options))
            calls = counting.sampling(
                plan.networks(), lambda: [*pipe.states(plan, [0])], plan.helpers()
            )
            return counting.total_cost(self._training(), calls)

    def costs(self, **options: Any) -> dict[str, counting.Cost]:
        """What each of several models in a row costs, by name; nothing of a single one.

        Args:
            options: those of `cost`, which is the sum.

        Raises:
            TesseraError: those of `cost`.
        """
        return {}

    def with_start(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with blank pictures to start from where they are needed and not given."""
        return options

    def _training(self) -> counting.Training:
        """What training the model costs."""
        return counting.training(self.recipe, _on_meta(self.model), self.own_parts)

    # -------------------------------------------------------------------------------- sampling

    @overload
    def sample(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None,
        *, output: Literal["numpy"] = "numpy", **options: Any,
    ) -> NDArray[np.uint8]: ...  # fmt: skip

    @overload
    def sample(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None,
        *, output: Literal["pil"], **options: Any,
    ) -> list[Image.Image]: ...  # fmt: skip

    @overload
    def sample(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None,
        *, output: Literal["tensor"], **options: Any,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def sample(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None,
        *, output: Literal["samples"], **options: Any,
    ) -> Samples: ...  # fmt: skip

    def sample(
        self,
        seeds: Seeds,
        labels: Label | Iterable[Label] | None = None,
        *,
        output: Output = "numpy",
        progress: bool | None = None,
        batch: int = 64,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> NDArray[np.uint8] | list[Image.Image] | Tensor | Samples:
        """Make one image for each seed.

        Args:
            seeds: numbers, or text like "0-63,100".
            labels: see `sample_batches`.
            output: "numpy", uint8 [N, H, W, C]; "pil", a list of Pillow images; "tensor", uint8
                [N, C, H, W] on the CPU; "samples", a `Samples`, which a notebook shows.
            progress: show a bar; None: in notebooks.
            batch, on_step, options: those of `sample_batches`.

        Raises:
            TesseraError: no seeds, another output, or what `sample_batches` raises.

        `help(pipe.sample)` lists the options of the model at hand.
        """
        check_output(output)
        check_batch(batch)
        plan = self.plan(seeds, labels, **options)
        if not len(plan.seeds):
            raise TesseraError("`seeds` is empty: there is one image for each seed")
        shown = in_notebook() if progress is None else progress
        with progress_bar("sampling", len(plan.seeds), unit="images", shown=shown) as bar:
            counted = counting_steps(bar, on_step)
            made = Samples.of(
                self.run(plan, range(len(plan.seeds)), batch, counted), self.class_names
            )
        if output == "samples":
            return made
        images = made.images
        if output == "pil":
            return [to_pil(image) for image in images]
        if output == "tensor":
            return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return images

    def sample_batches(
        self,
        seeds: Seeds,
        labels: Label | Iterable[Label] | None = None,
        *,
        batch: int = 64,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Iterator[SampledBatch]:
        """Make one image for each seed, batch by batch, in the order of the seeds.

        A seed's image does not depend on the other seeds, on the batch size or on the device, but
        for the rounding of the network's arithmetic.

        Args:
            seeds: numbers, or text like "0-63,100".
            labels: one class for all, or one for each seed: index, name, or -1 for no class;
                "balanced" for seed modulo the number of classes; None to draw one per seed.
            batch: most images at once; the seeds are divided evenly.
            on_step: called after every step of every batch.
            options: `precision` of the network, and what this kind of pipeline takes: see
                `options()`, or `DiffusionPipeline.plan`.

        Raises:
            TesseraError: a class or an option that this model cannot have.
        """
        check_batch(batch)
        plan = self.plan(seeds, labels, **options)
        yield from self.run(plan, range(len(plan.seeds)), batch, on_step)

    def run(
        self, plan: Plan, rows: Sequence[int], batch: int = 64, on_step: OnStep | None = None
    ) -> Iterator[SampledBatch]:
        """Make images of a plan.

        Args:
            rows: numbers of the images among the plan's.
            batch, on_step: see `sample_batches`.
        """
        self.reported = {}
        if not len(rows):
            return
        for part in np.array_split(np.asarray(rows), math.ceil(len(rows) / batch)):
            ours = [plan.seeds[row] for row in part]
            # Closed at once where `on_step` raises, for the precision of the caller's own work.
            with contextlib.closing(self.states(plan, part)) as states:
                for done in states:
                    if on_step is not None:
                        on_step(ours, done[1])
            labels, state = done
            self.reported = means(plan.report())
            yield SampledBatch(
                ours,
                None if labels is None else labels.cpu().numpy(),
                self.to_pixels(plan.picture(state.x)),
            )

    def states(
        self, plan: Plan, rows: Sequence[int] | NDArray[np.int64]
    ) -> Generator[tuple[Tensor | None, SamplerState]]:
        """The classes [B] of some of a plan's images, made as one batch, and the steps."""
        ours = [plan.seeds[row] for row in rows]
        noise = plan.noise(SeedNoise(ours, self.device))
        start = plan.start(ours, noise)
        labels = self._labels(plan, np.asarray(rows), noise)
        for state in plan.states(ours, start, labels, noise):
            yield labels, state

    def check(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None, **options: Any
    ) -> None:
        """Raise the errors that `sample_batches` would raise with the same arguments."""
        self.plan(seeds, labels, **options)

    def labels(
        self, seeds: Seeds, labels: Label | Iterable[Label] | None = None, **options: Any
    ) -> NDArray[np.int64]:
        """The classes that `sample_batches` gives the images of `seeds`, without making them."""
        plan = self.plan(seeds, labels, **options)
        return self.drawn_labels(plan, range(len(plan.seeds)))

    def drawn_labels(self, plan: Plan, rows: Sequence[int]) -> NDArray[np.int64]:
        """The classes of a plan's images, int64 [n], without making them."""
        if plan.classes is not None:
            return plan.classes[np.asarray(rows, np.int64)]
        drawn = np.zeros(len(rows), np.int64)
        for index, row in enumerate(rows):
            noise = plan.noise(SeedNoise([plan.seeds[row]]))
            plan.start([plan.seeds[row]], noise)
            drawn[index] = noise.integers(self.model.num_classes).item()
        return drawn

    def _labels(self, plan: Plan, rows: NDArray[np.int64], noise: NoiseSource) -> Tensor | None:
        """The class of each image; drawn also where it is then another, as seeds are defined."""
        if self.model.num_classes == 0:
            return None
        drawn = noise.integers(self.model.num_classes)
        if plan.classes is None:
            return drawn
        return torch.from_numpy(plan.classes[rows]).to(self.device)

    def choose_labels(
        self, seeds: Sequence[int], labels: Label | Iterable[Label] | None
    ) -> NDArray[np.int64] | None:
        """Class indices, one a seed; None where each seed is to draw its own; see `labels`."""
        return choose_labels(labels, seeds, self.model.num_classes, self.class_names)

    def facts(self, plan: Plan, label: Label | None = None) -> dict[str, Any]:
        """All that decides what the image of a seed looks like, as plain JSON values.

        Args:
            label: class of all images, or "balanced"; None where each seed draws its own.
        """
        if label is not None and label != "balanced":
            label = class_index(label, self.model.num_classes, self.class_names)
        codec = self.codec.describe()
        return {
            "recipe": self.recipe.name,
            "images_seen": self.images_seen,
            "weights": self.checksum,
            "class": label,
            **plan.facts,
            **({} if codec is None else {"codec": codec}),
        }

    def _warn_if_classes_are_needed(self) -> None:
        """Say, once, that the model has not learned to do without a class."""
        if self.recipe.objective.label_dropout > 0 or self._warned:
            return
        self._warned = True
        warnings.warn(
            "this model was trained without label dropout, so it has not learned to do without a "
            "class, which guidance relies on; expect poor images. Train with "
            "objective.label_dropout=0.1, or guide by a weaker model",
            stacklevel=5,
        )

    def to_pixels(self, x: Tensor) -> NDArray[np.uint8]:
        """Model space [B, C, H, W] to uint8 [B, H, W, C] on the CPU; latents are decoded."""
        return self.codec.decode(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()


# For people: what the model at hand takes, instead of `**options`.
if not TYPE_CHECKING:
    Pipeline.sample = PerModel(Pipeline.sample)
    Pipeline.sample_batches = PerModel(Pipeline.sample_batches)


def _on_meta(model: Model) -> Model:
    made = with_tensors(model, lambda _name, tensor: torch.empty_like(tensor, device="meta"))
    assert isinstance(made, Model)
    return made
