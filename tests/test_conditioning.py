"""Labels, augmentation labels and coordinates of a batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tessera.conditioning import NO_CLASS, Conditioning, one_hot

CPU = torch.device("cpu")


def test_one_hot_rows_and_the_null_class() -> None:
    rows = one_hot(torch.tensor([2, NO_CLASS, 0]), 3, 3, CPU)
    assert rows.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert rows.dtype == torch.float32
    assert one_hot(None, 3, 2, CPU).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_drop_labels_leaves_the_rest() -> None:
    cond = Conditioning(labels=torch.tensor([4, 5, 6]), augment=torch.ones(3, 2))
    dropped = cond.drop_labels(torch.tensor([True, False, True]))
    assert dropped.labels is not None
    assert dropped.labels.tolist() == [NO_CLASS, 5, NO_CLASS]
    assert dropped.augment is cond.augment
    assert cond.labels is not None
    assert cond.labels.tolist() == [4, 5, 6], "the original is not changed"
    assert Conditioning().drop_labels(torch.tensor([True])) == Conditioning()


def test_indexing_and_mapping_reach_every_field() -> None:
    cond = Conditioning(
        torch.arange(4), torch.rand(4, 3), torch.rand(4, 2, 5, 5), torch.rand(4, 3, 2, 2)
    )
    part = cond[1:3]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 2]
    for field in dataclasses.fields(part):
        assert getattr(part, field.name).shape[0] == 2
    assert cond[torch.tensor([3])].labels == torch.tensor([3])
    assert Conditioning()[0:1] == Conditioning()


def test_conditioning_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Conditioning().labels = torch.zeros(1)  # type: ignore[misc]
