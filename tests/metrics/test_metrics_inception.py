"""The Inception network against recorded features; its weights come from a formula."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN, load
from torch import Tensor

from tessera.errors import DataError
from tessera.metrics import inception as module
from tessera.metrics.inception import Inception, InceptionNetwork, tf1_resize


def recorded(name: str) -> dict[str, Any]:
    document = json.loads((GOLDEN / "metrics" / "cases.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = next(c for c in document["cases"] if c["case"] == name)
    return found


@cache
def formula_weights() -> dict[str, Tensor]:
    """The 472 tensors of the recorded network, by the rule of the recording."""
    rule = recorded("inception_full")["weights"]
    a, b, c = rule["a"], rule["b"], rule["c"]
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, layer in InceptionNetwork().named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            shapes[f"{name}.conv.weight"] = tuple(layer.weight.shape)
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.bn.{part}"] = (layer.out_channels,)
    state = {}
    for n, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        h = torch.sin((k + 1) * a + (n + 1) * b) * c
        h = (h - h.floor()).view(shape)
        if name.endswith(".conv.weight"):
            value = (2 * h - 1) * (6 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name == "fc.weight":
            value = (2 * h - 1) * (3 / 2048) ** 0.5
        elif name == "fc.bias":
            value = 0.5 * (2 * h - 1)
        else:
            value = {
                "weight": 0.9 + 0.2 * h,
                "bias": 0.2 * (2 * h - 1),
                "running_mean": 0.1 * (2 * h - 1),
                "running_var": 0.8 + 0.4 * h,
            }[name.rpartition(".")[2]]
        state[name] = value.to(torch.float32)
    return state


def extractor(weights: Mapping[str, Tensor]) -> Inception:
    network = InceptionNetwork()
    network.load(weights)
    return Inception(network, "inception", "0" * 8)


def taps(network: torch.nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Spatial means of the outputs of modules, filled when the network runs."""
    found: dict[str, Tensor] = {}
    for key, name in names.items():
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, key=key: found.__setitem__(key, output.mean(dim=(2, 3)))
        )
    return found


def test_the_formula_gives_the_recorded_weights() -> None:
    state, rule = formula_weights(), recorded("inception_full")["weights"]
    assert len(state) == rule["n_parameters"]
    for name, check in rule["check"].items():
        assert list(state[name].shape) == check["shape"]
        torch.testing.assert_close(
            state[name].flatten()[:4], torch.tensor(check["first"]), rtol=1e-6, atol=1e-7
        )
        assert float(state[name].flatten()[-1]) == pytest.approx(check["last"], rel=1e-6)


def test_resize_is_tensorflows() -> None:
    tensors = load("metrics", "inception_full")
    names = [key.removeprefix("image.") for key in tensors if key.startswith("image.")]
    assert len(names) == 4
    for name in names:
        x = (tf1_resize(tensors[f"image.{name}"]) - 128) / 128
        torch.testing.assert_close(
            x[:, :, ::13, ::13], tensors[f"resized_norm.{name}"], rtol=0, atol=2e-6
        )


def test_all_features_of_all_sizes() -> None:
    tensors, inception = load("metrics", "inception_full"), extractor(formula_weights())
    means = taps(inception.network, {"64": "pool1", "192": "pool2", "768": "Mixed_6e"})
    for name in [key.removeprefix("image.") for key in tensors if key.startswith("image.")]:
        features, spatial = inception.with_spatial(tensors[f"image.{name}"])
        found = {
            **{f"feat_{key}": value for key, value in means.items()},
            "feat_2048": features,
            "feat_logits_unbiased": inception.logits(features),
            "feat_logits": inception.logits(features, bias=True),
            "spatial": spatial.view(-1, 7, 17, 17),
        }
        for key, value in found.items():
            torch.testing.assert_close(
                value, tensors[f"{key}.{name}"], rtol=0, atol=2e-5, msg=f"{key} of {name}"
            )


def test_stem_with_explicit_weights() -> None:
    tensors, images = load("metrics", "inception_stem"), load("metrics", "inception_full")
    state = dict(formula_weights())
    given = {k.removeprefix("w."): v.float() for k, v in tensors.items() if k.startswith("w.")}
    assert given
    assert set(given) <= set(state)
    network = InceptionNetwork()
    network.load(state | given)
    for name in recorded("inception_stem")["images"]:
        x = (tf1_resize(images[f"image.{name}"]) - 128) / 128
        with torch.no_grad():
            x = network.Conv2d_2b_3x3(network.Conv2d_2a_3x3(network.Conv2d_1a_3x3(x)))
            first = network.pool1(x)
            second = network.pool2(network.Conv2d_4a_3x3(network.Conv2d_3b_1x1(first)))
        for key, value in {
            "feat_64": first.mean(dim=(2, 3)),
            "feat_192": second.mean(dim=(2, 3)),
            "pool2_patch": second[:, ::4, ::6, ::6],
        }.items():
            torch.testing.assert_close(value, tensors[f"{key}.{name}"], rtol=0, atol=2e-5)


def test_orders_of_spatial_features() -> None:
    maps = torch.arange(7 * 17 * 17).view(7, 17, 17)
    last = maps.flatten()[module.channels_last_order(2023)]
    assert torch.equal(last, maps.permute(1, 2, 0).flatten())
    assert torch.equal(last[module.channels_first_order(2023)], maps.flatten())


def test_grey_is_repeated_and_others_are_refused() -> None:
    grey = torch.randint(0, 256, (2, 1, 5, 4), dtype=torch.uint8)
    assert torch.equal(module.rgb(grey), grey.repeat(1, 3, 1, 1))
    for wrong in (torch.zeros(2, 4, 5, 5, dtype=torch.uint8), torch.zeros(2, 3, 5, 5)):
        with pytest.raises(DataError, match="grey or RGB"):
            module.rgb(wrong)
