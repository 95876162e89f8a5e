"""Reading: the released reader's rules, all formats, and what goes wrong."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import golden_cases
import numpy as np
import pytest
from data_files import (
    last,
    random_images,
    write_archive,
    write_folder,
    write_packed,
    write_zip,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tessera.data.dataset import choose_subset, open_dataset
from tessera.errors import DataError

GOLDEN = golden_cases.case("edm", "dataset")["config"]
READS = {"use_labels": False, "max_size": None, "random_seed": 0, "xflip": False}


@pytest.fixture(scope="module")
def golden_archive(tmp_path_factory):
    tensors = golden_cases.load("edm", "dataset")
    tool = GOLDEN["tool"]
    names = [name for name in tool["zip_members"] if name.endswith(".png")]
    images = np.stack([tensors[f"out.tool.{name}"].numpy().transpose(2, 0, 1) for name in names])
    labels = [label for _, label in tool["dataset_json"]["labels"]]
    return write_archive(tmp_path_factory.mktemp("golden") / "set.zip", images, labels)


@pytest.mark.parametrize("number", range(len(GOLDEN["datasets"])))
def test_reader_repeats_the_released_one(golden_archive, number):
    expected = GOLDEN["datasets"][number]
    tensors = golden_cases.load("edm", "dataset")
    options = {**READS, **expected["options"]}
    dataset = open_dataset(
        golden_archive,
        max_images=options["max_size"],
        seed=options["random_seed"],
        xflip=options["xflip"],
    )
    assert len(dataset) == expected["length"]
    assert dataset.raw_indices.tolist() == expected["raw_idx"]
    images = dataset.read(np.arange(len(dataset)))
    np.testing.assert_array_equal(images, tensors[f"out.ds{number}.images"].numpy())
    if options["use_labels"]:
        assert dataset.num_classes == expected["label_dim"]
        one_hot = np.eye(dataset.num_classes, dtype=np.float32)[dataset.labels]
        np.testing.assert_array_equal(one_hot, tensors[f"out.ds{number}.labels"].numpy())


def test_subset_rule():
    for case in GOLDEN["max_size_subset"]:
        chosen = choose_subset(case["n"], case["max_size"], case["random_seed"])
        assert chosen.tolist() == case["raw_idx"]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(
    count=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    size=st.integers(1, 5),
    labelled=st.booleans(),
    cache=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_all_formats_give_back_what_was_written(
    tmp_path, count, channels, size, labelled, cache, seed, data
):
    images = random_images(count, channels, size, seed)
    labels = list(range(count)) if labelled else None
    names = tuple(f"класс {i}" for i in range(count)) if labelled else None
    archive = write_archive(tmp_path / "a.zip", images, labels, names)
    packed = write_packed(tmp_path / "a.safetensors", images, labels, names)
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)  # that of the example before
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    chosen = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=12)), np.int64)
    for path in (archive, packed, folder):
        dataset = open_dataset(path, cache=cache)
        assert dataset.shape == (channels, size, size)
        for _ in range(2):
            np.testing.assert_array_equal(dataset.read(chosen), images[chosen])
        assert dataset.class_names == names
        assert dataset.num_classes == (count if labelled else 0)
        assert labels == (None if dataset.labels is None else dataset.labels.tolist())
        dataset.close()


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("labels", [None, [4, 0, 2], [[0.5, 1.0], [2.0, 3.0], [4.0, 5.0]]])
def test_packed_file_is_plain_safetensors(tmp_path, size, labels):
    images = random_images(3, 1, size)
    values = (
        None if labels is None else np.array(labels, "f4" if isinstance(labels[0], list) else "i8")
    )
    path = write_packed(tmp_path / "a.safetensors", images, values, ("a", "b", "c", "d", "e"))
    with safe_open(path, "pt") as file:
        np.testing.assert_array_equal(file.get_tensor("images").numpy(), images)
        assert ("labels" in file.keys()) == (labels is not None)  # noqa: SIM118
        if labels is not None:
            np.testing.assert_array_equal(file.get_tensor("labels").numpy(), values)
            assert json.loads(file.metadata()["class_names"]) == ["a", "b", "c", "d", "e"]
    dataset = open_dataset(path)
    np.testing.assert_array_equal(dataset.read(np.arange(3)), images)
    assert (dataset.labels is None) == (labels is None)
    assert labels is None or dataset.labels.tolist() == labels


def test_folder_names_are_labels_without_a_labels_file(tmp_path):
    images = [last(image) for image in random_images(4)]
    files = {
        f"{name}.png": image
        for name, image in zip(["dog/1", "cat/b/2", "cat/1", "ant/9"], images, strict=True)
    }
    for path in (
        write_folder(tmp_path / "f", files),
        write_zip(tmp_path / "f.zip", files, zipfile.ZIP_DEFLATED),
    ):
        dataset = open_dataset(path)
        assert dataset.class_names == ("ant", "cat", "dog")
        assert dataset.labels.tolist() == [0, 1, 1, 2]
        np.testing.assert_array_equal(dataset.read(np.array([3]))[0].transpose(1, 2, 0), images[0])


def test_numbered_archive_folders_are_no_labels(tmp_path):
    images = random_images(1001, size=1)
    with zipfile.ZipFile(write_archive(tmp_path / "a.zip", images)) as file:
        file.extractall(tmp_path / "a")
    (tmp_path / "a" / "dataset.json").unlink()
    assert open_dataset(tmp_path / "a").labels is None


def test_vector_labels(tmp_path):
    vectors = [[0.25, 1.0], [0.5, -1.0]]
    dataset = open_dataset(write_archive(tmp_path / "a.zip", random_images(2), vectors))
    assert dataset.labels.dtype == np.float32
    assert dataset.labels.tolist() == vectors


def test_classes_of_the_whole_set_count_in_a_subset(tmp_path):
    path = write_archive(tmp_path / "a.zip", random_images(5), [0, 1, 2, 3, 7])
    assert open_dataset(path, max_images=1).num_classes == 8


def test_bzip2_members_are_read(tmp_path):
    image = last(random_images(1)[0])
    path = write_zip(tmp_path / "a.zip", {"a.png": image}, zipfile.ZIP_BZIP2)
    np.testing.assert_array_equal(
        open_dataset(path).read(np.array([0]))[0], np.moveaxis(image, 2, 0)
    )


def bad_set(tmp_path):
    image, other = last(random_images(1)[0]), last(random_images(1, size=9)[0])
    return write_folder(
        tmp_path / "bad",
        {
            "0.png": image,
            "1.png": b"not an image",
            "2.png": other,
            "3.png": image[:, :, 0],
            "4.png": image,
            "readme.txt": b"text",
        },
    )


@pytest.mark.parametrize(
    ("index", "message"), [(1, "1.png: not an image"), (2, "9x9 RGB"), (3, "3.png is 8x8 grey")]
)
@pytest.mark.parametrize("cache", [False, True])
def test_bad_images_are_named(tmp_path, index, message, cache):
    dataset = open_dataset(bad_set(tmp_path), cache=cache)
    with pytest.raises(DataError, match=message):
        dataset.read(np.array([0, index]))
    assert dataset.read(np.array([0, 4])).shape == (2, 3, 8, 8)


def test_skip_bad_leaves_them_out(tmp_path):
    dataset = open_dataset(bad_set(tmp_path), skip_bad=True)
    assert len(dataset) == 2
    assert [name in " ".join(dataset.skipped) for name in ("1.png", "2.png", "3.png")] == [True] * 3
    assert dataset.read(np.arange(2)).shape == (2, 3, 8, 8)


def test_damaged_zip_member_is_named(tmp_path):
    path = write_archive(tmp_path / "a.zip", random_images(3))
    content = bytearray(path.read_bytes())
    content[content.index(b"img00000001.png") + 100] ^= 1
    path.write_bytes(content)
    dataset = open_dataset(path)
    with pytest.raises(DataError, match=r"img00000001\.png is damaged"):
        dataset.read(np.arange(3))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK no", "not a whole ZIP"),
        ("a.safetensors", b"12345678123", "not a whole packed set"),
        ("a.tar", b"", "neither a folder"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / name)


def test_truncated_packed_set(tmp_path):
    path = write_packed(tmp_path / "a.safetensors", random_images(4))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="not a whole packed set"):
        open_dataset(path)


def test_missing_and_empty(tmp_path):
    for name in ("no.zip", "no.safetensors", "no"):
        with pytest.raises(DataError, match="no such file"):
            open_dataset(tmp_path / name)
    with pytest.raises(DataError, match="no images"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"no json", b'{"labels": [["0.png", "cat"]]}', b'{"labels": [3]}']
)
def test_broken_labels_file(tmp_path, content):
    write_folder(tmp_path, {"0.png": last(random_images(1)[0]), "dataset.json": content})
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(tmp_path)


def test_image_without_label_is_named(tmp_path):
    image = last(random_images(1)[0])
    labels = b'{"labels": [["0.png", 1]]}'
    write_folder(tmp_path, {"0.png": image, "1.png": image, "dataset.json": labels})
    with pytest.raises(DataError, match=r"1\.png has no label"):
        open_dataset(tmp_path)


def test_encrypted_and_misplaced_members_are_named(tmp_path):
    path = write_archive(tmp_path / "a.zip", random_images(2))
    content = path.read_bytes()
    first = content.index(b"PK\1\2")
    second = content.index(b"PK\1\2", first + 4)
    encrypted = bytearray(content)
    encrypted[second + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(DataError, match=r"img00000001\.png is encrypted"):
        open_dataset(path).read(np.array([1]))
    misplaced = bytearray(content)
    misplaced[second + 42] ^= 1
    path.write_bytes(misplaced)
    with pytest.raises(DataError, match=r"img00000001\.png is damaged \(no header"):
        open_dataset(path).read(np.array([1]))


def test_an_archive_that_nobody_uses_any_more_is_closed(tmp_path):
    path = write_archive(tmp_path / "set.zip", random_images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = open_dataset(path)
        file = dataset._reader._members._file
        del dataset
        gc.collect()
    assert file.closed


def test_threads_read_a_zip_at_once(tmp_path):
    images = random_images(200, size=16)
    path = tmp_path / "a.zip"
    write_zip(path, {f"{i:03}.png": last(x) for i, x in enumerate(images)}, zipfile.ZIP_DEFLATED)
    dataset = open_dataset(path, cache=True)
    orders = [np.random.default_rng(i).permutation(200) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for order, result in zip(orders, pool.map(dataset.read, orders), strict=True):
            np.testing.assert_array_equal(result, images[order])
