"""Files of statistics and features: EDM's, ADM's, RDM's, torch-fidelity's and ours."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tessera import distributed
from tessera.errors import DataError
from tessera.metrics import weights
from tessera.metrics.evaluate import check_comparable
from tessera.metrics.features import open_extractor
from tessera.metrics.formats import (
    Measured,
    is_measured,
    read_measured,
    save_features,
    save_statistics,
)
from tessera.metrics.images import open_images
from tessera.metrics.inception import channels_last_order
from tessera.metrics.statistics import Moments

RANDOM = np.random.default_rng(0)


def moments(dim: int) -> dict[str, NDArray[Any]]:
    return {"mu": RANDOM.normal(size=dim), "sigma": np.eye(dim) * 2}


def assert_moments(found: Moments | None, mu: NDArray[Any], sigma: NDArray[Any]) -> None:
    assert found is not None
    assert found.mu.dtype == found.sigma.dtype == torch.float64
    assert np.array_equal(found.mu, mu)
    assert np.array_equal(found.sigma, sigma)


def test_edm_npz(tmp_path: Path) -> None:
    arrays = moments(2048)
    np.savez(tmp_path / "cifar10.npz", **arrays)
    assert is_measured(tmp_path / "cifar10.npz")
    found = read_measured(tmp_path / "cifar10.npz")
    assert (found.extractor, found.n, found.features) == ("inception", None, None)
    assert_moments(found.moments, **arrays)


@pytest.mark.parametrize("protocol", [2, 5])
def test_edm2_pickle(tmp_path: Path, protocol: int) -> None:
    fid, fd = moments(2048), moments(1024)
    path = tmp_path / "img64.pkl"
    path.write_bytes(pickle.dumps({"num_images": 50, "fid": fid, "fd_dinov2": fd}, protocol))
    found = read_measured(path)
    assert (found.extractor, found.n) == ("inception", 50)
    assert_moments(found.moments, **fid)
    found = read_measured(path, "dinov2")
    assert found.extractor == "dinov2"
    assert_moments(found.moments, **fd)
    path.write_bytes(pickle.dumps({"fid": fid}, protocol))
    with pytest.raises(DataError, match="no statistics of dinov2"):
        read_measured(path, "dinov2")


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("this ran",))


def test_no_file_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": _Code()}))
    torch.save({"mu": _Code()}, tmp_path / "bad.pt")
    np.savez(tmp_path / "bad.npz", mu=np.array([_Code()], dtype=object))
    with pytest.raises(DataError, match="may run code"):
        read_measured(tmp_path / "bad.pkl")
    for name in ("bad.pt", "bad.npz"):
        with pytest.raises(DataError, match="not a readable"):
            read_measured(tmp_path / name)
    with pytest.raises(DataError, match="not a readable file of weights"):
        weights.read_weights(tmp_path / "bad.pt")
    assert "this ran" not in capsys.readouterr().out


def test_weights_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not finite, repeated without end, compressed, or larger than anything that is published."""
    path = tmp_path / "a.pth"
    for tensor, message in (
        (torch.tensor([1.0, torch.nan]), "not finite"),
        (torch.zeros(1).expand(10**12), "more numbers than are stored"),
    ):
        torch.save({"fc.weight": tensor}, path)
        with pytest.raises(DataError, match=message):
            weights.read_weights(path)
    torch.save(torch.zeros(1, 1).expand(10**6, 2048), tmp_path / "cache.pt")
    with pytest.raises(DataError, match="more numbers than are stored"):
        read_measured(tmp_path / "cache.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(DataError, match="compressed"):
        weights.read_weights(tmp_path / "b.pth")
    with pytest.raises(DataError, match="no such file"):
        weights.read_weights(tmp_path / "none.safetensors")
    monkeypatch.setattr(weights, "_MAX_BYTES", 100)
    with pytest.raises(DataError, match="of which at most 100 are read"):
        weights.read_weights(path)


def test_adm_npz_has_its_spatial_features_reordered(tmp_path: Path) -> None:
    arrays = {**moments(2048), "mu_s": RANDOM.normal(size=2023), "sigma_s": np.eye(2023)}
    images = RANDOM.integers(0, 255, (5, 4, 4, 3)).astype(np.uint8)
    np.savez(
        tmp_path / "virtual.npz", images, **{k: a.astype(np.float32) for k, a in arrays.items()}
    )
    found = read_measured(tmp_path / "virtual.npz")
    assert found.spatial_moments is not None
    assert found.images is not None
    maps = arrays["mu_s"].astype(np.float32).reshape(17, 17, 7)
    assert np.array_equal(found.spatial_moments.mu, maps.transpose(2, 0, 1).flatten())
    assert np.array_equal(found.images.read(np.array([3])), images[3:4].transpose(0, 3, 1, 2))


def test_rdm_activations(tmp_path: Path) -> None:
    feat, s_feat = RANDOM.normal(size=(6, 2048)), RANDOM.normal(size=(6, 2023))
    np.savez(tmp_path / "a.npz", feat=feat, s_feat=s_feat)
    found = read_measured(tmp_path / "a.npz")
    assert (found.n, found.extractor) == (6, "inception")
    assert found.features is not None
    assert found.spatial is not None
    assert np.array_equal(found.features, feat)
    assert np.array_equal(found.spatial, s_feat)
    np.savez(tmp_path / "b.npz", feat=feat, s_feat=s_feat[:5])
    with pytest.raises(DataError, match="6 rows in 'feat', but 5"):
        read_measured(tmp_path / "b.npz")


def test_torch_fidelity_caches(tmp_path: Path) -> None:
    features = torch.randn(6, 2048)
    torch.save(features, tmp_path / "cifar-inception-v3-compat-features-2048.pt")
    found = read_measured(tmp_path / "cifar-inception-v3-compat-features-2048.pt")
    assert found.features is not None
    assert torch.equal(found.features, features)
    torch.save(features.bfloat16().requires_grad_(), tmp_path / "half.pt")
    half = read_measured(tmp_path / "half.pt").features
    assert half is not None
    assert torch.equal(half, features.bfloat16().float())
    arrays = moments(2048)
    arrays["mu"] = arrays["mu"].astype(np.float32)
    torch.save(arrays, tmp_path / "stat.pt")
    assert_moments(read_measured(tmp_path / "stat.pt").moments, **arrays)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(DataError, match="neither features"):
        read_measured(tmp_path / "list.pt")


def test_our_own_files_are_read_by_the_others(tmp_path: Path) -> None:
    arrays, spatial = moments(2048), moments(2023)
    statistics = [Moments(*(torch.from_numpy(a) for a in m.values()), 9) for m in (arrays, spatial)]
    measured = Measured("photos", "inception", "01234567", 9, *statistics)
    save_statistics(tmp_path / "ref.npz", measured)
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
        assert np.array_equal(file["mu"], arrays["mu"])
        assert np.array_equal(file["mu_s"], spatial["mu"][channels_last_order(2023)])
    found = read_measured(tmp_path / "ref.npz")
    assert (found.name, found.weights, found.n) == ("photos", "01234567", 9)
    assert found.spatial_moments is not None
    assert found.spatial_moments.n == 9
    assert_moments(found.spatial_moments, **spatial)
    features = torch.randn(3, 2048)
    save_features(tmp_path / "f.npz", Measured("photos", "inception", n=3, features=features))
    again = read_measured(tmp_path / "f.npz").features
    assert again is not None
    assert torch.equal(again, features)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, "not a mean"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "not finite"),
        ({"feat": np.zeros(4)}, r"finite features \[N, D\]"),
        ({"weights": np.zeros(4)}, "neither statistics .* it holds weights"),
        ({**moments(2048), "mu_s": np.zeros(5), "sigma_s": np.eye(5)}, "not 2023"),
    ],
)
def test_arrays_that_are_nothing(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], message: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_measured(tmp_path / "x.npz")


def test_missing_and_cut_files(tmp_path: Path) -> None:
    for name in ("a.npz", "a.pkl", "a.pt"):
        with pytest.raises(DataError, match="no such file"):
            read_measured(tmp_path / name)
        (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
        with pytest.raises(DataError, match="not a readable"):
            read_measured(tmp_path / name)


def test_what_cannot_be_compared() -> None:
    def known(dim: int, extractor: str | None = None, weights: str | None = None) -> Measured:
        return Measured("set", extractor, weights, 5, features=torch.zeros(5, dim))

    check_comparable(known(8), known(8, "inception", "0"))
    for one, two, message in (
        (known(8), known(9), "8 features, the reference set has 9"),
        (known(8, "inception"), known(8, "dinov2"), "choose one"),
        (known(8, "inception", "a"), known(8, "inception", "b"), "other inception weights"),
    ):
        with pytest.raises(DataError, match=message):
            check_comparable(one, two)


def test_images_of_an_npz_are_not_read_at_once(tmp_path: Path) -> None:
    images = RANDOM.integers(0, 255, (9, 6, 5, 3)).astype(np.uint8)
    np.savez(tmp_path / "plain.npz", images, np.arange(9))
    np.savez_compressed(tmp_path / "small.npz", images, np.arange(9))
    for name, mapped in (("plain.npz", True), ("small.npz", False)):
        data = open_images(tmp_path / name)
        assert isinstance(data.images.base, np.memmap) == mapped  # type: ignore[attr-defined]
        assert np.array_equal(data.read(np.array([2, 7])), images[[2, 7]].transpose(0, 3, 1, 2))
        assert data.labels is not None
        assert data.labels.tolist() == list(range(9))


def test_weights_are_looked_for_by_one_process_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "checkpoints" / weights.INCEPTION.file
    waited = []

    @contextlib.contextmanager
    def main_first() -> Iterator[None]:
        waited.append(cached.is_file())
        yield

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(distributed, "main_first", main_first)
    cached.parent.mkdir()
    cached.write_bytes(b"")
    assert weights.find_weights(weights.INCEPTION) == cached
    assert waited == [True]


def test_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(DataError) as error:
        open_extractor("inception")
    assert str(tmp_path / "checkpoints" / weights.INCEPTION.file) in str(error.value)
    assert weights.INCEPTION.url in str(error.value)
    with pytest.raises(DataError, match="there is no such file"):
        open_extractor("inception", tmp_path / "absent.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("inception", "dinov2"):
        with pytest.raises(DataError, match="the file to give is"):
            open_extractor(name, tmp_path / "other.pth")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="trained on the real images"):
        open_extractor("classifier")
    cached = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    cached.write_bytes(b"")
    assert weights.find_weights(weights.INCEPTION) == cached
    with zipfile.ZipFile(cached, "w"), pytest.raises(DataError, match="not a readable file"):
        open_extractor("inception")
