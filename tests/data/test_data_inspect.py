"""Figures and sample pictures."""

from __future__ import annotations

import numpy as np
import pytest
from data_files import random_images, write_archive, write_packed

from tessera.data.dataset import open_dataset
from tessera.data.inspect import sample_grid, summarise


@pytest.mark.parametrize("channels", [1, 3])
def test_figures(tmp_path, channels):
    images = random_images(300, channels)
    labels = [0] * 200 + [2] * 100
    path = write_packed(tmp_path / "a.safetensors", images, labels, ("x", "y", "z"))
    summary = summarise(open_dataset(path), path)
    assert (summary.count, summary.shape) == (300, (channels, 8, 8))
    np.testing.assert_allclose(summary.mean, images.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(summary.std, images.std((0, 2, 3)), rtol=1e-10)
    assert [(c.index, c.name, c.count) for c in summary.classes] == [(0, "x", 200), (2, "z", 100)]
    assert summary.num_classes == 3
    assert summary.bytes == path.stat().st_size


def test_label_vectors_are_no_classes(tmp_path):
    path = write_archive(tmp_path / "a.zip", random_images(2), [[1.0, 2.0], [3.0, 4.0]])
    dataset = open_dataset(path)
    summary = summarise(dataset, path)
    assert (summary.classes, summary.num_classes, summary.label_vectors) == ((), 0, 2)
    assert sample_grid(dataset, 2).shape[2] == 3


def test_the_picture_has_one_row_a_class(tmp_path):
    """Images of a class have one colour, so a row of the picture has that colour only."""
    levels = np.array([50, 100, 150], np.uint8)
    labels = np.arange(12) % 3
    images = np.broadcast_to(levels[labels][:, None, None, None], (12, 1, 16, 16))
    path = write_packed(tmp_path / "a.safetensors", images, labels, ("one", "two", "three"))
    picture = sample_grid(open_dataset(path), columns=3)
    height = (picture.shape[0] + 2) // 3
    left = picture.shape[1] - (3 * 66 - 2)
    for row, level in enumerate(levels):
        cells = picture[row * height : row * height + 64, left:]
        assert set(np.unique(cells)) == {level, 255}
        assert (picture[row * height : row * height + 64, :left] < 128).any()  # its name


def test_picture_without_labels(tmp_path):
    path = write_packed(tmp_path / "a.safetensors", random_images(7))
    assert sample_grid(open_dataset(path), columns=4).shape == (2 * 66 - 2, 4 * 66 - 2, 3)
