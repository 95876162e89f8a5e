"""Batches: sharing between processes, independence of threads, errors, closing."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from data_files import last, random_images, write_archive, write_folder, write_packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.data.dataset import open_dataset
from tessera.data.loader import Loader, StepPlan
from tessera.data.order import EpochOrder, WindowedOrder
from tessera.data.views import FullView
from tessera.errors import DataError

IMAGES = random_images(11)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "a.safetensors"
    return open_dataset(write_packed(path, IMAGES, list(range(11))))


def plans(view: FullView, start: int = 0):
    return (view.plan(start + step * view.batch) for step in itertools.count())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    world=st.sampled_from([1, 2, 3]),
    share=st.integers(1, 5),
    start=st.integers(0, 100),
    windowed=st.booleans(),
)
def test_processes_share_the_global_batch(dataset, world, share, start, windowed):
    def order():
        return WindowedOrder(11, 5) if windowed else EpochOrder(11, 5)

    steps = [StepPlan(start + i * world * share, world * share) for i in range(3)]
    with Loader(dataset, order(), steps) as loader:
        whole = list(loader)
    parts = []
    for rank in range(world):
        with Loader(dataset, order(), steps, rank=rank, world=world) as loader:
            parts.append(list(loader))
    assert len(whole) == 3
    for batch, *shares in zip(whole, *parts, strict=True):
        assert all(part.plan == batch.plan for part in shares)
        assert torch.equal(torch.cat([part.images for part in shares]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in shares]), batch.labels)
        assert torch.equal(torch.cat([part.numbers for part in shares]), batch.numbers)
        first = batch.plan.first_image
        assert batch.numbers.tolist() == list(range(first, first + world * share))
        np.testing.assert_array_equal(batch.images.numpy(), IMAGES[batch.labels.numpy()])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_threads(dataset, workers):
    def first_batches(workers):
        loader = Loader(dataset, EpochOrder(11, 0), plans(FullView(4)), workers=workers)
        with loader:
            return [batch.labels for batch in itertools.islice(loader, 9)]

    expected = EpochOrder(11, 0).indices(np.arange(36)).reshape(9, 4)
    np.testing.assert_array_equal(torch.stack(first_batches(workers)).numpy(), expected)


def test_a_later_start_continues_the_sequence(dataset):
    with Loader(dataset, EpochOrder(11, 0), plans(FullView(4))) as loader:
        whole = [batch.labels.tolist() for batch in itertools.islice(loader, 8)]
    with Loader(dataset, EpochOrder(11, 0), plans(FullView(4), start=12)) as loader:
        later = [batch.labels.tolist() for batch in itertools.islice(loader, 5)]
    assert later == whole[3:]


def test_batch_must_divide(dataset):
    with pytest.raises(DataError, match="10 images cannot be shared equally by 4"):
        Loader(dataset, EpochOrder(11, 0), plans(FullView(10)), world=4)


def test_types(dataset):
    with Loader(dataset, EpochOrder(11, 0), [StepPlan(0, 2)]) as loader:
        batch = next(loader)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.numbers.dtype == torch.int64
    with Loader(dataset, EpochOrder(11, 0), [StepPlan(0, 2)], use_labels=False) as loader:
        assert next(loader).labels is None


def test_label_vectors_are_refused(tmp_path):
    vectors = open_dataset(write_archive(tmp_path / "a.zip", IMAGES[:1], [[0.5, 0.5]]))
    with pytest.raises(DataError, match="vectors"):
        Loader(vectors, EpochOrder(1, 0), [StepPlan(0, 1)])
    with Loader(vectors, EpochOrder(1, 0), [StepPlan(0, 1)], use_labels=False) as loader:
        assert next(loader).labels is None


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_reaches_the_caller(tmp_path, workers):
    image = last(IMAGES[0])
    write_folder(tmp_path, {"0.png": image, "1.png": b"broken", "2.png": image})
    damaged = open_dataset(tmp_path)
    steps = [StepPlan(i, 1) for i in range(3)]
    with Loader(damaged, WindowedOrder(3, 0, shuffle=False), steps, workers=workers) as loader:
        assert next(loader).images.shape == (1, 3, 8, 8)
        with pytest.raises(DataError, match=r"1\.png"):
            next(loader)


def test_closing_stops_the_threads(dataset):
    loader = Loader(dataset, EpochOrder(11, 0), plans(FullView(2)), workers=3)
    next(loader)
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tessera-data")]
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_read_ahead_is_bounded(dataset):
    taken = []

    def counted():
        for step in range(1000):
            taken.append(step)
            yield StepPlan(step, 1)

    with Loader(dataset, EpochOrder(11, 0), counted()) as loader:
        for _ in range(3):
            next(loader)
        assert len(taken) <= 8


def test_full_view():
    view = FullView(64)
    assert view.plan(640) == StepPlan(640, 64, None)
    x = torch.zeros(2, 3, 4, 4)
    assert view.apply(x, None, view.plan(0)) == (x, None)
