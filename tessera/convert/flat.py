"""State dicts without any configuration: what the names and shapes of their tensors show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from tessera.convert.checkpoint import CheckpointFile, Data, Settings
from tessera.convert.records import flat_tensors
from tessera.errors import DataError, RecipeError
from tessera.recipes.loading import dump_recipe, load_recipe
from tessera.recipes.text import read_yaml
from tessera.torch_files import StoredTensor

Tensors = Mapping[str, StoredTensor]


def state_dict(source: CheckpointFile, value: Any, what: str) -> dict[str, StoredTensor]:
    """The tensors of a state dict in a file; `module.` of parallel training is left out.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise source.error(f"its {what} is no dictionary of tensors")
    try:
        tensors = flat_tensors(value, what)
    except DataError as error:
        raise source.error(str(error)) from error
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def is_state_dict(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a dictionary of tensors by name."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, StoredTensor) for k, v in value.items())
    )


def shape_of(source: CheckpointFile, tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor with so many axes.

    Raises:
        CheckpointError: there is none of that name, or it has others.
    """
    tensor = tensors.get(name)
    if tensor is None or len(tensor.shape) != dims:
        found = "is missing" if tensor is None else f"has the shape {tensor.shape}"
        raise source.error(f"{name} {found}, in a network that is otherwise of this family")
    return tensor.shape


def numbered(tensors: Tensors, pattern: str) -> int:
    """How many numbers from 0 on the names that match `pattern` have, whose group is the number."""
    found = {int(m[1]) for name in tensors if (m := re.match(pattern, name)) and len(m[1]) < 6}
    return next(n for n in range(len(found) + 1) if n not in found)


def setting(
    settings: Settings, key: str, presets: Mapping[str, Data], published: str | None
) -> Any:
    """A key of the recipe that the caller says: by an option, a preset, or the name of the file."""
    name = settings.preset or published
    for override in reversed(settings.overrides):
        given, _, text = override.partition("=")
        if given == key:
            return read_yaml(text, override)
    data: Any = presets.get(name or "")
    if data is None and name is not None:
        try:
            data = dump_recipe(load_recipe(name))
        except RecipeError:
            return None  # which is said later
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


class UNetShape(NamedTuple):
    """What the tensors of a U-Net of guided diffusion, or of one built on it, show.

    Attributes:
        widths: of its levels, from the finest.
        blocks: residual blocks of each level of the encoder.
        attention: the levels with self-attention.
        resblock_updown: it resamples inside of residual blocks.
    """

    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    resblock_updown: bool

    def mult(self, channels: int) -> list[float]:
        """The widths as multiples of the base width."""
        return [width // channels if width % channels == 0 else width / channels
                for width in self.widths]  # fmt: skip

    def resolutions(self, side: int) -> list[int]:
        """The sides of the levels with attention, of a network on a grid of this side."""
        return [side >> level for level in self.attention]


def unet_shape(source: CheckpointFile, tensors: Tensors, conv: str) -> UNetShape:
    """The levels of a U-Net, from the units of its decoder.

    Args:
        conv: name of the last convolution of a residual block, within it.

    Raises:
        CheckpointError: they are not those of a U-Net.
    """
    units = numbered(tensors, r"output_blocks\.(\d+)\.0\.")
    widths: list[int] = []
    attention: list[bool] = []
    lengths = [0]
    inside = False
    for unit in range(units):
        prefix = f"output_blocks.{unit}."
        width = shape_of(source, tensors, f"{prefix}0.{conv}.weight", 4)[0]
        with_attention = f"{prefix}1.qkv.weight" in tensors
        up = [
            f"{prefix}{place}.{name}.weight" in tensors
            for place in (1, 2)
            for name in ("conv", f"{conv}")
        ]
        if lengths[-1] == 0:
            widths.append(width)
            attention.append(with_attention)
        elif widths[-1] != width or attention[-1] != with_attention:
            raise source.error(f"the level of {prefix[:-1]} has blocks that differ")
        lengths[-1] += 1
        inside |= up[1] or up[3]
        if any(up):
            lengths.append(0)
    if len(set(lengths)) != 1 or lengths[0] < 2:
        raise source.error("its decoder is not that of a U-Net whose levels have as many blocks")
    levels = range(len(widths))
    return UNetShape(
        tuple(reversed(widths)),
        lengths[0] - 1,
        tuple(level for level in levels if attention[len(widths) - 1 - level]),
        inside,
    )
