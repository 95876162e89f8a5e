"""Pieces of reports: the search for copies, charts, the page."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from html_parts import Parts, loads_nothing
from hypothesis import given
from hypothesis import strategies as st

from tessera.reports import charts, page
from tessera.reports.copies import nearest_images, share_closer, small_pictures, wilson
from tessera.reports.losses import curves, last_quartiles, quarter_curves
from tessera.reports.making import affordable, shown_classes
from tessera.reports.scores import ColourLayout, blurred, ladder, shuffled


def pictures(count: int, seed: int, side: int = 8) -> torch.Tensor:
    """Random images [N, 3, side, side] that resemble each other by groups, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 2, 2), generator=generator)
    large = coarse.repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3)
    noise = torch.randint(-20, 21, large.shape, generator=generator)
    return (large + noise).clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------ copies


def search(samples: torch.Tensor, training: torch.Tensor, **options: bool) -> tuple[object, ...]:
    small = small_pictures(training)
    mirrored = small_pictures(samples.flip(-1)) if options.get("mirrored") else None
    return nearest_images(
        small_pictures(samples), lambda rows: small[rows], np.arange(len(small)), mirrored=mirrored
    )


def test_the_search_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.reports.copies._CHUNK", 7)
    samples, training = pictures(9, 0), pictures(60, 1)
    found = search(samples, training)
    a, b = (small_pictures(x) for x in (samples, training))
    every = torch.cdist(a, b) / a.shape[1] ** 0.5
    near = every.sort(dim=1).values[:, :50]
    assert found.rows.tolist() == every.argmin(dim=1).tolist()
    np.testing.assert_allclose(found.distances, near[:, 0], rtol=1e-9)
    np.testing.assert_allclose(found.relative, near[:, 0] / near.mean(dim=1), rtol=1e-9)


def test_copies_are_found_mirrored_ones_only_where_they_were_trained_on() -> None:
    training = pictures(40, 1)
    samples = training[[5, 3]].flip(-1)
    assert (search(samples, training).distances > 1).all()
    found = search(samples, training, mirrored=True)
    assert found.rows.tolist() == [5, 3]
    assert found.distances.tolist() == [0, 0]
    assert found.relative.tolist() == [0, 0]


def test_the_share_tells_copies_from_new_images() -> None:
    training, held_out, fresh = pictures(400, 0), pictures(300, 1), pictures(300, 2)
    known = search(held_out, training)
    new, copied = search(fresh, training), search(training[:50], training)
    for name in ("distances", "relative"):
        share = share_closer(getattr(new, name), getattr(known, name))
        assert 0.01 < share.of_samples < 0.1
        assert not share.more
        share = share_closer(getattr(copied, name), getattr(known, name))
        assert share.of_samples == 1
        assert share.more


def test_equal_distances_count_on_both_sides() -> None:
    share = share_closer(np.zeros(10), np.zeros(40))
    assert (share.of_samples, share.of_held_out, share.more) == (1, 1, False)


@given(st.integers(1, 400), st.data())
def test_intervals_hold_the_share(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = wilson(count, total)
    assert 0 <= low <= count / total + 1e-12
    assert count / total - 1e-12 <= high <= 1
    assert wilson(2 * count, 2 * total)[1] - wilson(2 * count, 2 * total)[0] < high - low


# ------------------------------------------------------------------------------------------ scores


def test_the_ladder_has_the_order_that_it_is_for() -> None:
    real = [pictures(120, seed).numpy() for seed in (0, 1, 2)]
    rung = ladder(ColourLayout(3), real[0] // 8, *real[1:])
    assert rung.n == rung.n_reference == 120
    assert rung.distances["floor"] < rung.distances["shuffled"]
    assert rung.distances["floor"] < rung.distances["samples"]
    assert rung.precision is not None
    assert rung.recall is not None
    assert rung.precision["samples"] < 0.1 < rung.precision["floor"]
    assert rung.recall["samples"] < 0.1 < rung.recall["floor"]
    assert ladder(ColourLayout(3), real[0][:10], *real[1:]).precision is None


def test_disorder_keeps_the_colours_and_blur_the_means() -> None:
    images = pictures(4, 0).numpy()
    mixed, soft = shuffled(images, 3), blurred(images)
    assert (mixed != images).any()
    assert (mixed == shuffled(images, 3)).all()
    for image, other in zip(images, mixed, strict=True):
        colours = [sorted(map(tuple, x.reshape(3, -1).T.tolist())) for x in (image, other)]
        assert colours[0] == colours[1]
    assert np.abs(soft.mean((2, 3)) - images.mean((2, 3))).max() < 25
    assert soft.std() < images.std()


# ------------------------------------------------------------------------------------------ losses


def test_curves_come_from_the_lines_that_have_them() -> None:
    lines = [
        {"images": 8, "loss_per_pixel": 2.0, "loss": 20.0, "loss_q0": 10.0, "loss_q3": None},
        {"images": 8, "evaluate/fid": 3.0},
        {"images": 16, "loss_per_pixel": 1.0, "loss": 10.0, "loss_q0": 5.0, "loss_q3": 20.0},
        {"images": 16, "validation/loss_per_pixel": 1.5, "validation/loss": 15.0,
         "validation/loss_q1": 30.0},
    ]  # fmt: skip
    training, held_out = curves(lines)
    assert training.points == [(8, 2.0), (16, 1.0)]
    assert held_out.points == [(16, 1.5)]
    (quarter,) = quarter_curves(lines)
    assert quarter.points == [(8, 1.0), (16, 0.5)]
    last, other = last_quartiles(lines), last_quartiles(lines, "validation/")
    assert last is not None
    assert last.values == (0.5, None, None, 2.0)
    assert other is not None
    assert other.values == (None, 3.0, None, None)
    assert last_quartiles(lines[1:2]) is None


def test_samples_are_as_many_of_each_class() -> None:
    cpu = torch.device("cpu")
    assert affordable(None, cpu, 10) == 20
    assert affordable(None, cpu, 3) == 18
    assert affordable(None, cpu, 0) == 20
    for flops, count in ((1, 500), (10**11, 20), (20 * 10**9, 100)):
        assert affordable(SimpleNamespace(sample_flops=flops), cpu, 0) == count
    assert affordable(SimpleNamespace(sample_flops=10**11), torch.device("cuda"), 0) == 500
    assert shown_classes(10) == list(range(10))
    assert len(set(shown_classes(37))) == 10


# ---------------------------------------------------------------------------------- charts, pages


@pytest.mark.parametrize("losses", [[], [(100, 0.5)], [(100, 1.0), (200, 0.99), (300, 0.01)]])
def test_loss_chart_of_any_length(losses: list[tuple[int, float]]) -> None:
    chart = charts.lines([charts.Series("loss", losses)])
    assert chart.count("<circle") == bool(losses)
    coordinates = re.findall(r'points="([^"]*)"', chart)
    if losses:
        points = [tuple(map(float, p.split(","))) for p in coordinates[0].split()]
        assert len(points) == len(losses)
        assert all(0 <= x <= 720 and 0 <= y <= 300 for x, y in points)
        # Smaller losses are drawn lower, where y is larger.
        assert [y for _, y in points] == sorted(y for _, y in points)


def test_scale_draws_longer_bars_for_larger_values() -> None:
    marks = [charts.Mark("a", 0.01, "floor"), charts.Mark("b", 3.0, "ceiling")]
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="16"', charts.scale(marks))]
    assert widths[0] < widths[1]


def test_groups_and_spreads_stay_within_their_frames() -> None:
    made = charts.groups("abcd", [("x", (1.0, None, 3.0, 0.0), "a")], "loss")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" rx', made)]
    assert len(heights) == 3
    assert heights[1] == pytest.approx(3 * heights[0], rel=0.01)
    for values in ([1.0, 2.0, 5.0], [1.0, 1.0]):
        drawn = charts.spread([("x", values, "a")], values[0], "distance")
        found = re.findall(r'points="([^"]*)"', drawn)[0].split()
        assert all(0 <= float(n) <= 720 for point in found for n in point.split(","))
        Parts(drawn)


def test_a_page_escapes_all_that_it_is_given() -> None:
    nasty = '<b onclick="x">&'
    image = page.Picture(np.zeros((300, 200, 3), np.uint8), nasty, wrong=True)
    made = page.page(
        nasty,
        [
            page.header(nasty, nasty, [page.Tile(nasty, nasty, "good")]),
            page.section(nasty, page.code(nasty, nasty) + page.code(nasty, nasty, folded=True)),
            page.gallery([(nasty, [image]), ("", [image])], nasty),
            page.strip([nasty, nasty], [(nasty, [image])]),
            page.couples([(image, image, nasty)]),
            page.table([[nasty, nasty]], [nasty, nasty]) + page.items([nasty]),
            page.legend([(nasty, "a")]),
            charts.scale([charts.Mark(nasty, 1.0, "floor")]),
        ],
    )
    assert "<b onclick" not in made
    parts = Parts(made)
    assert loads_nothing(made)
    assert {a["alt"] for a in parts.images()} == {nasty}
    assert all(str(a["src"]).startswith("data:image/jpeg") for a in parts.images())
