"""DINOv2 ViT-L/14 (Oquab et al. 2023), whose features many prefer to Inception's for distances.

The network is written out because loading must not execute downloaded code, and reads the weights
that Meta publishes. Images are shown to it as EDM2 does, for the sake of its FD_DINOv2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.metrics.inception import rgb

_PATCH = 14
_SIZE = 224
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_EPSILON = 1e-6


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        result: Tensor = self.proj(y)
        return result


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=_EPSILON) for _ in range(2))
        self.attn, self.ls1 = _Attention(width, heads), _Scale(width)
        self.mlp, self.ls2 = _Mlp(width), _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        result: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return result


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, _PATCH, _PATCH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Normalised images [B, 3, H, W], sides multiples of 14, to class-token features [B, width].

    Parameter names are those of the published files.
    """

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16, grid: int = 37) -> None:
        super().__init__()
        self.width, self._grid = width, grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.patch_embed = _PatchEmbedding(width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] // _PATCH, x.shape[3] // _PATCH
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        x = x + self._positions(rows, columns)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.norm(x)[:, 0]
        return result

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the published state dict.

        Raises:
            RuntimeError: tensors are missing or have other shapes.
        """
        # The mask token serves training only.
        self.load_state_dict({name: t for name, t in state.items() if name != "mask_token"})

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings for another number of patches, by the released code's rule."""
        if rows == columns == self._grid:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = rest.view(1, self._grid, self._grid, self.width).permute(0, 3, 1, 2)
        # The released code adds a tenth to the size, and interpolates with the factor that results.
        factor = [(size + 0.1) / self._grid for size in (rows, columns)]
        resized = F.interpolate(square, scale_factor=factor, mode="bicubic")
        return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)


class DinoV2:
    """Class-token features of DINOv2 ViT-L/14 at 224 x 224.

    Attributes:
        name: "dinov2".
        dim: 1024.
        weights: first digits of the checksum of the weights' file.
    """

    name = "dinov2"

    def __init__(self, network: VisionTransformer, weights: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.dim = network.width
        self.weights = weights

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 1 or 3, H, W] to float32 [B, 1024].

        Raises:
            DataError: images that are not uint8, or neither grey nor RGB.
        """
        x = rgb(images).to(self.network.cls_token.device, torch.float32)
        if x.shape[2:] != (_SIZE, _SIZE):
            x = F.interpolate(x, (_SIZE, _SIZE), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (_MEAN, _STD))
        with torch.inference_mode():
            features: Tensor = self.network((x / 255 - mean) / std)
        return features.clone()
