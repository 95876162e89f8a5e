"""Files that are small and would become huge, and recipes of networks that no machine holds."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import last, random_images, write_folder, write_zip
from lego_case import tiny_pipeline
from released_files import Persistent, write_snapshot, write_state
from safetensors.torch import load_file, save_file
from training_case import tiny_recipe
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.convert.records import ClosedObject, module_state
from tessera.convert.unpickle import read_container
from tessera.data.dataset import open_dataset
from tessera.data.members import open_members
from tessera.data.sources import open_source
from tessera.errors import CheckpointError, DataError, RecipeError, TesseraError
from tessera.files import sha256, write_json
from tessera.metrics.images import open_images, read_npz
from tessera.pickles import NUMPY, load_pickle
from tessera.pipelines.folder import start_from
from tessera.pipelines.loading import estimate
from tessera.recipes.build import _network, build_denoiser
from tessera.recipes.loading import load_recipe
from tessera.recipes.parts import NO_PARTS
from tessera.recipes.size import network_bytes
from tessera.sampling.output import SETTINGS_FILE, claim_folder, read_labels
from tessera.training.checkpoints import Checkpoints, load_tensors
from tessera.training.trainer import Trainer

MIB = 2**20


@contextmanager
def little_memory(most: int = 20 * MIB) -> Iterator[None]:
    """The block allocates no more at once, in Python and NumPy."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def zeros(size: int) -> Iterator[bytes]:
    yield from (bytes(MIB) for _ in range(size // MIB))


def deflated(size: int, wbits: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b"".join([*(packer.compress(part) for part in zeros(size)), packer.flush()])


def lying_zip(path: Path, name: str, declared: int, size: int = 96 * MIB) -> Path:
    """A ZIP whose member unpacks to `size` bytes and says that it has `declared`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w", force_zip64=False) as member:
            for part in zeros(size):
                member.write(part)
        packed = archive.infolist()[0].compress_size
    data = path.read_bytes()
    path.write_bytes(
        data.replace(struct.pack("<II", packed, size), struct.pack("<II", packed, declared))
    )
    return path


@pytest.mark.parametrize("declared", [100, 256 * MIB + 1])
def test_members_of_a_zip(tmp_path: Path, declared: int) -> None:
    path = lying_zip(tmp_path / "a.zip", "a.png", declared)
    with little_memory(), pytest.raises(DataError, match=r"a\.png.*(damaged|--max-file-size)"):
        open_dataset(path)


def test_the_largest_file_is_an_option(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.bin": bytes(3000)})
    write_folder(tmp_path / "a", {"a.bin": bytes(3000)})
    for path in (tmp_path / "a.zip", tmp_path / "a"):
        assert len(open_members(path).read("a.bin")) == 3000
        with pytest.raises(DataError, match="--max-file-size"):
            open_members(path, max_bytes=2999).read("a.bin")
    # Noise does not become smaller: 1,5 MiB as PNG.
    write_folder(tmp_path / "photos", {"a.png": last(random_images(1, 3, 724)[0])})
    arguments = ["data", "convert", str(tmp_path / "photos"), str(tmp_path / "b.zip")]
    refused = CliRunner().invoke(app, [*arguments, "--max-file-size", "1"])
    assert "--max-file-size" in str(refused.exception)
    assert CliRunner().invoke(app, [*arguments, "--max-file-size", "2"]).exit_code == 0


def test_labels_of_gigabytes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("dataset.json", "w") as member:
            for part in zeros(128 * MIB):
                member.write(part)
        archive.writestr("a.png", b"")
    with little_memory(), pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(tmp_path / "a.zip")


@pytest.mark.parametrize("declared", [(10, 28, 28), (2**31, 28, 28), (10, 2**31, 2**31)])
def test_idx_files(tmp_path: Path, declared: tuple[int, ...]) -> None:
    path = tmp_path / "a-images-idx3-ubyte.gz"
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, *declared)
    path.write_bytes(gzip.compress(header, 1) + deflated(96 * MIB, 31))
    with little_memory(), pytest.raises(DataError, match="idx3"), open_source(path):
        pass


def test_cifar_archives(tmp_path: Path) -> None:
    """A member, or the name of one, that would be unpacked to get past it."""
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        entry = tarfile.TarInfo("x")
        entry.size, entry.type = 4 * 2**30, kind
        packed = gzip.compress(entry.tobuf(tarfile.GNU_FORMAT), 1) + deflated(64 * MIB, 31)
        (tmp_path / "a.tar.gz").write_bytes(packed)
        with little_memory(), pytest.raises(DataError), open_source(tmp_path / "a.tar.gz"):
            pass


def test_arrays_of_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    shape = (96 * MIB // 3072, 32, 32, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("arr_0.npy", "w") as member,
    ):
        member.write(header.getvalue())
        for part in zeros(96 * MIB):
            member.write(part)
    with little_memory(), pytest.raises(DataError, match="no real images or features"):
        open_images(path)
    bare = io.BytesIO()
    np.save(bare, np.zeros(3))
    path.write_bytes(bare.getvalue())
    with pytest.raises(DataError, match="one bare array"):
        read_npz(path)


# ------------------------------------------------------------------------------------------ pickles


def nested_tuples(depth: int) -> bytes:
    """Each tuple holds the one before it twice, and the last one is a key."""
    return b"\x80\x04}(" + b")" + b"2\x86" * depth + b"K\x01u."


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02Nr\xff\xff\xff\x07.",  # a value remembered under number 2^27
        b"\x80\x02" + b"N0" * 300_000 + b"N.",
        nested_tuples(64),
    ],
    ids=["memo", "long", "hash"],
)
def test_pickles_that_cost_more_than_they_hold(program: bytes) -> None:
    with pytest.raises(DataError):
        load_pickle(io.BytesIO(program), NUMPY)
    # Of reasonable size it is read.
    assert len(load_pickle(io.BytesIO(nested_tuples(10)), NUMPY)) == 1


def test_networks_that_repeat_themselves(tmp_path: Path) -> None:
    part = Persistent("Part", _parameters={"weight": torch.nn.Parameter(torch.zeros(1))})
    for _ in range(40):
        part = Persistent("Part", _modules={"a": part, "b": part})
    record = read_container(write_snapshot(tmp_path / "a.pkl", part)).data["ema"]
    assert isinstance(record, ClosedObject)
    with pytest.raises(DataError):
        module_state(record)
    tensor = torch.zeros(1000)
    views = {f"w{i}": tensor.view(1000)[:] for i in range(50)}
    path = write_state(tmp_path / "b.pt", Persistent("Part", _buffers=views))
    with pytest.raises(DataError, match="more numbers than are stored"):
        module_state(read_container(path).data["net"])


# ------------------------------------------------------------------------------------------ recipes

HUGE = ["network.model_channels=60000", "network.channel_mult=1,1000"]


def test_networks_beyond_memory(tmp_path: Path) -> None:
    recipe = load_recipe("cifar10-small", HUGE)
    with pytest.raises(RecipeError, match="GiB of weights, and this machine"):
        build_denoiser(recipe)
    # Counting is not making.
    assert (
        estimate(load_recipe("cifar10-small", ["network.model_channels=16384"])).parameters > 1e10
    )
    made = tiny_pipeline()
    made.save(tmp_path / "pipe")
    config = json.loads((tmp_path / "pipe" / "config.json").read_text())
    config["recipe"]["network"] |= {"width": 65536, "heads": 64, "mlp_ratio": 1000}
    write_json(tmp_path / "pipe" / "config.json", config)
    with pytest.raises(RecipeError, match="GiB of weights"):
        tessera.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    "name", ["cifar10-small", "edm-cifar10-cond-ve", "cifar10-small-lego", "cifar10-small-pdm"]
)
def test_counting_is_exact_and_allocates_nothing(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        made = build_denoiser(recipe)
    built: list[torch.nn.Module] = []

    def build() -> torch.nn.Module:
        built.append(_network(recipe, NO_PARTS))
        return built[0]

    assert network_bytes(build) == sum(t.nbytes for t in (*made.parameters(), *made.buffers()))
    assert all(parameter.is_meta for parameter in built[0].parameters())
    assert sum(b.nbytes for b in built[0].buffers() if not b.is_meta) < 4 * MIB


def test_training_needs_the_weights_several_times(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = tiny_recipe(tmp_path)
    size = sum(p.nbytes for p in build_denoiser(recipe).parameters())
    monkeypatch.setattr("tessera.recipes.size.physical", lambda: 4 * size)
    build_denoiser(recipe)
    with pytest.raises(RecipeError, match="training keeps 5 times"):
        Trainer(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("network.num_blocks=1000000", "at most 64"),
        ("network.channel_mult=[]", "at least 1"),
        ("training.images=" + "9" * 30, "too large"),
        ("objective.p_mean=.nan", "p_mean"),
        ("preconditioning.sigma_data=.nan", "sigma_data"),
        ("training.seed=" + "9" * 5000, "training.seed"),
    ],
)
def test_absurd_values_are_named(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("cifar10-small", [override])


def test_bricks_without_a_common_canvas() -> None:
    sizes = [{"size": prime, "patch": 1, "depth": 1} for prime in (1021, 1019, 1013)]
    with pytest.raises(RecipeError, match="no canvas"):
        load_recipe("quickstart-digits-lego", [f"network.bricks={json.dumps(sizes)}"])


# ------------------------------------------------------------------------------------------ weights

BROKEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": lambda t: t * float("nan"),
    "infinite": lambda t: t + float("inf"),
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int32),
    "booleans": lambda t: t.to(torch.bool),
}


@pytest.mark.parametrize("how", BROKEN)
def test_weights_that_are_no_weights(tmp_path: Path, how: str) -> None:
    tiny_pipeline().save(tmp_path / "pipe")
    path = tmp_path / "pipe" / "model.safetensors"
    state = load_file(path)
    name = sorted(state)[0]
    state[name] = BROKEN[how](state[name])
    save_file(state, path)
    config = json.loads((tmp_path / "pipe" / "config.json").read_text())
    config["weights"][0]["sha256"] = sha256(path)
    write_json(tmp_path / "pipe" / "config.json", config)
    with pytest.raises(CheckpointError, match=name):
        tessera.load(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=name):
        start_from(tmp_path / "pipe", build_denoiser(tiny_pipeline().recipe).network)


@pytest.mark.parametrize("how", ["nan", "infinite", "integers"])
@pytest.mark.parametrize("group", ["model", "ema-0"])
def test_checkpoints_that_hold_no_weights(tmp_path: Path, how: str, group: str) -> None:
    tensors = {f"{g}/weight": torch.ones(3) for g in ("model", "ema-0", "optimizer")}
    broken = {**tensors, f"{group}/weight": BROKEN[how](torch.ones(3))}
    state = {
        "images": 8, "step": 1, "seconds": 1.0, "counters": {}, "meter": {}, "recipe": {},
    }  # fmt: skip
    folder = Checkpoints(tmp_path, 2).save(8, broken, state, sharded=False)
    with pytest.raises(CheckpointError, match="weight"):
        load_tensors(folder, tensors)


# ------------------------------------------------------------------------------------ deep and wide


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50 + "1" + "}" * 50])
def test_deep_json(tmp_path: Path, text: str) -> None:
    images = {"a.png": last(random_images(1)[0])}
    path = write_zip(tmp_path / "a.zip", {**images, "dataset.json": text.encode()})
    with pytest.raises(DataError, match="nested"):
        open_dataset(path)
    tiny_pipeline().save(tmp_path / "pipe")
    (tmp_path / "pipe" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="nested"):
        tessera.load(tmp_path / "pipe")


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)
MERGES = "a: &a {k: [x]}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [*{chr(97 + i)}, *{chr(97 + i)}]}}\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 50_000, "nested"),
        ("a: " + "[" * 40 + "]" * 40, "nested"),
        ("a: &a [*a]", "nested"),
        (BOMB, "aliases repeat"),
        (MERGES, "aliases repeat"),
        ("a: " + "x" * 300_000, "at most"),
        ("a: !!timestamp x", "recipes do not have"),
        ("a: !!bool x", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


def test_pickled_arrays_are_as_large_as_they_say(tmp_path: Path) -> None:
    """What NumPy's own pickles hold is read; what they only announce is not allocated."""
    array = np.arange(12.0).reshape(3, 4)
    assert np.array_equal(load_pickle(io.BytesIO(pickle.dumps(array, 2)), NUMPY), array)
    announced = pickle.dumps(array, 2).replace(b"K\x03K\x04\x86", b"J\xff\xff\xff\x7fK\x04\x86")
    with little_memory(), pytest.raises(DataError):
        load_pickle(io.BytesIO(announced), NUMPY)


@pytest.mark.parametrize("text", ["[" * 100_000, "3", '{"labels": 3}', '{"labels": [[1]]}'])
def test_notes_beside_samples(tmp_path: Path, text: str) -> None:
    """Settings and classes of samples that somebody else wrote."""
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(TesseraError, match=r"sampling\.json|other settings"):
        claim_folder(tmp_path, {"seed": 1})
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.json"):
        read_labels(tmp_path)
