"""Damaged files of every kind: whatever is wrong with them, an error in words, or it reads."""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import io
import json
import pickle
import shutil
import struct
import tarfile
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from data_files import last, random_images, write_packed, write_zip
from hostile_files import budget, odd_bytes, odd_json, seeds
from hypothesis import given

import tessera
from tessera.data.dataset import open_dataset
from tessera.data.inspect import count_labels
from tessera.data.latents import LatentDataset, is_latents
from tessera.data.sources import open_source
from tessera.errors import TesseraError
from tessera.metrics.classifier import Classifier, ClassifierFacts, ClassifierNetwork
from tessera.metrics.formats import is_measured, read_measured
from tessera.metrics.images import open_images
from tessera.metrics.reference import Reference, has_classifier, load_reference, save_reference
from tessera.metrics.statistics import FeatureStatistics
from tessera.pipelines.loading import build_pipeline
from tessera.recipes.build import build_denoiser, build_sampler, build_view, recipe_objective
from tessera.recipes.loading import dump_recipe, load_recipe, parse_recipe

refusal_or_not = contextlib.suppress(TesseraError)
TINY = dump_recipe(load_recipe("quickstart-digits"))
IMAGES = random_images(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def fresh(path: Path, data: bytes) -> Path:
    """A new file, because an old one may still be mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


@given(seeds)
@budget(150)
def test_dataset_json(folder: Path, random: Random) -> None:
    vectors = random.random() < 0.3
    labels = [[f"a/{i}.png", [0.5, 1.0] if vectors else i] for i in range(4)]
    content = odd_json({"labels": labels, "class_names": ["a", "b", "c", "d"]}, random)
    text = json.dumps(content).encode()
    text = odd_bytes(text, random) if random.random() < 0.1 else text
    images: dict[str, Any] = {f"a/{i}.png": last(IMAGES[i]) for i in range(4)}
    path = write_zip(folder / "a.zip", {**images, "dataset.json": text})
    with refusal_or_not:
        dataset = open_dataset(path)
        dataset.read(np.arange(len(dataset)))
        count_labels(dataset.labels, dataset.class_names)


LATENTS = {
    "__metadata__": {
        "format": "tessera-latents", "version": "1", "name": "x", "vae": "v", "resolution": "16",
        "downsample": "4", "scale": "0.5", "shift": "0.0", "class_names": '["a", "b"]',
    },
    "labels": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    "moments": {"dtype": "F16", "shape": [2, 4, 4, 4], "data_offsets": [16, 272]},
    "moments_flip": {"dtype": "F16", "shape": [2, 4, 4, 4], "data_offsets": [272, 528]},
}  # fmt: skip


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def split(data: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file and the rest."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@given(seeds)
@budget(200)
def test_packed_sets_and_latents(folder: Path, random: Random) -> None:
    base = folder / "base.safetensors"
    if not base.exists():
        write_packed(base, IMAGES, labels=[0, 1, 0, 1], class_names=("a", "b"))
    packed = random.random() < 0.5
    header, body = split(base.read_bytes()) if packed else (LATENTS, bytes(528))
    data = with_header(odd_json(header, random, random.choice([0, 0.03, 0.06])), body)
    data = odd_bytes(data, random) if random.random() < 0.3 else data
    path = fresh(folder / "x.safetensors", data)
    is_latents(path)
    with refusal_or_not:
        dataset: Any = open_dataset(path) if packed else LatentDataset(path)
        dataset.read(np.arange(len(dataset)))
    with refusal_or_not, open_source(path) as source:
        for record in source.records:
            record.load()


ABSURD = [
    0,
    1,
    7,
    1024,
    65536,
    10**6,
    2**31,
    2**63,
    10**30,
    1e-300,
    1e300,
    "9" * 30,
    [],
    [1024] * 16,
]


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of all values of a recipe."""
    if isinstance(value, dict):
        return [p for key, item in value.items() for p in places(item, (*above, key))]
    if isinstance(value, list):
        return [above, *(p for i, item in enumerate(value) for p in places(item, (*above, i)))]
    return [above]


@given(seeds)
@budget(60)
def test_recipes_of_absurd_sizes(random: Random) -> None:
    data: Any = copy.deepcopy(TINY)
    for _ in range(random.choice([1, 1, 2])):
        *path, key = random.choice([p for p in places(data) if p[0] != "description"])
        section = data
        for part in path:
            section = section[part]
        section[key] = copy.deepcopy(random.choice(ABSURD))
    small = mock.patch("tessera.recipes.size.physical", return_value=2**26)
    with refusal_or_not, small:
        recipe = parse_recipe(data)
        dump_recipe(recipe)
        build_denoiser(recipe)
        recipe_objective(recipe)
        build_view(recipe)
        build_sampler(recipe.fitted_sampling)


@given(seeds)
@budget(60)
def test_recipe_files(folder: Path, random: Random) -> None:
    data = odd_json(TINY, random, random.choice([0, 0.01]))
    path = folder / random.choice(["r.yaml", "r.json"])
    text = json.dumps(data) if path.suffix == ".json" else yaml.safe_dump(data)
    path.write_bytes(odd_bytes(text.encode("utf-8", "replace"), random))
    with refusal_or_not:
        load_recipe(path)


@given(seeds)
@budget(100)
def test_statistics_and_references(folder: Path, random: Random) -> None:
    base = folder / "base.npz"
    if not base.exists():
        network = ClassifierNetwork((3, 8, 8), 3)
        facts = ClassifierFacts("classes", (3, 8, 8), 3)
        eye = torch.eye(128, dtype=torch.float64)
        statistics = FeatureStatistics.from_moments(9, eye[0], eye)
        save_reference(base, Reference("x", statistics, Classifier(network, facts)))
    with np.load(base) as file:
        arrays = dict(file)
    description = odd_json(json.loads(str(arrays["tessera"])), random)
    arrays["tessera"] = np.array(json.dumps(description))
    stream = io.BytesIO()
    match random.randrange(4):
        case 0:
            np.savez(stream, **arrays)
        case 1:
            np.savez(stream, arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.arange(3))
        case 2:
            np.savez_compressed(stream, arr_0=np.zeros((3, 8, 8, 3), np.uint8))
        case 3:
            np.savez(stream, mu=np.zeros(4), sigma=np.eye(4))
    path = fresh(folder / "x.npz", odd_bytes(stream.getvalue(), random))
    is_measured(path)
    for read in (has_classifier, read_measured, load_reference, open_images):
        with refusal_or_not:
            read(path)
    content = {"fid": {"mu": np.zeros(4), "sigma": np.eye(4)}, "num_images": 5}
    statistics_pickle = fresh(folder / "y.pkl", odd_bytes(pickle.dumps(content, 4), random))
    with refusal_or_not:
        read_measured(statistics_pickle)


def cifar(random: Random) -> bytes:
    """A small CIFAR-10 archive, uncompressed, with some pickles damaged."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "batches.meta"):
            batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}
            meta = {b"label_names": [b"a"] * 10}
            data = pickle.dumps(meta if name == "batches.meta" else batch, 2)
            data = odd_bytes(data, random) if random.random() < 0.2 else data
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


@given(seeds)
@budget(60)
def test_cifar_archives(folder: Path, random: Random) -> None:
    data = cifar(random)
    data = odd_bytes(data[:2000], random) + data[2000:] if random.random() < 0.3 else data
    data = gzip.compress(data, 1)
    data = odd_bytes(data, random) if random.random() < 0.3 else data
    path = fresh(folder / "cifar.tar.gz", data)
    with refusal_or_not, open_source(path) as source:
        for record in source.records:
            record.load()


@given(seeds)
@budget(100)
def test_idx_files(folder: Path, random: Random) -> None:
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, 10, 28, 28)
    images = gzip.compress(odd_bytes(header, random) + bytes(7840), 1)
    images = odd_bytes(images, random) if random.random() < 0.5 else images
    path = fresh(folder / "t-images-idx3-ubyte.gz", images)
    labels = odd_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 10) + bytes(range(10)), random)
    fresh(folder / "t-labels-idx1-ubyte.gz", gzip.compress(labels, 1))
    with refusal_or_not, open_source(path) as source:
        for record in source.records:
            record.load()


@given(seeds)
@budget(40)
def test_pipeline_folders(folder: Path, random: Random) -> None:
    made = folder / "pipe"
    if not made.exists():
        recipe = load_recipe("quickstart-digits-lego")
        build_pipeline(recipe, build_denoiser(recipe)).save(folder / "pipe-whole")
        shutil.copytree(folder / "pipe-whole", made)
    config = json.loads((folder / "pipe-whole" / "config.json").read_text())
    header, body = split((folder / "pipe-whole" / "model.safetensors").read_bytes())
    weights = with_header(odd_json(header, random, random.choice([0, 0.002, 0.01])), body)
    fresh(made / "model.safetensors", weights)
    config["weights"][0]["sha256"] = hashlib.sha256(weights).hexdigest()
    config = odd_json(config, random, random.choice([0, 0.005, 0.02]))
    (made / "config.json").write_text(json.dumps(config))
    with refusal_or_not:
        tessera.load(made)
