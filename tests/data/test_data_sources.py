"""Foreign collections: CIFAR-10, MNIST, LMDB, folders, ZIP."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from data_files import last, random_images, write_archive, write_folder, write_packed, write_zip

from tessera.data.dataset import open_dataset
from tessera.data.sources import open_source
from tessera.errors import DataError
from tessera.images import png_bytes


def contents(path, **options):
    """Source, labels and images (loaded while it is open)."""
    with open_source(path, **options) as source:
        records = list(source.records)
        assert len(records) == source.count
        return source, [r.label for r in records], [r.load() for r in records]


# A Python 2 pickle (protocol 2) of {'labels': [3], 'data': array([[1, 2]], uint8)}: its byte
# strings (opcode U) and module names are what the original archive has.
PYTHON2 = (
    b"\x80\x02}(U\x06labels]K\x03aU\x04data"
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    b"(K\x01K\x01K\x02\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x02tbu."
)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def write_cifar(path, batches, meta=None):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**batches, **({"batches.meta": meta} if meta else {})}.items():
            data = content if isinstance(content, bytes) else pickle.dumps(content, 2)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def cifar_batches(per_batch=2):
    images = random_images(5 * per_batch, 3, 32)
    labels = [i % 10 for i in range(5 * per_batch)]
    batches = {
        f"data_batch_{i + 1}": {
            b"data": images[i * per_batch : (i + 1) * per_batch].reshape(per_batch, -1),
            b"labels": labels[i * per_batch : (i + 1) * per_batch],
        }
        for i in range(5)
    }
    # Out of order in the file, as archives may be.
    return images, labels, dict(reversed(batches.items()))


def test_cifar10(tmp_path):
    images, labels, batches = cifar_batches()
    names = [f"class {i}".encode() for i in range(10)]
    path = write_cifar(tmp_path / "cifar-10-python.tar.gz", batches, {b"label_names": names})
    source, found, loaded = contents(path)
    assert found == labels
    assert source.class_names == tuple(f"class {i}" for i in range(10))
    np.testing.assert_array_equal(np.stack(loaded).transpose(0, 3, 1, 2), images)


def test_incomplete_and_evil_cifar10(tmp_path):
    _, _, batches = cifar_batches()
    evil = {**batches, "data_batch_2": pickle.dumps(Attack(), 2)}
    for content, message in (
        ({k: v for k, v in batches.items() if k != "data_batch_3"}, "data_batch_3 missing"),
        (evil, r"data_batch_2: it refers to \w+\.mkdir, which may run code"),
        ({**batches, "data_batch_4": {b"data": [1], b"labels": [1]}}, "data_batch_4: should hold"),
        ({**batches, "data_batch_5": [1]}, "data_batch_5: should hold"),
    ):
        path = write_cifar(tmp_path / "cifar-10-python.tar.gz", content)
        with pytest.raises(DataError, match=message), open_source(path):
            pass
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="not a whole CIFAR-10"), open_source(path):
        pass


def write_idx(path, values):
    header = struct.pack(">4B", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    path.write_bytes(gzip.compress(header + values.tobytes()))
    return path


def test_mnist(tmp_path):
    images = random_images(3, 1, 28)[:, 0]
    path = write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([4, 0, 9], np.uint8))
    source, labels, loaded = contents(path)
    assert labels == [4, 0, 9]
    assert source.class_names == tuple("0123456789")
    padded = np.zeros((3, 32, 32), np.uint8)
    padded[:, 2:30, 2:30] = images
    np.testing.assert_array_equal(np.stack(loaded), padded)


def test_mnist_that_does_not_fit(tmp_path):
    path = write_idx(tmp_path / "train-images-idx3-ubyte.gz", random_images(3, 1, 28)[:, 0])
    assert contents(path)[1] == [None] * 3
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([1, 2], np.uint8))
    with pytest.raises(DataError, match="2 labels for 3 images"), open_source(path):
        pass
    for data in (path.read_bytes()[:100], gzip.compress(b"\0\0\x08\x01\0\0\0\0"), b"plain"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"), open_source(path):
            pass


def write_lmdb(path, entries):
    lmdb = pytest.importorskip("lmdb")
    path.mkdir()
    with lmdb.open(str(path), map_size=1 << 22) as database, database.begin(write=True) as batch:
        for key, value in entries.items():
            batch.put(key, value)
    return path


def test_lmdb(tmp_path):
    images = [last(image) for image in random_images(3)]
    entries = dict(zip([b"b", b"a", b"c"], map(png_bytes, images), strict=True))
    source, labels, loaded = contents(write_lmdb(tmp_path / "bedroom_lmdb", entries))
    assert labels == [None] * 3
    assert source.kind == "LMDB folder"
    np.testing.assert_array_equal(np.stack(loaded), np.stack([images[1], images[0], images[2]]))


def test_damaged_lmdb_entry_is_named(tmp_path):
    path = write_lmdb(tmp_path / "x_lmdb", {b"key17": b"junk"})
    with pytest.raises(DataError, match="key17: not an image"):
        contents(path)


def test_folder_is_ordered_by_path_components(tmp_path):
    names = ["a-b/1.png", "a/2.png", "a/b/3.png", "a.png"]
    write_folder(tmp_path / "f", dict.fromkeys(names, last(random_images(1)[0])))
    with open_source(tmp_path / "f") as source:
        order = [record.name.removeprefix(f"{tmp_path}/f/") for record in source.records]
        labels = [record.label for record in source.records]
    assert order == ["a/2.png", "a/b/3.png", "a-b/1.png", "a.png"]
    assert source.class_names == ("a", "a-b")
    assert labels == [0, 0, 1, None]  # beside the folders of the classes


def test_zip_looks_through_the_folder_around_everything(tmp_path):
    image = last(random_images(1)[0])
    names = ["pets/cat/1.png", "pets/dog/1.png", "__MACOSX/pets/._1.png", "pets/readme.md"]
    source, labels, _ = contents(write_zip(tmp_path / "a.zip", dict.fromkeys(names, image)))
    assert source.class_names == ("cat", "dog")
    assert labels == [0, 1]
    assert open_dataset(tmp_path / "a.zip").labels.tolist() == labels
    assert source.ignored == ("__MACOSX/pets/._1.png", "pets/readme.md")


def test_own_formats_are_sources_too(tmp_path):
    images = random_images(4, 1)
    for write, name in ((write_archive, "a.zip"), (write_packed, "a.safetensors")):
        path = write(tmp_path / name, images, [0, 1, 2, 1], ("x", "y", "z"))
        source, labels, loaded = contents(path)
        assert labels == [0, 1, 2, 1]
        assert source.class_names == ("x", "y", "z")
        np.testing.assert_array_equal(np.stack(loaded), images[:, 0])


def test_unknown_kinds(tmp_path):
    (tmp_path / "a.rar").write_bytes(b"x")
    for name, message in (("a.rar", "known are"), ("b.zip", "no such file")):
        with pytest.raises(DataError, match=message), open_source(tmp_path / name):
            pass
