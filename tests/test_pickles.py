"""Pickles that may hold plain values and NumPy's, and nothing else."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera.errors import DataError
from tessera.pickles import NUMPY, Stand, load_pickle

# A Python 2 pickle (protocol 2) of {'labels': [3], 'data': array([[1, 2]], uint8)}: its byte
# strings (opcode U) and module names are what CIFAR-10's archive has.
PYTHON2 = (
    b"\x80\x02}(U\x06labels]K\x03aU\x04data"
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    b"(K\x01K\x01K\x02\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x02tbu."
)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def test_python2() -> None:
    content = load_pickle(io.BytesIO(PYTHON2), NUMPY, encoding="bytes")
    assert content[b"labels"] == [3]
    np.testing.assert_array_equal(content[b"data"], np.array([[1, 2]], np.uint8))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_numbers(protocol: int) -> None:
    value = {"a": np.arange(6.0).reshape(2, 3), "b": np.float64(0.5), "c": [None, True, b"x"]}
    found = load_pickle(io.BytesIO(pickle.dumps(value, protocol)), NUMPY)
    np.testing.assert_array_equal(found["a"], value["a"])
    assert (found["b"], found["c"]) == (value["b"], value["c"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"refers to \w+\.mkdir, which may run code"):
        load_pickle(io.BytesIO(pickle.dumps({"data": Attack()}, protocol)), NUMPY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", b"\x80\x02}", b"cos\nsystem\n(S'x'\ntR.", PYTHON2[:-9]])
def test_damaged(data: bytes) -> None:
    with pytest.raises(DataError):
        load_pickle(io.BytesIO(data), NUMPY)


def test_ids_of_values_elsewhere() -> None:
    pickled = b"\x80\x02K\x07Q."
    assert load_pickle(io.BytesIO(pickled), {}, persistent=lambda pid: pid + 1) == 8
    with pytest.raises(DataError, match="outside"):
        load_pickle(io.BytesIO(pickled), {})


@pytest.mark.parametrize("name", ["numpy\nndarray", "numpy\ndtype", "m\nf", "c\nOrderedDict"])
def test_what_stands_for_a_name_stays_as_it_is(name: str) -> None:
    """The opcode that gives an object its state also sets attributes, of functions and classes."""
    function = Stand(lambda: 1)
    names = {**NUMPY, ("m", "f"): function, ("c", "OrderedDict"): OrderedDict}
    for state in (b"}X\x04\x00\x00\x00copyK\x01s", b"N}X\x04\x00\x00\x00copyK\x01s\x86"):
        with pytest.raises(DataError):
            load_pickle(io.BytesIO(b"\x80\x02c" + name.encode() + b"\n" + state + b"b."), names)
    assert function() == 1
