"""What a user's own parts may be, and the words for what they may not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import own_parts
import pytest
import torch
from torch import nn

from tessera import Parts
from tessera.conditioning import NO_CLASS
from tessera.errors import DataError, RecipeError, TesseraError
from tessera.recipes.build import build_model, build_network, recipe_objective
from tessera.recipes.datasets import open_training_set
from tessera.recipes.external import check_trained
from tessera.recipes.loading import dump_recipe, parse_recipe
from tessera.recipes.schema import Recipe
from tessera.recipes.text import read_yaml, write_yaml


def recipe(**sections: Any) -> Recipe:
    base = {
        "name": "own",
        "data": {"resolution": 8, "num_classes": 2},
        "network": {"kind": "external", "multiple": 2},
    }
    return parse_recipe({**base, **sections})


# ---------------------------------------------------------------------------------------- networks


class Said(own_parts.Net):
    """Puts out what it is made for, and keeps what it was told."""

    def __init__(self, output: Any) -> None:
        super().__init__(3, 0, 2)
        self.output, self.seen = output, list[Any]()

    def forward(self, x, noise, cond):
        self.seen.append((tuple(x.shape), noise.shape, cond, self.training))
        return self.output(x)


def own_network(output: Any, **sections: Any) -> Said:
    made: list[Said] = []

    def network(_recipe):
        made.append(Said(output))
        return made[0]

    build_network(recipe(**sections), Parts(network=network))
    return made[0]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda x: x[:, :2], r"made of x \[2, 3, 8, 8\], .*\[2, 2, 8, 8\]; .*\[2, 3, 8, 8\]"),
        (lambda x: x[:, :, ::2], r"float32 \[2, 3, 4, 8\]"),
        (lambda x: x[:1], r"float32 \[1, 3, 8, 8\]"),
        (lambda x: x.flatten(), r"float32 \[384\]"),
        (lambda x: x.long(), r"int64 \[2, 3, 8, 8\]; it must make floating-point"),
        (lambda x: {"sample": x}, "a dict"),
        (lambda x: None, "nothing"),
        (lambda x: (x, x[:1]), r"float32 \[1, 3, 8, 8\]"),
    ],
)  # fmt: skip
def test_what_a_network_puts_out_is_checked(output: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        own_network(output)


@pytest.mark.parametrize("output", [lambda x: x, lambda x: (x, x), lambda x: x.bfloat16()])
def test_networks_that_fit(output: Any) -> None:
    network = own_network(output)
    ((shape, noise, cond, training),) = network.seen
    assert (shape, noise) == ((2, 3, 8, 8), (2,))
    assert cond.labels.tolist() == [0, NO_CLASS]
    assert not training
    assert network.training


def test_twice_the_channels_where_the_preconditioning_leaves_half_out() -> None:
    own_network(lambda x: torch.cat([x, x], 1), preconditioning={"kind": "iddpm"})
    with pytest.raises(RecipeError, match=r"\[2, 6, 8, 8\]"):
        own_network(lambda x: torch.cat([x, x], 1))


def test_a_network_is_told_all_that_it_will_be_told() -> None:
    seen = own_network(lambda x: x, view={"kind": "patches"}, augment={"p": 0.1, "xflip": 1}).seen
    sides = [
        (shape[-1], None if c.coords is None else c.coords.shape[-1]) for shape, _, c, _ in seen
    ]
    assert sides == [(2, 2), (4, 4), (8, 8), (8, None)]
    assert [c.augment is None for _, _, c, _ in seen] == [False, False, False, True]
    ((shape, _, cond, _),) = own_network(lambda x: x[:, :3], low_resolution=4).seen
    assert (shape, cond.image.shape) == ((2, 6, 8, 8), (2, 3, 4, 4))


def test_trying_a_network_leaves_no_trace() -> None:
    torch.manual_seed(3)
    plain = own_parts.Net(3, 2, 4)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    parts = Parts(network=lambda recipe: nn.Sequential(own_parts.Net(3, 2, 4)))
    with pytest.raises(RecipeError, match=r"'network' raised TypeError"):
        build_network(recipe(), parts)
    torch.manual_seed(3)
    made = build_model(recipe(), Parts(network=own_parts.network)).network
    assert torch.equal(torch.rand(2), drawn)
    assert all(
        torch.equal(a, b) for a, b in zip(made.parameters(), plain.parameters(), strict=True)
    )


def test_a_network_may_be_made_in_any_way() -> None:
    """Also of numbers that no empty module has: it is made in earnest, and only once."""
    made = []

    def network(recipe):
        made.append(own_parts.Net(3, 2, 4))
        made[-1].first.weight = nn.Parameter(torch.empty(4, 3, 3, 3) + torch.eye(3))
        return made[-1]

    assert build_network(recipe(), Parts(network=network)) is made[0]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda recipe: None, "made nothing.*torch.nn.Module"),
        (lambda recipe: nn.Identity(), "without parameters to train"),
        (lambda recipe: 1 / 0, r"raised ZeroDivisionError: .*test_recipes_parts\.py:\d+"),
        (lambda: None, "raised TypeError: .*takes 0 positional arguments but 1 was given$"),
    ],
)
def test_what_makes_a_network_is_checked(network: Any, words: str) -> None:
    class Identity(nn.Identity):
        def forward(self, x, noise, cond):
            return x

    parts = Parts(network=network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "Identity", Identity)
        with pytest.raises(RecipeError, match=words):
            build_network(recipe(), parts)


def test_parts_are_functions() -> None:
    with pytest.raises(RecipeError, match=r"'network' is a Net; give a function"):
        Parts(network=own_parts.Net(3, 2, 4))
    with pytest.raises(RecipeError, match=r"'dataset' is a list"):
        Parts(dataset=[])


# ----------------------------------------------------------------------------- options in recipes


def test_options_come_back_from_files_as_they_went() -> None:
    options = {"sizes": (1, 2), "name": "2e6", "deep": {"rate": 0.5, "on": True, "none": None}}
    made = recipe(network={"kind": "external", "options": options})
    again = parse_recipe(read_yaml(write_yaml(dump_recipe(made)), "file"))
    assert again == made
    assert again.network.options == {**options, "sizes": [1, 2]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.inf, r"options\.a\.b is inf"),
        (torch.ones(1), r"options\.a\.b is a Tensor"),
        (2**70, r"options\.a\.b: numbers of over 18 digits"),
    ],
)
def test_options_are_plain(value: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(network={"kind": "external", "options": {"a": {"b": value}}})


# -------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (lambda loss: loss, "gave a Tensor; it must give a dictionary"),
        (lambda loss: {"mse": loss}, "a dictionary of mse"),
        (lambda loss: {"loss": loss.mean()}, r"'loss' of 2 images float32 \[\]"),
        (lambda loss: {"loss": loss, "quartile": loss}, r"'quartile'.*int64"),
        (lambda loss: {"loss": loss, "other": 3.0}, r"'other' of 2 images a float"),
        (lambda loss: {"loss": loss.detach()}, "does not depend on the model's weights"),
        (lambda loss: 1 / 0, r"'objective' raised ZeroDivisionError"),
    ],
)
def test_what_an_objective_gives_is_checked(terms: Any, words: str) -> None:
    def objective(recipe):
        return lambda model, x, cond, draws: terms(
            model(x, torch.ones(len(x)), cond).mean.square().sum((1, 2, 3))
        )

    chosen = recipe(objective={"kind": "external"})
    parts = Parts(network=own_parts.network, objective=objective)
    model = build_model(chosen, parts)
    with pytest.raises(RecipeError, match=words):
        check_trained(chosen, model, recipe_objective(chosen, parts))


@pytest.mark.parametrize(
    ("name", "value"), [("reduction", "max"), ("alignment", 0), ("alignment", "2")]
)
def test_what_an_objective_says_of_itself(name: str, value: Any) -> None:
    class Odd:
        def __call__(self, *_: Any) -> dict[str, Any]:
            return {}

    setattr(Odd, name, value)
    parts = Parts(objective=lambda recipe: Odd())
    with pytest.raises(RecipeError, match=f"{name}={value!r}"):
        recipe_objective(recipe(objective={"kind": "external"}), parts)


# --------------------------------------------------------------------------------------- data sets


class Bent(own_parts.Images):
    def __init__(self, **changes: Any) -> None:
        super().__init__(6)
        vars(self).update(changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": []}, "it is empty"),
        ({"shape": (8, 8)}, r"shape is \(8, 8\); it must be \(C, H, W\)"),
        ({"shape": (3, 8, 4)}, r"uint8 \[2, 3, 8, 8\] for two images; .* uint8 \[2, 3, 8, 4\]"),
        ({"labels": [0, 1] * 3}, "labels are a list"),
        ({"labels": np.zeros(5, np.int64)}, r"shape \[5\], but there are 6 images"),
        ({"labels": np.zeros(6, np.int32)}, "labels are int32"),
        ({"labels": np.full(6, 2)}, "from 2 to 2, but num_classes is 2"),
        ({"labels": np.full(6, -1)}, "from -1 to -1"),
        ({"class_names": ("one",)}, "class_names are 1, but num_classes is 2"),
        ({"num_classes": None}, "num_classes is None"),
        ({"read": lambda indices: np.zeros((len(indices), 3, 8, 8))}, "read gives float64"),
        ({"read": lambda indices: torch.zeros(2, 3, 8, 8)}, "read gives a Tensor"),
        ({"read": lambda indices: 1 / 0}, "'dataset' raised ZeroDivisionError"),
        ({"shape": (1, 8, 8), "read": lambda i: np.zeros((len(i), 1, 8, 8), np.uint8)},
         "own data set mine does not fit the recipe.*\n.* 1 channel,"),
        ({"num_classes": 3, "class_names": None}, "3 classes, but data.num_classes is 2"),
    ],
)  # fmt: skip
def test_an_own_data_set_is_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TesseraError, match=words):
        open_training_set(recipe(), Parts(dataset=lambda recipe: Bent(**changes)))


def test_what_a_data_set_lacks_is_named() -> None:
    with pytest.raises(RecipeError, match=r"a list without name, shape, labels.*read, close"):
        open_training_set(recipe(), Parts(dataset=lambda recipe: []))


def test_every_image_has_the_shape_of_the_first() -> None:
    own = Bent()
    own.images[3] = own.images[3][:, :4]
    made = open_training_set(recipe(), Parts(dataset=lambda recipe: own))
    with pytest.raises(DataError, match=r"mine: images 3 were read as uint8 \[1, 3, 4, 8\]"):
        made.read(np.array([3]))


def test_own_latents() -> None:
    moments = np.random.default_rng(0).normal(size=(6, 8, 8, 8)).astype(np.float32)
    latent = {"shape": (4, 8, 8), "read": lambda indices: moments[indices]}
    data = {"resolution": 64, "num_classes": 2}
    chosen = recipe(data=data, codec={"kind": "vae"})
    parts = Parts(dataset=lambda recipe: Bent(**latent))
    assert np.array_equal(open_training_set(chosen, parts).read(np.arange(6)), moments)
    mirrored = recipe(data={**data, "xflip": True}, codec={"kind": "vae"})
    with pytest.raises(RecipeError, match=r"data\.xflip"):
        open_training_set(mirrored, parts)
    with pytest.raises(RecipeError, match=r"shape is \(3, 8, 8\), but the latents"):
        open_training_set(chosen, Parts(dataset=lambda recipe: Bent()))
