"""Packed sets of latents that are brought up to date, interrupted, and shared by processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from data_files import random_images, write_packed
from numpy.typing import NDArray
from processes_case import in_processes
from tiny_vae import save_vae

from tessera.data import latent_keys
from tessera.data.codec import VaeCodec
from tessera.data.dataset import open_dataset
from tessera.data.encoding import LatentReport, write_latents
from tessera.data.latent_cache import Changes
from tessera.data.latent_formats.base import LatentInfo, LatentPlan
from tessera.data.latent_formats.packed import PACKED, PackedLatentWriter
from tessera.data.latent_formats.registry import latent_sink
from tessera.data.latent_keys import EncodedRows, alone, image_key
from tessera.data.latents import channel_statistics, open_latents
from tessera.errors import DataError


class Killed(BaseException):
    """The end of a process, as far as the code in it can tell."""


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("cache") / "vae")


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return random_images(12, size=8)


def encode(
    vae: Path, images: NDArray[np.uint8], target: Path, labels: list[int] | None = None, **how: Any
) -> LatentReport:
    name = target.with_name("images-of-" + target.name)
    labels = labels or [i % 2 for i in range(len(images))]
    source = write_packed(name, images, labels=labels, class_names=("ant", "bee"))
    codec = VaeCodec(str(vae), precision=how.pop("compute", "fp32"))
    return write_latents(open_dataset(source), codec, target, **{"batch": 3, **how})


def changes(report: LatentReport) -> tuple[int, ...]:
    """Kept, encoded, dropped, repeats."""
    found = report.changes
    assert found is not None
    return found.kept, found.encoded, found.dropped, found.repeats


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_only_what_is_new_or_changed_is_encoded(
    vae: Path, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "set.safetensors"
    first = encode(vae, pixels[:8], path, xflip=True)
    assert changes(first) == (0, 8, 0, 0)
    before = safetensors.numpy.load_file(path)
    assert before["keys"].tolist() == [list(image_key(image)) for image in pixels[:8]]
    untouched = path.stat().st_mtime_ns
    again = encode(vae, pixels[:8], path, xflip=True)
    assert again.changes == Changes(8, 0, 0, 0, 0, written=False)
    assert path.stat().st_mtime_ns == untouched
    # Gone: 0, 1; changed: 2; new: 8, 9, of which 9 comes twice; in another order.
    changed = pixels.copy()
    changed[2, 0, 0, 0] ^= 1
    order = [9, 7, 6, 2, 5, 4, 9, 3, 8]
    report = encode(vae, changed[order], path, [1] * 9, xflip=True)
    assert changes(report) == (5, 3, 3, 1)
    after = safetensors.numpy.load_file(path)
    fresh = tmp_path / "fresh.safetensors"
    encode(vae, changed[order], fresh, [1] * 9, xflip=True)
    expected = safetensors.numpy.load_file(fresh)
    for name in ("moments", "moments_flip"):
        for row, index in enumerate(order):
            if index in (3, 4, 5, 6, 7):
                assert (after[name][row] == before[name][index]).all()
        assert np.abs(after[name] - expected[name]).max() < 5e-3
        assert (after[name][0] == after[name][6]).all()
    assert after["labels"].tolist() == [1] * 9
    # Labels alone, or the scale alone: nothing is encoded, and the file says the new ones.
    assert changes(encode(vae, changed[order], path, [0] * 9, xflip=True)) == (8, 0, 0, 1)
    assert open_latents(path).labels.tolist() == [0] * 9
    assert hidden(tmp_path) == []


def test_each_image_is_encoded_once(
    vae: Path, pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    encode_once = VaeCodec.encode
    monkeypatch.setattr(
        VaeCodec, "encode", lambda self, x: seen.append(len(x)) or encode_once(self, x)
    )
    path = tmp_path / "set.safetensors"
    assert changes(encode(vae, pixels[[0, 1, 0, 1, 2]], path)) == (0, 3, 0, 2)
    assert sum(seen) == 3
    # The mirrored images, later: the others are not encoded anew.
    plain = safetensors.numpy.load_file(path)["moments"]
    seen.clear()
    assert changes(encode(vae, pixels[[0, 1, 0, 1, 2]], path, xflip=True)) == (0, 3, 0, 2)
    assert sum(seen) == 3
    assert (safetensors.numpy.load_file(path)["moments"] == plain).all()
    seen.clear()
    assert changes(encode(vae, pixels[:3], path, xflip=True, overwrite=True)) == (0, 3, 0, 0)
    assert sum(seen) == 6


def test_what_cannot_be_kept_is_refused(
    vae: Path, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "set.safetensors"
    encode(vae, pixels, path, xflip=True)
    content = path.read_bytes()
    other = save_vae(tmp_path / "other")
    weights = other / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["quant_conv.bias"] += 1
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    small, plain = random_images(4, size=16), tmp_path / "plain.safetensors"
    for images, how, message in (
        (pixels, {"vae": other}, "has other weights than"),
        (pixels, {"compute": "bf16"}, "encoded in fp32, not bf16"),
        (pixels, {"precision": "float32"}, "numbers are float16, not float32"),
        (small, {}, "its images are of side 8, not 16"),
        (random_images(4, seed=9, size=8), {}, "holds none of these images"),
        (pixels, {"xflip": False}, r"give `xflip=True` to keep them"),
    ):
        with pytest.raises(DataError, match=message) as error:
            encode(**{"vae": vae, "images": images, "target": path, "xflip": True, **how})
        assert "overwrite" in str(error.value)
    assert path.read_bytes() == content
    # The same weights elsewhere are the same VAE.
    moved = save_vae(tmp_path / "moved")
    assert changes(encode(moved, pixels, path, xflip=True)) == (12, 0, 0, 0)
    assert changes(encode(other, pixels, path, overwrite=True)) == (0, 12, 0, 0)
    # A set of version 1 has no keys.
    plan = LatentPlan("plain", 4, (4, 4, 4), LatentInfo(), False, None, None, "float16")
    with latent_sink(plain, PACKED, plan) as put:
        put(0, torch.zeros(4, 8, 4, 4))
    assert len(open_latents(plain)) == 4
    with pytest.raises(DataError, match="does not say of which images"):
        encode(vae, pixels, plain)
    assert hidden(tmp_path) == []


def test_numbers_that_do_not_fit(
    vae: Path, pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VaeCodec, "encode", lambda self, x: torch.full((len(x), 8, 4, 4), 1e6))
    with pytest.raises(DataError, match="not finite or do not fit into float16"):
        encode(vae, pixels, tmp_path / "set.safetensors")


def test_an_image_that_changes_meanwhile(
    vae: Path, pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.data.latent_cache.image_keys", lambda data, n: [bytes(32)] * 12)
    with pytest.raises(DataError, match="changed while they were encoded"):
        encode(vae, pixels, tmp_path / "set.safetensors")


@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere_and_repeated(
    vae: Path, pixels: NDArray[np.uint8], whole: bytes, tmp_path: Path, seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed within a write, up to three times: the bytes are those of one run."""
    chance, path = random.Random(seed), tmp_path / "set.safetensors"
    write, left = latent_keys.write_all, [0]

    def mortal(handle: int, content: bytes) -> None:
        if left[0] == 0:
            write(handle, content[: chance.randrange(len(content) + 1)])
            raise Killed
        left[0] -= 1
        write(handle, content)

    monkeypatch.setattr(latent_keys, "write_all", mortal)
    for _ in range(chance.randrange(1, 4)):
        left[0] = chance.randrange(4)
        try:  # what is left may be less than that
            encode(vae, pixels, path, xflip=True)
        except Killed:
            assert not path.exists()
    monkeypatch.setattr(latent_keys, "write_all", write)
    encode(vae, pixels, path, xflip=True)
    assert path.read_bytes() == whole
    assert hidden(tmp_path) == []


@pytest.fixture(scope="module")
def whole(vae: Path, pixels: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The set that is encoded at once."""
    path = tmp_path_factory.mktemp("whole") / "set.safetensors"
    encode(vae, pixels, path, xflip=True)
    return path.read_bytes()


def test_an_interrupted_command_goes_on(
    vae: Path, pixels: NDArray[np.uint8], whole: bytes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, batches = tmp_path / "set.safetensors", []
    encode_once = VaeCodec.encode

    def mortal(self: VaeCodec, x: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        if len(batches) == 5:
            raise Killed
        return encode_once(self, x)

    monkeypatch.setattr(VaeCodec, "encode", mortal)
    with pytest.raises(Killed):
        encode(vae, pixels, path, xflip=True)
    report = encode(vae, pixels, path, xflip=True)
    assert report.changes == Changes(0, 6, 6, 0, 0, written=True)
    assert path.read_bytes() == whole
    # What is left of an encoding is not used where it does not belong.
    batches.clear()
    with pytest.raises(Killed):
        encode(vae, pixels, path, xflip=True, overwrite=True)
    assert path.read_bytes() == whole
    assert len(hidden(tmp_path)) == 1
    report = encode(vae, pixels, tmp_path / "other.safetensors", xflip=True)
    assert changes(report)[1] == 12
    report = encode(vae, pixels, path, xflip=True, overwrite=True, compute="bf16")
    assert changes(report)[1] == 12
    assert hidden(tmp_path) == []


def test_rows_that_are_torn_or_damaged_end_the_file(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows", np.arange(24, dtype=np.uint8).reshape(3, 8)
    keys = [bytes([n]) * 32 for n in range(3)]
    with EncodedRows(path, 8).appending() as appender:
        for n in range(3):
            appender.add(keys[n : n + 1], {False: rows[n : n + 1]})
    content = path.read_bytes()
    size = len(content) // 3
    found = EncodedRows(path, 8)
    assert [found.row((key, False)).tolist() for key in keys] == rows.tolist()
    damaged = bytearray(content)
    damaged[-1] ^= 1
    for bad in (
        content[:-1],
        content[: 2 * size + 5],
        bytes(damaged),
        content[: 2 * size] + bytes(99),
    ):
        path.write_bytes(bad)
        cut = EncodedRows(path, 8)
        assert list(cut.places) == [(key, False) for key in keys[:2]]
        with cut.appending() as appender:
            appender.add(keys[2:], {False: rows[2:]})
        assert path.read_bytes() == content


def test_two_commands_at_once(vae: Path, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    with alone(path), pytest.raises(DataError, match="another command is encoding into it"):
        encode(vae, pixels, path)
    assert changes(encode(vae, pixels, path))[1] == 12


def _die(function: Callable[..., Any], nth: int) -> Callable[..., Any]:
    """`function`, of which the process dies at the beginning of its `nth` call."""
    calls = itertools.count()

    def mortal(*args: Any, **options: Any) -> Any:
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return mortal


@pytest.mark.parametrize(
    ("where", "name", "nth"),
    [
        (latent_keys, "write_all", 0),
        (os, "write", 2),
        (VaeCodec, "encode", 5),
        (PackedLatentWriter, "put", 0),
        (os, "replace", 0),
        (Path, "unlink", 0),
    ],
)
def test_a_killed_process(
    vae: Path, pixels: NDArray[np.uint8], whole: bytes, tmp_path: Path, where: Any, name: str,
    nth: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "set.safetensors"

    def command() -> None:
        torch.set_num_threads(1)
        with monkeypatch.context() as patch:
            patch.setattr(where, name, _die(getattr(where, name), nth))
            encode(vae, pixels, path, xflip=True)

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not path.exists() or path.read_bytes() == whole
    encode(vae, pixels, path, xflip=True)
    assert path.read_bytes() == whole
    # Temporary files of a process that this one has begun are tidied by the next one.
    assert [name for name in hidden(tmp_path) if not name.endswith(".part")] == []


def _share(vae: Path, source: Path, target: Path) -> None:
    report = write_latents(open_dataset(source), VaeCodec(str(vae)), target, batch=3, xflip=True)
    assert changes(report) == (0, 12, 0, 0)


def test_two_processes_write_the_same_bytes(
    vae: Path, pixels: NDArray[np.uint8], whole: bytes, tmp_path: Path
) -> None:
    names = ("ant", "bee")
    source = write_packed(tmp_path / "a.safetensors", pixels, labels=[0, 1] * 6, class_names=names)
    path = tmp_path / "set.safetensors"
    in_processes(2, _share, vae, source, path)
    assert path.read_bytes() == whole
    assert hidden(tmp_path) == []


def test_the_statistics_are_in_the_set(
    vae: Path, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "set.safetensors"
    encode(vae, pixels, path)
    data = open_latents(path)
    mean, std = channel_statistics(data)
    assert data.info.scale == 0.5
    assert data.info.mean == pytest.approx(mean / 0.5, rel=1e-6)
    assert data.info.std == pytest.approx(std / 0.5, rel=1e-6)
    assert data.info.weights == VaeCodec(str(vae)).weights_digest()
