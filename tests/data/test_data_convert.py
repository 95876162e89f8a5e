"""Conversion: the released tool's output, every format, odd files, interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

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

from tessera.data import convert as module
from tessera.data.convert import convert_images
from tessera.data.dataset import open_dataset
from tessera.errors import DataError
from tessera.images import png_bytes

TOOL = golden_cases.case("edm", "dataset")["config"]["tool"]


def everything(path):
    dataset = open_dataset(path)
    labels = None if dataset.labels is None else dataset.labels.tolist()
    return dataset.read(np.arange(len(dataset))), labels, dataset.class_names


def test_output_is_that_of_the_released_tool(tmp_path):
    tensors = golden_cases.load("edm", "dataset")
    files = {name: tensors[f"in.tool.{name}"].numpy() for name in TOOL["source_files"]}
    report = convert_images(write_folder(tmp_path / "source", files), tmp_path / "set.zip")
    assert report.count == len(files)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert archive.namelist() == TOOL["zip_members"]
        compression = {entry.compress_type for entry in archive.infolist()}
        assert sorted(compression) == TOOL["compress_types"]
        content = json.loads(archive.read("dataset.json"))
        assert content["labels"] == TOOL["dataset_json"]["labels"]
        assert content["class_names"] == ["a", "b", "c"]
        for name in TOOL["zip_members"][:-1]:
            expected = tensors[f"out.tool.{name}"].numpy()
            # An uncompressed PNG holds at least its pixels.
            assert len(archive.read(name)) > expected.size
    images, labels, _ = everything(tmp_path / "set.zip")
    expected = [tensors[f"out.tool.{name}"].numpy() for name in TOOL["zip_members"][:-1]]
    np.testing.assert_array_equal(images.transpose(0, 2, 3, 1), np.stack(expected))
    assert labels == [label for _, label in TOOL["dataset_json"]["labels"]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    count=st.integers(1, 20),
    channels=st.sampled_from([1, 3]),
    kind=st.sampled_from(["none", "index", "vector"]),
    forms=st.lists(st.sampled_from(["zip", "packed", "folder"]), min_size=1, max_size=3),
    workers=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_chains_of_conversions_lose_nothing(tmp_path, count, channels, kind, forms, workers, seed):
    images = random_images(count, channels, 4, seed)
    labels = {
        "none": None,
        "index": [i % 3 for i in range(count)],
        "vector": [[i / 4, 1.0] for i in range(count)],
    }[kind]
    names = ("a", "b", "c") if kind == "index" else None
    path = write_archive(tmp_path / "start.zip", images, labels, names)
    suffixes = {"zip": ".zip", "packed": ".safetensors", "folder": ""}
    for step, form in enumerate(forms):
        target = tmp_path / f"{step}{suffixes[form]}"
        convert_images(path, target, workers=workers, overwrite=True)
        path = target
    found, found_labels, found_names = everything(path)
    np.testing.assert_array_equal(found, images)
    assert found_labels == labels
    assert found_names == names


def test_same_source_same_bytes(tmp_path):
    files = {f"{i % 2}/{i}.png": last(x) for i, x in enumerate(random_images(30, size=9))}
    source = write_folder(tmp_path / "source", files)
    for suffix in (".zip", ".safetensors"):
        results = []
        for workers in (0, 3):
            target = tmp_path / f"{workers}" / f"set{suffix}"
            convert_images(source, target, resolution=(6, 6), workers=workers)
            results.append(target.read_bytes())
            time.sleep(0.01)
        assert results[0] == results[1]


def test_images_and_labels_are_as_expected_after_a_crop(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    source = write_zip(tmp_path / "a.zip", {"x/1.png": wide, "y/1.png": wide[:, :, 0]})
    target = tmp_path / "set.safetensors"
    convert_images(source, target, resolution=(8, 8), transform="center-crop")
    images, labels, names = everything(target)
    assert images.shape == (2, 3, 8, 8)
    assert (images == 200).all()
    assert (labels, names) == ([0, 1], ("x", "y"))


def test_max_images(tmp_path):
    source = write_archive(tmp_path / "a.zip", random_images(20), [0] * 19 + [1], ("a", "b"))
    report = convert_images(source, tmp_path / "b.zip", max_images=9)
    assert report.count == len(open_dataset(tmp_path / "b.zip")) == 9
    assert report.notes == ["1 of the 2 classes occur in the set"]
    # The names of the classes keep their number in a part of the set.
    assert open_dataset(tmp_path / "b.zip").num_classes == 2
    with pytest.raises(DataError, match="nothing was written"):
        convert_images(source, tmp_path / "c.zip", max_images=0)


def odd_files(tmp_path):
    image = last(random_images(1)[0])
    return write_folder(
        tmp_path / "odd",
        {
            "0.png": image,
            "1.jpg": b"no image",
            "2.png": image[:, :, 0],
            "3.png": image[:5],
            "4.png": last(random_images(1, size=5)[0]),
            "5.png": png_bytes(image)[:80],
            "6.png": image,
            "notes.txt": b"text",
        },
    )


ODD = [
    ("1.jpg", "1.jpg: not an image"),
    ("2.png", "2.png: 8x8 grey, but the first image .*0.png.* --channels 3"),
    ("3.png", "3.png: 8x5 RGB is not square; .*--resolution"),
    ("4.png", "4.png: 5x5 RGB, but the first image .*--resolution"),
    ("5.png", "5.png: cannot be decoded"),
]


@pytest.mark.parametrize(("name", "message"), ODD)
def test_an_odd_file_stops_the_conversion_by_name(tmp_path, name, message):
    source = odd_files(tmp_path)
    for other, _ in ODD:
        if other != name:
            (source / other).unlink()
    with pytest.raises(DataError, match=message):
        convert_images(source, tmp_path / "set.zip")
    assert sorted(os.listdir(tmp_path)) == ["odd"]


def test_skip_bad_leaves_odd_files_out_and_lists_them(tmp_path):
    source = odd_files(tmp_path)
    for target in ("a.zip", "a.safetensors", "a"):
        report = convert_images(source, tmp_path / target, skip_bad=True)
        assert report.count == len(open_dataset(tmp_path / target)) == 2
        assert [name in line for (name, _), line in zip(ODD, report.bad, strict=True)] == [True] * 5
        assert [os.path.basename(name) for name in report.ignored] == ["notes.txt"]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist()[1] == "00000/img00000001.png"


def test_options_make_odd_files_fit(tmp_path):
    source = odd_files(tmp_path)
    (source / "1.jpg").unlink()
    (source / "5.png").unlink()
    report = convert_images(source, tmp_path / "a.zip", resolution=(4, 4), channels=3)
    assert (report.count, report.shape) == (5, (3, 4, 4))
    report = convert_images(source, tmp_path / "b.zip", resolution=(4, 4), channels=1)
    assert (report.count, report.shape) == (5, (1, 4, 4))


def test_small_pictures_are_counted(tmp_path):
    big, small = last(random_images(1, size=40)[0]), last(random_images(1, size=8)[0])
    source = write_folder(tmp_path / "s", {"0.png": small, "1.png": big})
    report = convert_images(
        source, tmp_path / "a.zip", resolution=(32, 24), transform="center-crop-wide"
    )
    assert (report.count, report.too_small, report.shape) == (1, 1, (3, 32, 32))


def test_the_legacy_wide_crop_differs(tmp_path):
    source = write_folder(tmp_path / "s", {"0.png": last(random_images(1, size=40)[0])})
    options = {"resolution": (32, 16), "transform": "center-crop-wide"}
    convert_images(source, tmp_path / "a.zip", **options)
    convert_images(source, tmp_path / "b.zip", **options, released_wide_crop=True)
    assert (everything(tmp_path / "a.zip")[0] != everything(tmp_path / "b.zip")[0]).any()


def test_one_missing_label_drops_all_and_says_so(tmp_path):
    image = last(random_images(1)[0])
    labels = json.dumps({"labels": [["0.png", 3]]}).encode()
    source = write_folder(tmp_path / "s", {"0.png": image, "1.png": image, "dataset.json": labels})
    for target in ("a.zip", "a.safetensors"):
        report = convert_images(source, tmp_path / target)
        assert open_dataset(tmp_path / target).labels is None
        assert any("1 of 2 images have no label" in note for note in report.notes)


def test_side_that_is_no_power_of_two_is_noted(tmp_path):
    source = write_archive(tmp_path / "s.zip", random_images(1, size=12))
    assert "power of two" in convert_images(source, tmp_path / "a.zip").notes[0]
    assert not convert_images(source, tmp_path / "a.safetensors").notes


def test_existing_files_stay_unless_told(tmp_path):
    source = write_archive(tmp_path / "s.zip", random_images(3))
    target = write_archive(tmp_path / "t.zip", random_images(1))
    with pytest.raises(DataError, match="`overwrite=True`"):
        convert_images(source, target)
    assert len(open_dataset(target)) == 1
    convert_images(source, target, overwrite=True)
    assert len(open_dataset(target)) == 3
    folder = write_folder(tmp_path / "f", {"a/0.png": b"x"})
    with pytest.raises(DataError, match="`overwrite=True`"):
        convert_images(source, folder)
    # What is not a set of ours is not replaced by any means.
    with pytest.raises(DataError, match="holds something else than a data set"):
        convert_images(source, folder, overwrite=True)
    assert (folder / "a" / "0.png").exists()
    for _ in range(2):
        convert_images(source, tmp_path / "set", overwrite=True)
    for own in (source, tmp_path):
        with pytest.raises(DataError, match="own source"):
            convert_images(source, own, overwrite=True)
    assert source.exists()


@pytest.mark.parametrize("name", ["x.rar", "x.jpg", "x.tar.gz", "x.7z", "x.H5"])
def test_names_of_files_make_no_folders(tmp_path, name):
    source = write_archive(tmp_path / "s.zip", random_images(2))
    with pytest.raises(DataError, match=r"cannot be written.*\.zip .*\.safetensors"):
        convert_images(source, tmp_path / name)
    assert not (tmp_path / name).exists()
    convert_images(source, tmp_path / name, form="folder")
    for folder in ("photos-v1.5", "photos.", "photos"):
        assert convert_images(source, tmp_path / folder).format == "folder"


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_archive(tmp_path / "s.zip", random_images(2))
    convert_images("~/s.zip", "~/t.zip")
    assert len(open_dataset("~/t.zip")) == 2
    assert (tmp_path / "t.zip").is_file()


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_an_image_beside_the_class_folders(tmp_path, write):
    image = last(random_images(1)[0])
    names = ["cat/0.png", "cover.png", "dog/1.png"]
    source = write(tmp_path / ("s.zip" if write is write_zip else "s"), dict.fromkeys(names, image))
    with pytest.raises(DataError, match=r"cover.png lies beside .*\n\(--skip-bad leaves"):
        convert_images(source, tmp_path / "t.zip")
    with pytest.raises(DataError, match=r"cover.png lies beside the folders of the classes"):
        open_dataset(source)
    report = convert_images(source, tmp_path / "t.zip", skip_bad=True)
    assert (report.count, report.class_names, report.num_classes) == (2, ("cat", "dog"), 2)
    assert len(report.bad) == 1
    assert "cover.png" in report.bad[0]
    for path in (source, tmp_path / "t.zip"):
        dataset = open_dataset(path, skip_bad=True)
        assert dataset.class_names == ("cat", "dog")
        assert dataset.labels.tolist() == [0, 1]
    assert len(open_dataset(source, skip_bad=True).skipped) == 1


def test_one_folder_beside_images_is_no_class(tmp_path):
    image = last(random_images(1)[0])
    source = write_folder(tmp_path / "s", dict.fromkeys(["0.png", "1.png", "more/2.png"], image))
    assert open_dataset(source).labels is None
    assert convert_images(source, tmp_path / "t.zip").count == 3


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("a.png", "zip", "should end in .zip"),
        ("a.zip", "packed", "should end in .safetensors"),
        ("a.zip", "folder", "should not end in .zip"),
        ("a.zip", "tar", "choose one of zip"),
    ],
)
def test_names_tell_the_format(tmp_path, name, form, message):
    source = write_packed(tmp_path / "s.safetensors", random_images(1))
    with pytest.raises(DataError, match=message):
        convert_images(source, tmp_path / name, form=form)


@pytest.mark.parametrize("target", ["t.zip", "t.safetensors", "t"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, target, error):
    source = write_archive(tmp_path / "s.zip", random_images(100))
    real, seen = module.channels_first, []

    def failing(image):
        seen.append(image)
        if len(seen) == 70:
            raise error
        return real(image)

    monkeypatch.setattr(module, "channels_first", failing)
    with pytest.raises(error):
        convert_images(source, tmp_path / target)
    assert os.listdir(tmp_path) == ["s.zip"]


KILLED = """
import sys, time
from tessera.data import convert as module
real = module.channels_first
count = 0
def slow(image):
    global count
    count += 1
    if count == 60:
        print("half", flush=True)
        time.sleep(60)
    return real(image)
module.channels_first = slow
module.convert_images(sys.argv[1], sys.argv[2], workers=1)
"""


@pytest.mark.parametrize("target", ["t.zip", "t.safetensors"])
def test_a_killed_conversion_leaves_no_file_under_the_name(tmp_path, target):
    source = write_archive(tmp_path / "s.zip", random_images(100))
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / target).exists()
    assert convert_images(source, tmp_path / target).count == 100
