"""The formats of latents: what released code wrote and reads, and round trips of each to each."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from safetensors.numpy import load_file
from tiny_vae import latent_recipe, save_vae
from typer.testing import CliRunner

from tessera.cli import app
from tessera.data.codec import VaeCodec, sample_posterior
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.data.latent_convert import convert_latents
from tessera.data.latent_formats.base import LatentInfo, LatentPlan
from tessera.data.latent_formats.registry import FORMATS, choose_format, latent_sink
from tessera.data.latents import channel_statistics, is_latents, open_latents
from tessera.errors import DataError, RecipeError
from tessera.randomness import AddressedDraws
from tessera.training.feed import Feed
from tessera.training.trainer import Trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "energy"
COUNT, SHAPE = 7, (4, 8, 8)
LABELS = np.array([1, 0, 1, 1, 0, 0, 1])
INFO = LatentInfo("some-vae", 16, 2, 0.5, 0.25)
NAMES = {"packed": "set.safetensors", "lego": "set.zip", "npz": "npz", "ptshard": "shards"}
ALL = np.arange(2 * COUNT)


def moments(seed: int) -> torch.Tensor:
    """Numbers that float16 holds."""
    values = torch.randn(COUNT, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
    return values.half().float()


def write(path: Path, name: str, info: LatentInfo = INFO, **changes: Any) -> Path:
    """A set of `moments(0)`, and of `moments(1)` for the mirrored images."""
    form = choose_format(path, name, True)
    plan = LatentPlan(
        **{
            "name": path.stem, "count": COUNT, "shape": SHAPE, "info": info,
            "mirrored": not form.drawn, "labels": LABELS, "class_names": ("ant", "bee"),
            "precision": form.precision or "float32", "shard": 3, **changes,
        }
    )  # fmt: skip
    with latent_sink(path, form, plan, seed=5) as put:
        for first, rows, others in zip(
            (0, 4), moments(0).split(4), moments(1).split(4), strict=True
        ):
            put(first, rows, others if plan.mirrored else None)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return {name: write(folder / file, name) for name, file in NAMES.items()}


def test_the_formats_tell_themselves_apart(sets: dict[str, Path], tmp_path: Path) -> None:
    assert [form.name for form in FORMATS] == list(sets)
    for name, path in sets.items():
        assert [form.name for form in FORMATS if form.recognise(path)] == [name]
        data = open_latents(path)
        assert (data.form, data.name, data.shape, len(data)) == (name, path.stem, SHAPE, COUNT)
        assert (data.info, data.class_names, data.num_classes) == (INFO, ("ant", "bee"), 2)
        assert data.labels is not None
        assert data.labels.tolist() == LABELS.tolist()
        data.close()
    photos = write_packed(tmp_path / "photos.safetensors", random_images(2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.zip").write_bytes(b"PK\3\4")
    for other in (photos, tmp_path / "empty", tmp_path / "no.zip", tmp_path / "nothing"):
        assert not is_latents(other)


@pytest.mark.parametrize("name", ["packed", "npz", "ptshard"])
def test_moments_and_those_of_mirrored_images(sets: dict[str, Path], name: str) -> None:
    data = open_latents(sets[name], xflip=True)
    rows = data.read(ALL[::-1])
    expected = torch.cat([moments(0), moments(1)]).numpy()[::-1]
    assert (rows == expected).all()
    assert rows.dtype == (np.float16 if name == "ptshard" else np.float32)
    part = open_latents(sets[name], max_images=3, seed=2, xflip=True)
    raw = part.raw_indices
    assert part.labels is not None
    assert part.labels.tolist() == LABELS[raw].tolist()
    assert (part.read(np.array([1, 5])) == expected[::-1][[raw[1], raw[5] + COUNT]]).all()
    small = data.shrunk(2)
    assert small.shape == (4, 4, 4)
    assert (small.read(ALL) == open_latents(sets["packed"], xflip=True).shrunk(2).read(ALL)).all()


def test_a_lego_archive_holds_the_sample_itself(sets: dict[str, Path]) -> None:
    samples = sample_posterior(moments(0), AddressedDraws(5, torch.arange(COUNT)), 0.5, 0.25)
    with pytest.warns(UserWarning, match="mirrors the latents themselves"):
        data = open_latents(sets["lego"], xflip=True)
    rows = data.read(ALL)
    assert (rows == np.concatenate([samples, samples.flip(3)])).all()
    used = VaeCodec("none", 4, 2, 0.9).train(torch.from_numpy(rows), AddressedDraws(0, ALL))
    assert torch.equal(used, torch.from_numpy(rows))
    mean, std = channel_statistics(open_latents(sets["lego"]))
    assert mean == pytest.approx(samples.mean((0, 2, 3)).numpy(), abs=1e-6)
    assert std == pytest.approx(samples.std((0, 2, 3), correction=0).numpy(), abs=1e-5)
    means = samples.reshape(COUNT, 4, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(torch.from_numpy(data.shrunk(2).read(ALL[:COUNT])), means)


def test_files_are_those_that_released_code_reads(sets: dict[str, Path]) -> None:
    with zipfile.ZipFile(sets["lego"]) as archive:
        infos = archive.infolist()
        assert infos[2].filename == "00000/img00000002.npy"
        assert all(info.compress_type == zipfile.ZIP_STORED for info in infos)
        assert infos[0].file_size == 128 + 4 * 4 * 64
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
        assert [labels[info.filename] for info in infos[:COUNT]] == LABELS.tolist()
        first = np.load(io.BytesIO(archive.read(infos[0])))
    assert (first.dtype, first.shape) == (np.float32, SHAPE)
    files = sorted(sets["npz"].rglob("*.npz"))
    assert [file.parent.name for file in files] == ["ant"] * 3 + ["bee"] * 4
    shards = sorted(sets["ptshard"].glob("shard_*.pt"))
    assert [shard.name for shard in shards] == [f"shard_0000{i}.pt" for i in range(3)]
    content = [torch.load(shard, weights_only=True) for shard in shards]
    assert [len(part["labels"]) for part in content] == [3, 3, 1]
    whole = {key: torch.cat([part[key] for part in content]) for key in content[0]}
    assert torch.equal(whole["moments"], moments(0).half())
    assert torch.equal(whole["moments_flip"], moments(1).half())
    assert whole["labels"].tolist() == LABELS.tolist()


def test_the_recorded_cache_of_energy(tmp_path: Path) -> None:
    recorded = load_file(GOLDEN / "latent_cache.safetensors")
    data = open_latents(GOLDEN / "latent_cache", xflip=True)
    assert (data.form, data.info, data.precision) == ("npz", LatentInfo(), "float32")
    assert data.class_names == ("n00000001", "n00000002")
    assert data.labels is not None
    assert data.labels[:5].tolist() == recorded["in.labels"].tolist()
    expected = np.concatenate([recorded["out.moments"], recorded["out.moments_flip"]])
    assert (data.read(np.arange(10)) == expected).all()
    # Written by us, they are the same files, but for their names.
    convert_latents(GOLDEN / "latent_cache", tmp_path / "npz", "npz")
    pairs = zip(*(sorted(f.rglob("*.npz")) for f in (GOLDEN, tmp_path)), strict=True)
    assert [a.read_bytes() == b.read_bytes() for a, b in pairs] == [True] * 5
    convert_latents(GOLDEN / "latent_cache", tmp_path / "shards", "ptshard", shard=2)
    shards = sorted((tmp_path / "shards").glob("*.pt"))
    for number, shard in enumerate(shards):
        for name, tensor in torch.load(shard, weights_only=True).items():
            assert (tensor.numpy() == recorded[f"shard{number}.{name}"]).all()
            assert tensor.numpy().dtype == recorded[f"shard{number}.{name}"].dtype
    assert len(shards) == 3
    # Released code notes beside its files how far it has come, and nothing else is there.
    for kind in ("npz", "shards"):
        (tmp_path / kind / "latents.json").unlink()
        (tmp_path / kind / "last_idx.txt").write_text("2")
        again = open_latents(tmp_path / kind, xflip=True)
        assert (again.read(np.arange(10)) == expected.astype(again.precision)).all()
        assert again.labels is not None
        assert again.labels[:5].tolist() == recorded["in.labels"].tolist()


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_from_each_format_to_each(
    sets: dict[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    one, other = sets[source], tmp_path / NAMES[target]
    report = convert_latents(one, other, target, xflip=target != "lego", seed=5, shard=2, batch=3)
    assert (report.source, report.form, report.count) == (source, target, COUNT)
    before, after = open_latents(one), open_latents(other)
    assert (after.info, after.class_names, after.flips) == (INFO, ("ant", "bee"), report.flips)
    assert (after.labels == before.labels).all()
    rows, found = before.read(ALL[:COUNT]), after.read(ALL[:COUNT])
    assert any("rounded" in note for note in report.notes) == (
        target == "ptshard" and source != "ptshard"
    )
    if source == "lego" != target:
        mean = (found[:, :4].astype(np.float32) - 0.25) * 0.5
        assert np.abs(mean - rows).max() < (2e-3 if target == "ptshard" else 1e-6)
        assert np.isneginf(found[:, 4:]).all()
        assert (open_latents(other, xflip=True).read(ALL[COUNT:]) == found[..., ::-1]).all()
    elif target == "lego" != source:
        assert (found == open_latents(sets["lego"]).read(ALL[:COUNT])).all()
        assert "one sample" in report.notes[0]
    else:
        assert (found == rows).all()
        if not after.drawn:
            assert (open_latents(other, xflip=True).read(ALL) == np.concatenate(
                [moments(0), moments(1)]
            )).all()  # fmt: skip


def test_sets_without_labels_and_with_odd_classes(tmp_path: Path) -> None:
    for name, file in NAMES.items():
        plain = open_latents(write(tmp_path / file, name, labels=None))
        assert (plain.labels, plain.num_classes) == (None, 0)
    for names in (("bee", "ant", "cow"), ("a/b", "..", "x"), None):
        for name, file in NAMES.items():
            path = write(tmp_path / file, name, class_names=names)
            data = open_latents(path)
            assert data.labels is not None
            assert data.labels.tolist() == LABELS.tolist()
            assert data.class_names == names
    assert sorted(p.name for p in (tmp_path / "npz").iterdir() if p.is_dir()) == ["00000", "00001"]
    vectors = np.eye(COUNT, dtype=np.float32)
    write(tmp_path / "v.zip", "lego", labels=vectors)
    for name in ("npz", "ptshard"):
        with pytest.raises(DataError, match="not vectors as labels"):
            convert_latents(tmp_path / "v.zip", tmp_path / "v", name, xflip=True)
    assert not (tmp_path / "v").exists()


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae")


def losses(vae: Path, latents: Path, tmp_path: Path) -> list[float]:
    """Of a short run; what is drawn is addressed, so they depend on the latents alone."""
    codec = {"scale": INFO.scale, "shift": INFO.shift}
    recipe = latent_recipe(vae, latents, codec=codec, training={"images": 32})
    run = {"preview": None, "log_every_images": 16, "checkpoint_every_images": 32}
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=run)})
    folder = tmp_path / "runs" / latents.name
    Trainer(recipe, folder).run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def test_all_formats_train_to_the_same_losses(
    sets: dict[str, Path], vae: Path, tmp_path: Path
) -> None:
    found = {name: losses(vae, sets[name], tmp_path) for name in ("packed", "npz", "ptshard")}
    assert len(found["packed"]) == 2
    assert found["npz"] == found["packed"] == found["ptshard"]
    still = tmp_path / "still.safetensors"
    convert_latents(sets["lego"], still)
    drawn = losses(vae, sets["lego"], tmp_path)
    assert losses(vae, still, tmp_path) == pytest.approx(drawn, rel=1e-5)
    assert drawn != pytest.approx(found["packed"], rel=1e-3)


def test_what_a_set_does_not_say_comes_from_the_recipe(
    sets: dict[str, Path], vae: Path, tmp_path: Path
) -> None:
    shutil.copytree(sets["npz"], tmp_path / "npz")
    (tmp_path / "npz" / "latents.json").unlink()
    feed = Feed(latent_recipe(vae, tmp_path / "npz"), torch.device("cpu"))
    assert len(feed.dataset) == COUNT
    data = {"resolution": 32, "channels": 3}
    with pytest.raises(RecipeError, match=r"its latents are 8x8.*are 16x16"):
        Feed(latent_recipe(vae, tmp_path / "npz", data=data), torch.device("cpu"))
    codec = {"scale": 0.9, "shift": 0.25}
    with pytest.raises(RecipeError, match=r"codec\.scale=0\.5"):
        Feed(latent_recipe(vae, sets["lego"], codec=codec), torch.device("cpu"))
    with pytest.raises(DataError, match="give --scale"):
        convert_latents(tmp_path / "npz", tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()
    convert_latents(tmp_path / "npz", tmp_path / "x.zip", scale=0.5)
    assert open_latents(tmp_path / "x.zip").info == LatentInfo(scale=0.5, shift=0.0)
    convert_latents(tmp_path / "npz", tmp_path / "x.safetensors")
    assert open_latents(tmp_path / "x.safetensors").info == LatentInfo()
    assert CliRunner().invoke(
        app, ["data", "inspect", str(tmp_path / "npz")]
    ).output.count("not scaled") == 1  # fmt: skip


def test_encoding_into_each_format(vae: Path, tmp_path: Path) -> None:
    pixels = random_images(5, size=16)
    images = write_packed(tmp_path / "i.safetensors", pixels, labels=[0, 1, 0, 1, 0])
    dataset, codec = open_dataset(images), VaeCodec(str(vae))
    for name, file in NAMES.items():
        report = write_latents(
            dataset, codec, tmp_path / file, form=name, xflip=name != "lego", batch=2, seed=3
        )
        assert (report.count, report.shape) == (5, SHAPE)
    with pytest.raises(DataError, match="leave out --xflip"):
        write_latents(dataset, codec, tmp_path / "x.zip", xflip=True)
    packed, shards = (open_latents(tmp_path / NAMES[n], xflip=True) for n in ("packed", "ptshard"))
    rows = packed.read(np.arange(10))
    assert (shards.read(np.arange(10)) == rows).all()
    npz = open_latents(tmp_path / "npz", xflip=True).read(np.arange(10))
    assert (npz.astype(np.float16) == rows).all()
    assert rows[:5].any()
    draws = AddressedDraws(3, torch.arange(5))
    sample = sample_posterior(torch.from_numpy(npz[:5]), draws, 0.5).numpy()
    assert np.abs(open_latents(tmp_path / "set.zip").read(np.arange(5)) - sample).max() < 1e-5


def test_the_commands_and_what_they_refuse(
    sets: dict[str, Path], vae: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> Any:
        return CliRunner().invoke(app, ["data", *map(str, words)])

    target = tmp_path / "new"
    result = run("latents", sets["packed"], target, "--to", "ptshard", "--shard-size", "4")
    assert result.exit_code == 0, result.output
    assert "from packed" in result.output
    assert len(list(target.glob("shard_*.pt"))) == 2
    for name, path in sets.items():
        result = run("inspect", path)
        assert result.exit_code == 0, result.output
        assert all(word in result.output for word in (name, "some-vae", "8x8, 4 channels", "bee"))
    refused = {
        "overwrite": ("latents", sets["npz"], target, "--to", "ptshard"),
        "leave out --vae": ("latents", sets["npz"], target, "--to", "lego", "--vae", vae),
        "choose one of packed": ("latents", sets["npz"], target, "--to", "pt"),
        "should end in .safetensors": ("latents", sets["npz"], target, "--to", "packed"),
        "should end in nothing": ("latents", sets["npz"], tmp_path / "x.zip", "--to", "npz"),
        "float16; leave out": ("latents", sets["npz"], tmp_path / "x", "--to", "ptshard",
                               "--precision", "float32"),
        "mirrored latents for them": ("latents", sets["lego"], tmp_path / "x", "--to", "npz"),
        "replace its own source": ("latents", sets["npz"], sets["npz"], "--to", "npz",
                                   "--overwrite"),
        "scale is 0.5": ("latents", sets["npz"], tmp_path / "x.zip", "--to", "lego", "--scale",
                         "0.7"),
        "--vae MODEL": ("latents", sets["npz"], tmp_path / "x.zip"),
    }  # fmt: skip
    for words, command in refused.items():
        assert words in str(run(*command).exception), words
    single = write(tmp_path / "single.safetensors", "packed", mirrored=False)
    for file in ("x.safetensors", "x.zip"):
        with pytest.raises(DataError, match="leave out --xflip"):
            convert_latents(single, tmp_path / file, xflip=True)
    with pytest.raises(DataError, match="with --xflip"):
        convert_latents(single, tmp_path / "x", "npz")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "a.txt").write_text("dear diary")
    with pytest.raises(DataError, match="something else"):
        convert_latents(sets["npz"], tmp_path / "diary", "ptshard", overwrite=True)
    convert_latents(sets["npz"], target, "npz", overwrite=True)
    assert open_latents(target).form == "npz"
    assert not (tmp_path / "x").exists()
