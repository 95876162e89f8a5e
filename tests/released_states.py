"""State dicts and training states of released code, made here of recorded tensors."""

from __future__ import annotations

import argparse
import base64
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_cases import GOLDEN, relative_error
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.convert.assemble import Conversion, plan_conversion
from tessera.pipelines.base import Pipeline
from tessera.pipelines.loading import load as load_pipeline

RECORDED = GOLDEN / "convert"


def recorded_case(name: str) -> dict[str, Any]:
    """Configuration and calls of one case, the arrays as tensors."""
    document: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    for call in document["calls"]:
        for part in ("inputs", "outputs"):
            call[part] = {key: _tensor(value) for key, value in call[part].items()}
    return document


def _tensor(entry: dict[str, Any]) -> Tensor:
    data = np.frombuffer(base64.b64decode(entry["base64"]), entry["dtype"])
    return torch.from_numpy(data.reshape(entry["shape"]).copy())


def write_torch(path: Path, content: Any, *, old: bool = False) -> Path:
    """A file of `torch.save`, in its ZIP or in its old container."""
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


def parameters(tensors: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The tensors as parameters."""
    return OrderedDict(
        (name, nn.Parameter(t, t.is_floating_point())) for name, t in tensors.items()
    )


def arguments(**values: Any) -> argparse.Namespace:
    """What a training was called with."""
    return argparse.Namespace(batch_size=16, output_dir="./out", lr=None, **values)


def converted(folder: Path, *sources: Path, options: tuple[str, ...] = ()) -> Conversion:
    """Write the pipeline of one or two checkpoints into `folder`."""
    plan = plan_conversion(sources, options=options)
    plan.write(folder)
    return plan


def opened(folder: Path, weights: str | None = None) -> Pipeline:
    """The pipeline in a folder, on the CPU."""
    return load_pipeline(folder, ema=weights, device="cpu")


def raw_output(pipe: Pipeline, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """What the network of a pipeline puts out; a class beyond the last one is no class."""
    (network,) = pipe.networks()
    if labels is not None:
        labels = torch.where(labels >= pipe.model.num_classes, -1, labels)
    with torch.no_grad():
        output: Tensor = network(x, t.float(), Conditioning(labels=labels))
    return output


def as_released(output: Tensor) -> Tensor:
    """With v in [-1, 1] of the variance, as released networks put it out, in place of its place."""
    image, place = output.chunk(2, dim=1)
    return torch.cat([image, 1 - 2 * place], dim=1)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether they are alike up to the rounding of float32."""
    return relative_error(actual, expected) < 2e-5
