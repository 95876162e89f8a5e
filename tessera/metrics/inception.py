"""The Inception network of FID: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2016).

It is written out here, and reads the weights that torch-fidelity and pytorch-fid publish, because
the scores hang on details that a stock Inception has otherwise: the resize of TensorFlow 1, average
pools that leave their padding out, a maximum in the last block, 1,008 classes. Batch norms are
folded into the convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import DataError

SIZE = 299
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
_EPSILON = 1e-3

# name, width, kernel, stride; those of stride 1 keep the size, those of stride 2 have no padding
_Layer = tuple[str, int, int | tuple[int, int], int]
# the layers of a branch one after the other; layers in a list are concatenated
_Branch = Sequence["_Layer | list[_Layer]"]


def tf1_resize(images: Tensor, size: int = SIZE) -> Tensor:
    """[B, C, H, W] to float32 [B, C, size, size] like TensorFlow 1's `resize_bilinear`.

    Corners are not aligned, pixels have no half-pixel centres, and nothing is smoothed when
    shrinking: output i reads at i * H / size. No mode of `interpolate` does that.
    """
    x = images.to(torch.float32)
    for dim in (3, 2):
        length = x.shape[dim]
        if length == size:
            continue
        position = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = position.floor().to(torch.int64)
        weight = (position - low).view((-1, 1) if dim == 2 else (-1,))
        high = (low + 1).clamp(max=length - 1)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


class _Convolution(nn.Conv2d):
    """Convolution with the following batch norm folded in, and ReLU."""

    def __init__(self, width: int, layer: _Layer, padded: bool | None = None) -> None:
        _, wider, kernel, stride = layer
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padded = stride == 1 if padded is None else padded
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        super().__init__(width, wider, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class _Mixed(nn.Module):
    """Branches side by side, the last of which pools."""

    def __init__(
        self,
        width: int,
        branches: Sequence[_Branch],
        pool: Literal["average", "max", "shrink"],
        pooled: int = 0,
    ) -> None:
        super().__init__()
        self._pool, self._branches = pool, branches
        for branch in branches:
            inner = width
            for stage in branch:
                layers = stage if isinstance(stage, list) else [stage]
                for layer in layers:
                    self.add_module(layer[0], _Convolution(inner, layer))
                inner = sum(layer[1] for layer in layers)
        if pool != "shrink":
            self.branch_pool = _Convolution(width, ("branch_pool", pooled, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            y = x
            for stage in branch:
                if isinstance(stage, list):
                    y = torch.cat([self.get_submodule(layer[0])(y) for layer in stage], dim=1)
                else:
                    y = self.get_submodule(stage[0])(y)
            outputs.append(y)
        if self._pool == "shrink":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self._pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            outputs.append(self.branch_pool(mean))
        return torch.cat(outputs, dim=1)


def _type_a(width: int, pooled: int) -> _Mixed:
    branches: list[_Branch] = [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [
            ("branch3x3dbl_1", 64, 1, 1),
            ("branch3x3dbl_2", 96, 3, 1),
            ("branch3x3dbl_3", 96, 3, 1),
        ],
    ]
    return _Mixed(width, branches, "average", pooled)


def _type_b(width: int) -> _Mixed:
    branches: list[_Branch] = [
        [("branch3x3", 384, 3, 2)],
        [
            ("branch3x3dbl_1", 64, 1, 1),
            ("branch3x3dbl_2", 96, 3, 1),
            ("branch3x3dbl_3", 96, 3, 2),
        ],
    ]
    return _Mixed(width, branches, "shrink")


def _type_c(width: int, inner: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    branches: list[_Branch] = [
        [("branch1x1", 192, 1, 1)],
        [
            ("branch7x7_1", inner, 1, 1),
            ("branch7x7_2", inner, row, 1),
            ("branch7x7_3", 192, column, 1),
        ],
        [
            ("branch7x7dbl_1", inner, 1, 1),
            ("branch7x7dbl_2", inner, column, 1),
            ("branch7x7dbl_3", inner, row, 1),
            ("branch7x7dbl_4", inner, column, 1),
            ("branch7x7dbl_5", 192, row, 1),
        ],
    ]
    return _Mixed(width, branches, "average", 192)


def _type_d(width: int) -> _Mixed:
    branches: list[_Branch] = [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ],
    ]
    return _Mixed(width, branches, "shrink")


def _type_e(width: int, pool: Literal["average", "max"]) -> _Mixed:
    branches: list[_Branch] = [
        [("branch1x1", 320, 1, 1)],
        [
            ("branch3x3_1", 384, 1, 1),
            [("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)],
        ],
        [
            ("branch3x3dbl_1", 448, 1, 1),
            ("branch3x3dbl_2", 384, 3, 1),
            [("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)],
        ],
    ]
    return _Mixed(width, branches, pool, 192)


class InceptionNetwork(nn.Module):
    """From resized, normalised images [B, 3, 299, 299] to features; names are torch-fidelity's.

    Attributes:
        fc: the classifier behind the features, 2048 to 1008; it is not applied by `forward`.
    """

    def __init__(self) -> None:
        super().__init__()
        stem: list[tuple[int, _Layer, bool]] = [
            (3, ("Conv2d_1a_3x3", 32, 3, 2), False),
            (32, ("Conv2d_2a_3x3", 32, 3, 1), False),
            (32, ("Conv2d_2b_3x3", 64, 3, 1), True),
            (64, ("Conv2d_3b_1x1", 80, 1, 1), False),
            (80, ("Conv2d_4a_3x3", 192, 3, 1), False),
        ]
        for width, layer, padded in stem:
            self.add_module(layer[0], _Convolution(width, layer, padded))
        self.pool1, self.pool2 = nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2)
        self.Mixed_5b = _type_a(192, 32)
        self.Mixed_5c = _type_a(256, 64)
        self.Mixed_5d = _type_a(288, 64)
        self.Mixed_6a = _type_b(288)
        self.Mixed_6b = _type_c(768, 128)
        self.Mixed_6c = _type_c(768, 160)
        self.Mixed_6d = _type_c(768, 160)
        self.Mixed_6e = _type_c(768, 192)
        self.Mixed_7a = _type_d(768)
        self.Mixed_7b = _type_e(1280, "average")
        self.Mixed_7c = _type_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [B, 2048], and spatial ones [B, 7, 17, 17] of the 7th mixed block."""
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
            x = self.get_submodule(name)(x)
        x = self.pool1(x)
        for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
            x = self.get_submodule(name)(x)
        x = self.pool2(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # The 1x1 branch of this block comes first, so these are the channels that sFID takes.
        spatial = x[:, :SPATIAL_CHANNELS].contiguous()
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean(dim=(2, 3)), spatial

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take torch-fidelity's state dict of 472 tensors, or pytorch-fid's, which is the same.

        Raises:
            KeyError, RuntimeError: tensors are missing or have other shapes.
        """
        folded: dict[str, Tensor] = {name: state[name] for name in ("fc.weight", "fc.bias")}
        for name, module in self.named_modules():
            if isinstance(module, _Convolution):
                norm = f"{name}.bn."
                variance = state[norm + "running_var"].to(torch.float64)
                scale = state[norm + "weight"].to(torch.float64) / (variance + _EPSILON).sqrt()
                shift = state[norm + "bias"] - state[norm + "running_mean"] * scale
                weight = state[f"{name}.conv.weight"] * scale[:, None, None, None]
                folded |= {f"{name}.weight": weight, f"{name}.bias": shift}
        self.load_state_dict(folded)


class Inception:
    """The feature extractor of FID: 2048 pooled features, 2023 spatial ones for sFID, logits.

    Attributes:
        name: "inception".
        dim: 2048.
        weights: first digits of the checksum of the weights' file.
    """

    dim = 2048

    def __init__(self, network: InceptionNetwork, name: str, weights: str) -> None:
        network.eval().requires_grad_(False)
        self.network: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fc = network.fc
        self.name, self.weights = name, weights

    def to(self, device: torch.device | str) -> Inception:
        """Move the network."""
        self.network.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 1 or 3, H, W] to pooled features, float32 [B, 2048]."""
        return self.with_spatial(images)[0]

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [B, 2048], and spatial ones [B, 2023], flattened as C, H, W.

        Raises:
            DataError: images that are not uint8, or neither grey nor RGB.
        """
        x = tf1_resize(rgb(images).to(self.fc.weight.device))
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        # TensorFloat32 would move features by far more than tools differ among each other.
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            features, spatial = self.network(x)
        return features.clone(), spatial.flatten(1).clone()

    def logits(self, features: Tensor, *, bias: bool = False) -> Tensor:
        """Class logits [B, 1008] of pooled features; the field's Inception Score has no bias."""
        features = features.to(self.fc.weight)
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


def rgb(images: Tensor) -> Tensor:
    """uint8 [B, 1 or 3, H, W] to three channels; grey is repeated.

    Raises:
        DataError: another type or number of channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            "features are made of grey or RGB images of 8 bits (uint8 [B, 1 or 3, H, W]), "
            f"not of {images.dtype} {list(images.shape)}. For other channels score with "
            "--features classifier"
        )
    return images.expand(-1, 3, -1, -1)


def channels_last_order(dim: int, channels: int = SPATIAL_CHANNELS) -> Tensor:
    """For each place of an H, W, C vector, where its number stands in the C, H, W one."""
    return torch.arange(dim).view(channels, dim // channels).T.flatten()


def channels_first_order(dim: int, channels: int = SPATIAL_CHANNELS) -> Tensor:
    """For each place of a C, H, W vector, where its number stands in the H, W, C one."""
    return torch.arange(dim).view(dim // channels, channels).T.flatten()
