"""A small classifier trained on the reference images themselves, as a feature extractor.

It needs no downloaded weights and knows the domain, so that scores work offline and for any kind of
image. Its distances compare models on one data set; they are not FID and say nothing across data
sets. Labelled images are told apart by their class; unlabelled ones by which quarter turn they were
given (Gidaris et al. 2018), which asks for images that have an upright position.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tessera.errors import DataError
from tessera.images import from_uint8
from tessera.progress import progress
from tessera.randomness import derive_seed, numpy_generator

_LARGEST = 64  # pixels; larger images are averaged down, so finer detail is not judged
_BATCH = 128
_FEWEST = 10
_RATE = 3e-3
# Images to train on at most, unless the caller says: so many times the set, within bounds.
_REPETITIONS, _LEAST, _MOST = 12, 8_000, 60_000
_LOOK_STEPS, _LOOK_IMAGES = 20, 1000  # steps between looks at the accuracy, on so many images
# Looks without a better accuracy, after which it has stopped to rise; in the middle of the cycle,
# where steps are largest, that of hard sets stands still for long before it rises again.
_PATIENCE, _EASY, _PATIENCE_EASY = 9, 0.9, 3
_REST = 2 / 3  # of the steps until then are taken for the rest


class LabelledImages(Protocol):
    """A set of N images of one shape; what `tessera.data.open_dataset` returns is one."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def labels(self) -> NDArray[Any] | None: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class ClassifierFacts:
    """What there is to know about a trained classifier beside its weights.

    Attributes:
        task: "classes" of the data set, or "rotations" by quarter turns if it has no labels.
        shape: (C, H, W) of the images.
        outputs: number of classes.
        accuracy: share of held-out real images that it gets right.
        held_out: number of those images.
        seed: of its training.
        class_names: names of the classes, if known.
    """

    task: Literal["classes", "rotations"]
    shape: tuple[int, int, int]
    outputs: int
    accuracy: float = 0.0
    held_out: int = 0
    seed: int = 0
    class_names: tuple[str, ...] | None = None


class ClassifierNetwork(nn.Module):
    """Convolutions that halve the image down to about 4 x 4; mean features; one linear layer."""

    dim = 128

    def __init__(self, shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        channels, size = shape[0], min(max(shape[1:]), _LARGEST)
        stride = 2 if size > 32 else 1
        layers, width = [_convolution(channels, 32, stride)], 32
        size = -(-size // stride)
        while size > 4 or width < self.dim:
            wider = min(2 * width, self.dim)
            layers += [_convolution(width, wider, 2 if size > 4 else 1), _convolution(wider, wider)]
            width, size = wider, -(-size // 2)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, dim]."""
        x = from_uint8(images)
        if max(x.shape[2:]) > _LARGEST:
            scale = _LARGEST / max(x.shape[2:])
            x = F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        means: Tensor = x.mean(dim=(2, 3))
        return means

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to logits [B, outputs]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(type(side) is int and 0 < side < 2**16 for side in value)
    )


def _convolution(width: int, wider: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, wider, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(wider),
        nn.ReLU(inplace=True),
    )


class Classifier:
    """A trained in-domain classifier; its features are its last layer but one.

    Attributes:
        name: "in-domain classifier" or "in-domain rotation classifier".
        dim: 128.
        facts: its task and how well it does it.
    """

    def __init__(self, network: ClassifierNetwork, facts: ClassifierFacts) -> None:
        self.network = network.eval().requires_grad_(False)
        self.facts = facts
        self.dim = network.dim
        self.name = (
            "in-domain classifier" if facts.task == "classes" else "in-domain rotation classifier"
        )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, dim], on the classifier's device.

        Raises:
            DataError: images of another shape than the classifier was trained on.
        """
        features: Tensor = self.network.features(self._fitting(images))
        return features

    def predict(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to the likeliest class of each, int64 [B], on the CPU."""
        logits: Tensor = self.network(self._fitting(images))
        return logits.argmax(dim=1).cpu()

    def _fitting(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.facts.shape:
            raise DataError(
                f"images of {_words(tuple(images.shape[1:]))} cannot be scored against a reference "
                f"of {_words(self.facts.shape)}"
            )
        return images.to(self.network.head.weight.device)

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Facts (JSON-able) and weights, for `from_state`."""
        weights = {k: v.cpu().numpy() for k, v in self.network.state_dict().items()}
        return asdict(self.facts), weights

    @classmethod
    def from_state(cls, facts: dict[str, Any], weights: dict[str, NDArray[Any]]) -> Classifier:
        """The classifier that `state` described.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: the state is not one of this class.
        """
        head = weights["head.bias"]
        if not _is_shape(facts["shape"]) or (facts["outputs"],) != head.shape:
            raise ValueError("a classifier of impossible shape")
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise ValueError("a classifier whose weights are not finite")
        names = facts["class_names"]
        lists = {"shape": tuple(facts["shape"]), "class_names": names and tuple(names)}
        known = ClassifierFacts(**{**facts, **lists})
        network = ClassifierNetwork(known.shape, known.outputs)
        network.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
        return cls(network, known)


def train_classifier(
    data: LabelledImages,
    *,
    seed: int = 0,
    training_images: int | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a classifier on four fifths of `data`; its accuracy is measured on the rest.

    It takes a minute or two on a CPU for images of up to 32 x 32: the training ends soon after the
    accuracy has stopped to rise. The same seed on the same machine gives the same classifier.

    Args:
        data: the reference images. Without classes, or with one only, quarter turns are told apart.
        seed: of the split, the initial weights and the order of the images.
        training_images: images to train on at most, counting repetitions; by default twelve times
            the set, but from 8,000 to 60,000.
        device: where to train; the classifier stays there.

    Raises:
        DataError: too few images, or unlabelled images that are not square.
    """
    facts = _facts(data, seed)
    order = numpy_generator(seed, "classifier", "split").permutation(len(data))
    held_out, training = np.split(order, [min(max(1, len(order) // 5), 5000)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifier", "weights"))
        network = ClassifierNetwork(facts.shape, facts.outputs).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if training_images is None:
        training_images = min(max(_REPETITIONS * len(data), _LEAST), _MOST)
    _train(network, data, facts, training, held_out[:_LOOK_IMAGES], training_images)
    known = replace(
        facts, accuracy=_accuracy(network, data, facts, held_out), held_out=len(held_out)
    )
    return Classifier(network, known)


def class_labels(data: LabelledImages) -> NDArray[np.int64] | None:
    """One class per image, int64 [N]; None if there are no labels, or vectors of attributes."""
    return None if data.labels is None or data.labels.ndim != 1 else data.labels


def _facts(data: LabelledImages, seed: int) -> ClassifierFacts:
    if len(data) < _FEWEST:
        raise DataError(
            f"{data.name}: {len(data)} images are too few to train a classifier on; "
            f"give at least {_FEWEST}"
        )
    labels = class_labels(data)
    if labels is not None and len(np.unique(labels)) > 1:
        outputs = int(labels.max()) + 1
        return ClassifierFacts(
            "classes", data.shape, outputs, seed=seed, class_names=data.class_names
        )
    if data.shape[1] != data.shape[2]:
        raise DataError(
            f"{data.name}: without labels the classifier tells quarter turns apart, which needs "
            f"square images, not {_words(data.shape)}. Crop them, or sort them into class folders"
        )
    return ClassifierFacts("rotations", data.shape, 4, seed=seed)


def _train(
    network: ClassifierNetwork,
    data: LabelledImages,
    facts: ClassifierFacts,
    training: NDArray[np.int64],
    held_out: NDArray[np.int64],
    most: int,
) -> None:
    """AdamW with one learning-rate cycle, over shuffled epochs of images moved by a few pixels.

    When the accuracy on `held_out` has stopped to rise, the rest of the cycle is passed in larger
    strides: without its end, the weights are not worth much.
    """
    steps = max(2, most // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    random = numpy_generator(facts.seed, "classifier", "order")
    queue, risen = np.empty(0, np.int64), _Risen()
    network.train()
    with progress("classifier", steps * _BATCH, unit="images") as bar:
        step, passed, stride = 0, 0, 1
        while passed < steps:
            while len(queue) < _BATCH:
                queue = np.concatenate([queue, random.permutation(training)])
            indices, queue = queue[:_BATCH], queue[_BATCH:]
            batch, targets = _read(data, facts, indices, random)
            batch = _shift(batch, random).to(network.head.weight.device)
            loss = F.cross_entropy(network(batch), targets.to(batch.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step, note = step + 1, None
            if stride == 1 and step % _LOOK_STEPS == 0:
                accuracy = _accuracy(network, data, facts, held_out)
                note = f"{accuracy:.1%} right"
                if risen(accuracy):
                    stride = max(1, round((steps - step) / (step * _REST)))
            passed += stride
            for _ in range(min(stride, steps - 1 - schedule.last_epoch)):
                schedule.step()
            left = -(-(steps - passed) // stride)
            bar.update(step * _BATCH, note, total=(step + max(left, 0)) * _BATCH)


class _Risen:
    """Whether several looks in a row have shown no better accuracy."""

    def __init__(self) -> None:
        self._best, self._looks = 0.0, 0

    def __call__(self, accuracy: float) -> bool:
        self._looks = 0 if accuracy > self._best else self._looks + 1
        self._best = max(self._best, accuracy)
        return self._looks >= (_PATIENCE_EASY if self._best >= _EASY else _PATIENCE)


def _accuracy(
    network: ClassifierNetwork,
    data: LabelledImages,
    facts: ClassifierFacts,
    indices: NDArray[np.int64],
) -> float:
    """The share of some images that the network gets right; always the same of the same images."""
    right, random = 0, numpy_generator(facts.seed, "classifier", "test")
    mode, device = network.training, network.head.weight.device
    network.eval()
    with torch.no_grad():
        for chunk in np.array_split(indices, -(-len(indices) // _BATCH)):
            batch, targets = _read(data, facts, chunk, random)
            right += int((network(batch.to(device)).argmax(dim=1).cpu() == targets).sum())
    network.train(mode)
    return right / len(indices)


def _read(
    data: LabelledImages,
    facts: ClassifierFacts,
    indices: NDArray[np.int64],
    random: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Images uint8 [B, C, H, W] and what is to be said about them, int64 [B]."""
    batch = torch.from_numpy(np.array(data.read(indices)))
    labels = class_labels(data)
    if facts.task == "classes" and labels is not None:
        return batch, torch.from_numpy(np.array(labels[indices]))
    turns = torch.from_numpy(random.integers(4, size=len(batch)))
    turned = [
        torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(batch, turns, strict=True)
    ]
    return torch.stack(turned), turns


def _shift(batch: Tensor, random: np.random.Generator) -> Tensor:
    """Move each image by up to an eighth of its size, repeating its border."""
    _, _, height, width = batch.shape
    down = random.integers(-(height // 8), height // 8 + 1, size=(len(batch), 1))
    right = random.integers(-(width // 8), width // 8 + 1, size=(len(batch), 1))
    rows = torch.from_numpy((np.arange(height) + down).clip(0, height - 1))
    columns = torch.from_numpy((np.arange(width) + right).clip(0, width - 1))
    first = torch.arange(len(batch))[:, None, None]
    moved = batch.permute(0, 2, 3, 1)[first, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def _words(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    return f"{width}x{height} {colour}"
