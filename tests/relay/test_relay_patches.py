"""Later stages trained on patches: blur and noise are those of the image they are cut from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import random_images, write_packed
from hypothesis import given
from hypothesis import strategies as st
from relay_tiny import FIRST, SECOND, pipeline, recipe, small
from torch import Tensor

import tessera
from tessera.conditioning import Conditioning
from tessera.data.loader import StepPlan
from tessera.data.views import PatchView, crop, patch_sizes
from tessera.diffusion.blur import (
    Blur,
    BlurCorruption,
    BlurObjective,
    block_idct,
    block_noise,
    dct_matrix,
    scale_frequencies,
)
from tessera.diffusion.denoiser import Denoiser, Posterior
from tessera.errors import RecipeError, TesseraError
from tessera.pipelines.relay import assemble_relay
from tessera.randomness import AddressedDraws
from tessera.recipes.build import build_view, recipe_objective
from tessera.recipes.parts import Parts
from tessera.training.trainer import Trainer

PATCHES: dict[str, Any] = {"view": {"kind": "patches", "sizes": [4, 8], "real_p": 0.3}}


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_noise_without_wrapping_is_cut_from_an_image(
    block: int, side: int, row: int, column: int
) -> None:
    white = torch.randn(2, 3, 8 * block, 8 * block, dtype=torch.float64)
    top, left, size, further = block * (row + 1), block * (column + 1), side * block, block - 1
    part = white[..., top - further : top + size, left - further : left + size]
    expected = block_noise(white, block)[..., top : top + size, left : left + size]
    torch.testing.assert_close(block_noise(part, block, wraps=False), expected)


def noise_of(corruption: BlurCorruption, count: int, side: int) -> Tensor:
    """Block noise [N, side, side] as training adds it."""
    draws = AddressedDraws(0, torch.arange(count))
    x, sigma = torch.zeros(count, 1, side, side), torch.ones(count)
    white = draws.normal("noise", 1, side, side)
    return (corruption(x, sigma, draws) - white)[:, 0] / corruption.block_scale


def test_noise_of_a_patch_has_the_covariance_of_an_interior_one() -> None:
    count, side, block = 2**14, 8, 4
    corruption = BlurCorruption(blur=Blur(block=block), block_scale=1.0, side=16)
    noise = noise_of(corruption, count, side).flatten(1).double()
    place = torch.arange(side)
    distance = (place[:, None] - place).abs()
    line = (block - distance).clamp(min=0).double() / block
    found = noise.T @ noise / count
    torch.testing.assert_close(found, torch.kron(line, line), rtol=0, atol=0.05)
    # So has a patch that is cut from the noise of the whole image, in its corner, too.
    whole = noise_of(corruption, count, 16)[:, :side, :side].flatten(1).double()
    torch.testing.assert_close(whole.T @ whole / count, torch.kron(line, line), rtol=0, atol=0.05)
    # What wraps around has not.
    circular = noise_of(BlurCorruption(blur=Blur(block=block), block_scale=1.0), count, side)
    assert (circular[:, 0, 0] * circular[:, 0, -1]).mean() > 0.7


class FromWhole(AddressedDraws):
    """Hands out the part of the whole image's noise that a patch would have."""

    def __init__(self, side: int, rows: Tensor, columns: Tensor) -> None:
        super().__init__(5, torch.arange(len(rows)))
        self.side, self.rows, self.columns = side, rows, columns

    def normal(self, purpose: str, *shape: int) -> Tensor:
        whole = super().normal(purpose, shape[0], self.side, self.side)
        if purpose == "noise":
            return crop(whole, self.rows, self.columns, shape[-1])
        # With three more rows and columns before it, of the other end at the image's border.
        wrapped = torch.cat([whole[..., -3:, :], whole], dim=-2)
        wrapped = torch.cat([wrapped[..., -3:], wrapped], dim=-1)
        return crop(wrapped, self.rows, self.columns, shape[-1])


def test_a_step_is_the_crop_of_the_corruption() -> None:
    view = PatchView(16, 6, patch_sizes(16, (8, 16), 0.5), seed=0, align=4)
    draws, x = AddressedDraws(5, torch.arange(6)), torch.randn(6, 3, 16, 16)
    patch, coords = view.apply(x, draws, StepPlan(0, 6, 8))
    assert coords is not None
    columns, rows = ((coords[:, :, 0, 0] + 1) / 2 * 15).round().long().unbind(1)
    assert set((rows % 4).tolist() + (columns % 4).tolist()) == {0}
    assert len(set(rows.tolist())) > 1
    corruption = BlurCorruption(blur=Blur(block=4), block_scale=0.7, side=16)
    sigma = torch.linspace(0.1, 1.5, 6)
    whole = crop(corruption(x, sigma, draws), rows, columns, 8)
    found = corruption(patch, sigma, FromWhole(16, rows, columns))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("align", [1, 2, 4])
def test_offsets_reach_every_place_of_the_grid(align: int) -> None:
    view = PatchView(12, 500, patch_sizes(12, (4, 12), 0.5), seed=0, align=align)
    draws, x = AddressedDraws(0, torch.arange(500)), torch.arange(144.0).reshape(1, 1, 12, 12)
    patch, _ = view.apply(x.expand(500, -1, -1, -1), draws, StepPlan(0, 500, 4))
    places = range(0, 9, align)
    assert set(patch[:, 0, 0, 0].tolist()) == {
        12 * row + column for row in places for column in places
    }
    if align == 1:  # the draws that there were before there was a grid
        rows, columns = (draws.integers(f"patch.{axis}", 9) for axis in ("row", "column"))
        assert torch.equal(patch, crop(x.expand(500, -1, -1, -1), rows, columns, 4))


class Gains(Denoiser):
    """Multiplies each frequency of a block by a gain of its own."""

    def __init__(self, gains: Tensor) -> None:
        super().__init__()
        self.gains = torch.nn.Parameter(gains)

    def forward(self, z: Tensor, sigma: Tensor, cond: Conditioning) -> Posterior:
        return Posterior(scale_frequencies(z, self.gains))


@pytest.mark.parametrize("side", [4, 8])
def test_a_recipe_of_patches_trains_the_denoiser_of_whole_images(side: int) -> None:
    """Of data whose frequencies have deviations of their own, the best gains are known."""
    made = recipe(
        data={"resolution": 16},
        view={"kind": "patches", "sizes": [side, 16]},
        objective={"kind": "blur", "block": 4, "block_scale": 0.5},
        sampling={"kind": "relay"},
    )
    view, objective, count, sigma = build_view(made), recipe_objective(made), 2**14, 0.3
    assert isinstance(objective, BlurObjective)
    deviations = torch.linspace(1.0, 0.3, 16).reshape(4, 4)
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(count, 1, 16, 16, generator=generator) * deviations.repeat(4, 4)
    draws = AddressedDraws(0, torch.arange(count))
    x, coords = view.apply(block_idct(coefficients, 4), draws, StepPlan(0, count, side))
    assert coords is not None

    def gradient(gains: Tensor) -> Tensor:
        denoiser, levels = Gains(gains), torch.full((count,), sigma)
        objective.elementwise(denoiser, x, Conditioning(), draws, levels).mean().backward()
        assert denoiser.gains.grad is not None
        return denoiser.gains.grad

    # The loss is a square, so the gradient is a line and its root follows from two of its points.
    at_zero, at_one = gradient(torch.zeros(4, 4)), gradient(torch.ones(4, 4))
    best = (at_zero / (at_zero - at_one)).double()
    place, dct = torch.arange(4), dct_matrix(4)
    line = (4 - (place[:, None] - place).abs()).double() / 4
    power = (dct @ line @ dct.mT).diagonal()
    noise = 1 + 0.5**2 * power[:, None] * power
    signal = deviations.double().square()
    alpha = objective.corruption.blur.factors(torch.tensor(sigma, dtype=torch.float64))  # type: ignore[attr-defined]
    expected = alpha * signal / (alpha**2 * signal + sigma**2 * noise)
    torch.testing.assert_close(best, expected, rtol=0, atol=0.03)


def test_trained_on_patches_it_makes_whole_images(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])
    made = recipe(SECOND, PATCHES, data={"path": str(path)}, training={"images": 48})
    assert made.coord_frequencies == 0
    Trainer(made, tmp_path / "run").run()
    second = tessera.load(tmp_path / "run", device="cpu")
    both = assemble_relay([pipeline(FIRST), second])
    assert both.sample("0-1").shape == (2, 8, 8, 3)
    assert both.cost().evaluations > second.cost().evaluations
    # Parts of the picture have blocks on the same grid.
    part = second.sample("0", start_from=small(side=2), window="2,4,4,4")
    assert part.shape == (1, 4, 4, 3)
    with pytest.raises(TesseraError, match=r"column 1 and row 4.*multiples of 2"):
        second.check("0", None, start_from=small(side=2), window="1,4,4,4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view": {"kind": "patches"}, "objective": {"block": 4}},
         r"patches of 2 pixels .* blocks of 4x4: .* that fits the network: 4, 8\. Set"),
        ({"view": {"kind": "patches", "sizes": [6, 8]}, "objective": {"block": 4}}, "4, 8"),
        ({"view": {"kind": "patches", "sizes": [20, 64]}, "data": {"resolution": 64},
          "objective": {"block": 8}}, "patches of 20 .*: 8, 16, 24, 32, 40, 48, 56, 64. Set"),
        ({"view": {"kind": "patches", "sizes": [5, 64]}, "data": {"resolution": 64}},
         "2, 4, 6, 8, ..., 62, 64. Set"),
    ],
)  # fmt: skip
def test_patches_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(SECOND, changes)


def test_an_own_objective_says_what_grid_it_needs() -> None:
    class Blocks:
        alignment = 4

        def __call__(self, *_: Any) -> dict[str, Tensor]:
            return {}

    parts = Parts(objective=lambda recipe: Blocks())
    view = {"kind": "patches", "sizes": [4, 8]}
    made = recipe(objective={"kind": "external"}, view=view)
    x = torch.arange(64.0).reshape(1, 1, 8, 8).expand(64, -1, -1, -1)
    patch, _ = build_view(made, parts).apply(
        x, AddressedDraws(0, torch.arange(64)), StepPlan(0, 64, 4)
    )
    assert set(patch[:, 0, 0, 0].tolist()) == {0, 4, 32, 36}
    with pytest.raises(RecipeError, match=r"blocks of 4x4 pixels, and 2 .*view\.sizes"):
        build_view(recipe(objective={"kind": "external"}, view={**view, "sizes": [2, 8]}), parts)
