"""Means of blocks in a denoiser's place: what is exact, and who decides where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tessera.conditioning import Conditioning, full_grid
from tessera.diffusion.bands import Band, BandedDenoiser
from tessera.diffusion.means import block_means, enlarge_means
from tessera.diffusion.preconditioning import Edm, Preconditioned
from tessera.errors import TesseraError
from tessera.sampling.edm import edm_sampler
from tessera.sampling.seeds import SeedNoise


class Local(nn.Module):
    """A network of any size that sees the noise level, the classes and the coordinates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(5, 3, 3, padding=1)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        self.seen.append(tuple(x.shape))
        size = (x.shape[-2], x.shape[-1])
        coords = full_grid(size).expand(len(x), -1, -1, -1) if cond.coords is None else cond.coords
        assert coords.shape == (len(x), 2, *size)
        labels = 0 if cond.labels is None else cond.labels[:, None, None, None]
        return self.conv(torch.cat([x, coords], dim=1)) + noise[:, None, None, None] + labels


def banded(*factors: tuple[float, int]) -> tuple[BandedDenoiser, Preconditioned, Local]:
    network = Local()
    plain = Preconditioned(network, Edm(), (3, 8, 8), 4)
    return BandedDenoiser(plain, [Band(low, factor=f) for low, f in factors]), plain, network


def inputs(sigma: list[float]) -> tuple[Tensor, Tensor, Conditioning]:
    torch.manual_seed(1)
    level = torch.tensor(sigma)
    z = torch.randn(len(sigma), 3, 8, 8) * (1 + level[:, None, None, None])
    return z, level, Conditioning(labels=torch.arange(len(sigma)) % 4)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_enlarging_keeps_the_means(factor: int, rows: int, columns: int, seed: int) -> None:
    means = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed))
    large = enlarge_means(means, factor)
    assert large.shape == (2, 3, factor * rows, factor * columns)
    torch.testing.assert_close(block_means(large, factor), means, rtol=0, atol=1e-5)


def test_enlarging_beats_blocks_of_one_colour() -> None:
    x, y = full_grid((16, 16))
    image = torch.sin(3 * x + 2 * y)[None, None]
    means = block_means(image, 2)
    nearest = (F.interpolate(means, scale_factor=2) - image).square().mean()
    assert (enlarge_means(means, 2) - image).square().mean() < 0.5 * nearest


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_means_of_white_noise_are_white_and_weaker_by_the_factor(factor: int) -> None:
    """Exactly: the map M of 8x8 pixels to their means has M Mᵀ = I / f²."""
    pixels = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    maps = block_means(pixels, factor).reshape(64, -1)
    expected = torch.eye(maps.shape[1], dtype=torch.float64) / factor**2
    assert torch.equal(maps.T @ maps, expected)


def test_factor_one_is_the_plain_denoiser() -> None:
    one, plain, _ = banded((0.0, 1))
    z, sigma, cond = inputs([0.1, 1.0, 30.0])
    assert torch.equal(one(z, sigma, cond).mean, plain(z, sigma, cond).mean)


def test_below_the_threshold_it_is_the_plain_denoiser_and_above_that_of_the_means() -> None:
    denoiser, plain, network = banded((0.0, 1), (1.0, 2), (4.0, 4))
    for level, factor in ((0.999, 1), (1.0, 2), (3.9, 2), (4.0, 4), (80.0, 4)):
        z, sigma, cond = inputs([level] * 2)
        network.seen.clear()
        found = denoiser(z, sigma, cond).mean
        assert network.seen == [(2, 3, 8 // factor, 8 // factor)]
        coords = F.avg_pool2d(full_grid((8, 8))[None], factor).expand(2, -1, -1, -1)
        told = cond if factor == 1 else Conditioning(cond.labels, coords=coords)
        small = plain(F.avg_pool2d(z, factor), sigma / factor, told).mean
        torch.testing.assert_close(found, enlarge_means(small, factor))


def test_each_image_of_a_batch_has_its_own_band() -> None:
    denoiser, _, _ = banded((0.0, 1), (1.0, 2))
    z, sigma, cond = inputs([5.0, 0.1, 2.0, 0.9])
    together = denoiser(z, sigma, cond).mean
    for row in range(4):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], denoiser(z[one], sigma[one], cond[one]).mean)


def test_crops_keep_their_place() -> None:
    denoiser, plain, _ = banded((0.0, 2))
    z, sigma, _ = inputs([2.0])
    coords = full_grid((16, 16))[None, :, 4:12, 8:16]
    small = plain(F.avg_pool2d(z, 2), sigma / 2, Conditioning(coords=F.avg_pool2d(coords, 2))).mean
    found = denoiser(z, sigma, Conditioning(coords=coords)).mean
    torch.testing.assert_close(found, enlarge_means(small, 2))


def test_a_step_keeps_the_view_that_it_begins_with() -> None:
    denoiser, _, network = banded((0.0, 1), (1.0, 2))
    sampler = replace(edm_sampler(steps=2), levels=lambda _: [3.0, 0.5])
    noise = torch.randn(2, 3, 8, 8)
    for _ in sampler(denoiser, noise, Conditioning(), SeedNoise(range(2))):
        pass
    sides = [shape[-1] for shape in network.seen]
    assert sides == [4, 4, 8], "the second evaluation of the first step is at 0.5"


def test_sides_that_cannot_be_cut_are_refused() -> None:
    denoiser, _, _ = banded((0.0, 1), (1.0, 4))
    with pytest.raises(TesseraError, match=r"means of 4x4 .* 6x6"):
        denoiser(torch.zeros(1, 3, 6, 6), torch.tensor([2.0]), Conditioning())


def test_all_noise_levels_have_a_view() -> None:
    denoiser, _, network = banded((0.0, 1), (1.0, 2))
    z, sigma, cond = inputs([1e-3, 1e4])
    assert denoiser(z, sigma, cond).mean.isfinite().all()
    assert [shape[-1] for shape in network.seen] == [8, 4]
