"""Latents from end to end: encoding, the file, training on it, decoding, and the errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from data_files import random_images, write_packed
from tiny_vae import latent_recipe, save_vae
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.data.codec import VaeCodec, sample_posterior
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.data.latents import channel_statistics, open_latents
from tessera.errors import CheckpointError, DataError, RecipeError, TesseraError
from tessera.images import from_uint8, to_uint8
from tessera.pipelines.experts import assemble
from tessera.randomness import AddressedDraws
from tessera.recipes.loading import load_recipe
from tessera.recipes.schema import Recipe
from tessera.training import evaluation
from tessera.training.feed import Feed
from tessera.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/, images.safetensors and latents.safetensors (with mirrored images)."""
    folder = tmp_path_factory.mktemp("latents")
    vae = save_vae(folder / "vae")
    images = write_packed(
        folder / "images.safetensors",
        random_images(10, size=16),
        labels=[i % 2 for i in range(10)],
        class_names=("ant", "bee"),
    )
    write_latents(
        open_dataset(images),
        VaeCodec(str(vae)),
        folder / "latents.safetensors",
        batch=4,
        xflip=True,
    )
    return folder


def diffusers_vae(made: Path):
    import diffusers

    return diffusers.AutoencoderKL.from_pretrained(made / "vae", use_safetensors=True).eval()


def test_the_file_holds_the_posteriors_of_images_and_mirrored_images(made: Path) -> None:
    tensors = safetensors.numpy.load_file(made / "latents.safetensors")
    images = torch.from_numpy(open_dataset(made / "images.safetensors").read(np.arange(10)))
    vae = diffusers_vae(made)
    assert tensors["moments"].dtype == np.float16
    assert tensors["labels"].tolist() == [0, 1] * 5
    for name, x in (("moments", images), ("moments_flip", images.flip(3))):
        with torch.no_grad():
            posterior = vae.encode(from_uint8(x)).latent_dist
        expected = torch.cat([posterior.mean, posterior.logvar], 1).numpy()
        assert tensors[name].shape == (10, 8, 8, 8)
        assert np.abs(tensors[name] - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.abs(tensors["moments"][..., ::-1] - tensors["moments_flip"]).max() > 0.01


def test_a_set_of_latents(made: Path) -> None:
    path = made / "latents.safetensors"
    data, both = open_latents(path), open_latents(path, xflip=True, max_images=6, seed=1)
    assert (data.shape, len(data), data.num_classes) == ((4, 8, 8), 10, 2)
    assert data.class_names == ("ant", "bee")
    assert (data.info.scale, data.info.shift, data.info.resolution) == (0.5, 0, 16)
    tensors = safetensors.numpy.load_file(path)
    raw = both.raw_indices
    assert len(both) == 12
    assert raw[:6].tolist() == raw[6:].tolist()
    rows = both.read(np.array([7, 2, 11]))
    assert (rows[1] == tensors["moments"][raw[2]]).all()
    assert (rows[[0, 2]] == tensors["moments_flip"][raw[[7, 11]]]).all()
    assert both.labels is not None
    assert both.labels.tolist() == (raw % 2).tolist()


def test_the_posterior_is_sampled_anew_for_each_image_of_the_run() -> None:
    moments = torch.cat([torch.full((4000, 1, 2, 2), 3.0), torch.full((4000, 1, 2, 2), -1.0)], 1)
    draws = AddressedDraws(0, torch.arange(4000))
    x = sample_posterior(moments.half(), draws, scale=0.5, shift=1.0)
    assert (x.dtype, x.shape) == (torch.float32, (4000, 1, 2, 2))
    assert float(x.mean()) == pytest.approx(0.5 * (3 - 1), abs=0.01)
    assert float(x.std()) == pytest.approx(0.5 * np.exp(-0.5), rel=0.02)
    later = sample_posterior(moments[:8], AddressedDraws(0, torch.arange(8) + 8), 0.5, 1.0)
    assert torch.equal(later, x[8:16])


def test_decoding_inverts_scale_and_shift_in_chunks(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = VaeCodec(str(made / "vae"), 4, 2, scale=0.5, shift=0.25)
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = to_uint8(diffusers_vae(made).decode(z).sample).int()
    images = codec.decode((z.double() - 0.25) * 0.5)
    assert (images.dtype, images.shape) == (torch.uint8, (5, 3, 16, 16))
    assert codec.image_shape((4, 8, 8)) == (3, 16, 16)
    assert (images.int() - expected).abs().max() <= 1
    monkeypatch.setattr("tessera.data.codec._PIXELS_AT_ONCE", 2 * 16 * 16)
    assert (codec.decode((z - 0.25) * 0.5).int() - expected).abs().max() <= 1
    # Back: the posterior's mean in model space.
    encoded = codec.encode_mean(images)
    mean = codec.encode(images)[:, :4]
    assert encoded.shape == (5, 4, 8, 8)
    torch.testing.assert_close(encoded / 0.5 + 0.25, mean)


def test_from_images_to_images(made: Path, tmp_path: Path) -> None:
    recipe = latent_recipe(made / "vae", made / "latents.safetensors", data={"xflip": True})
    pixels = []
    for name in ("a", "b"):
        trainer = Trainer(recipe, tmp_path / name)
        assert {plan_side(trainer, n) for n in range(0, 400, 8)} == {4, 8}
        trainer.run()
        assert len(list((tmp_path / name / "previews").glob("*.png"))) >= 1
        pipe = tessera.load(tmp_path / name)
        pixels.append(pipe.sample("0-3", guidance=1.5))
    assert pixels[0].shape == (4, 16, 16, 3)
    assert pixels[0].dtype == np.uint8
    assert (pixels[0] == pixels[1]).all()
    assert pixels[0].std() > 0
    assert pipe.encode(pixels[0], steps="3", noise_schedule="cosine").shape == (4, 4, 8, 8)
    grid = tmp_path / "samples.npz"
    result = CliRunner().invoke(
        app, ["sample", str(tmp_path / "a"), "--seeds", "0-3", "--guidance", "1.5", "--out",
              str(grid), "--device", "cpu"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert np.abs(np.load(grid)["arr_0"].astype(int) - pixels[0]).max() <= 1


def plan_side(trainer: Trainer, images_seen: int) -> int | None:
    return trainer._feed.view.plan(images_seen).patch


def test_patches_are_cut_from_the_sample_of_the_posterior(made: Path) -> None:
    recipe = latent_recipe(made / "vae", made / "latents.safetensors")
    feed = Feed(recipe, CPU)
    sides = set()
    with feed.batches(0) as batches:
        for batch in batches:
            (micro,) = feed.micro_batches(batch)
            side = micro.x.shape[-1]
            sides.add(side)
            full = sample_posterior(batch.images, AddressedDraws(3, batch.numbers), 0.5)
            x, _ = feed.view.apply(full, AddressedDraws(3, batch.numbers), batch.plan)
            assert torch.equal(micro.x, x)
            assert (micro.cond.coords is None) == (side == 8)
    assert sides == {4, 8}


def test_another_place_of_the_vae(made: Path, tmp_path: Path) -> None:
    recipe = latent_recipe(tmp_path / "gone", made / "latents.safetensors")
    run = tmp_path / "run"
    with pytest.warns(
        UserWarning, match=r"no previews will be made: there is no VAE folder"
    ) as all_:
        Trainer(recipe, run).run()
    assert sum("no previews" in str(w.message) for w in all_) == 1
    with pytest.raises(CheckpointError, match="Name a folder that holds"):
        tessera.load(run).sample([0])
    assert tessera.load(run, vae=made / "vae").sample([0]).shape == (1, 16, 16, 3)
    experts = tmp_path / "experts"
    assemble([tessera.load(run)] * 2, [0.25]).save(experts)
    assert tessera.load(experts, vae=made / "vae").sample([0]).shape == (1, 16, 16, 3)


def test_scores_while_training_on_latents_are_of_decoded_images(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = evaluation.build_reference
    monkeypatch.setattr(
        evaluation, "build_reference", lambda data, **how: build(data, training_images=64, **how)
    )
    latents, images = made / "latents.safetensors", str(made / "images.safetensors")
    section = {"every_images": 10_000, "images": 6}

    def recipe(vae: str = "vae", **changes: str) -> Recipe:
        return latent_recipe(made / vae, latents, evaluate={**section, **changes})

    with pytest.raises(RecipeError, match=r"holds latents.*evaluate\.reference"):
        Trainer(recipe(), tmp_path / "without").run()
    with pytest.raises(RecipeError, match="there is nothing at"):
        Trainer(recipe(reference=str(made / "nowhere")), tmp_path / "nowhere").run()
    with pytest.raises(CheckpointError, match="there is no VAE folder"):
        Trainer(recipe("gone", reference=images), tmp_path / "gone").run()
    Trainer(recipe(reference=images), tmp_path / "run").run()
    score = json.loads((tmp_path / "run" / "best" / "score.json").read_text())
    assert score["evaluate/fd"] > 0
    assert tessera.load(tmp_path / "run" / "best").sample([0]).shape == (1, 16, 16, 3)


def test_vaes_that_cannot_be_used(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"codec\.channels 4, but the recipe says 16"):
        VaeCodec(str(made / "vae"), channels=16).prepare()
    with pytest.raises(CheckpointError, match=r"codec\.downsample 2, but the recipe says 8"):
        VaeCodec(str(made / "vae"), downsample=8).prepare()
    pickled = save_vae(tmp_path / "pickled", safe=False)
    with pytest.raises(CheckpointError, match="are never loaded"):
        VaeCodec(str(pickled)).prepare()
    shutil.copytree(made / "vae", tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        VaeCodec(str(tmp_path / "cut")).prepare()


def test_sets_that_do_not_fit_the_recipe(made: Path, tmp_path: Path) -> None:
    vae, latents = made / "vae", made / "latents.safetensors"
    recipe = latent_recipe(vae, latents, codec={"scale": 0.18215, "channels": 8})
    with pytest.raises(RecipeError) as error:
        Feed(recipe, CPU)
    assert "codec.scale=0.5" in str(error.value)
    assert "codec.channels=4" in str(error.value)
    with pytest.raises(RecipeError, match=r"data\.resolution=16"):
        Feed(latent_recipe(vae, latents, data={"resolution": 32}), CPU)
    with pytest.raises(RecipeError, match="tessera data latents"):
        Feed(latent_recipe(vae, made / "images.safetensors"), CPU)
    with pytest.raises(RecipeError, match=r"codec\.kind=vae"):
        Feed(load_recipe("cifar10-small", [f"data.path={latents}"]), CPU)
    with pytest.raises(DataError, match="holds latents of images"):
        open_dataset(latents)
    single = tmp_path / "single.safetensors"
    write_latents(open_dataset(made / "images.safetensors"), VaeCodec(str(vae)), single)
    with pytest.raises(DataError, match="--xflip"):
        Feed(latent_recipe(vae, single, data={"xflip": True}), CPU)


def test_the_commands(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.safetensors"
    words = ["data", "latents", str(made / "images.safetensors"), str(target), "--vae",
             str(made / "vae"), "--batch", "3", "--device", "cpu", "--precision",
             "float32", "--scale", "0.7"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "8x8, 4 channels" in result.output
    assert "0 kept, 10 encoded, 0 dropped" in result.output
    again = CliRunner().invoke(app, words)
    assert "10 kept, 0 encoded, 0 dropped" in again.output
    assert "up to date" in again.output
    other = CliRunner().invoke(app, [*words, "--vae-precision", "bf16"])
    assert isinstance(other.exception, TesseraError)
    assert "--overwrite" in str(other.exception)
    unknown = CliRunner().invoke(app, [*words, "--vae-precision", "half"])
    assert "choose one of auto, fp32" in str(unknown.exception)
    nothing = CliRunner().invoke(app, [*words[:-1], "0", "--overwrite"])
    assert "--scale 0" in str(nothing.exception)
    data = open_latents(target)
    assert (data.info.scale, data.flips) == (0.7, False)
    moments = data.read(np.arange(10)).astype(np.float64)
    assert data.read(np.arange(1)).dtype == np.float32
    mean, std = channel_statistics(data, batch=4)
    expected = 0.7 * moments[:, :4].mean((0, 2, 3))
    assert mean == pytest.approx(expected, rel=1e-6)
    spread = moments[:, :4].var((0, 2, 3)) + np.exp(moments[:, 4:]).mean((0, 2, 3))
    assert std == pytest.approx(0.7 * np.sqrt(spread), rel=1e-6)
    result = CliRunner().invoke(app, ["data", "inspect", str(target)])
    assert result.exit_code == 0, result.output
    assert "8x8, 4 channels" in result.output
    assert "bee" in result.output


def test_images_that_cannot_be_encoded(made: Path, tmp_path: Path) -> None:
    codec = VaeCodec(str(made / "vae"))
    grey = write_packed(tmp_path / "grey.safetensors", random_images(2, channels=1, size=16))
    with pytest.raises(DataError, match="--channels 3"):
        write_latents(open_dataset(grey), codec, tmp_path / "x.safetensors")
    odd = write_packed(tmp_path / "odd.safetensors", random_images(2, size=15))
    with pytest.raises(DataError, match="multiple of 2"):
        write_latents(open_dataset(odd), codec, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.resolution=252", r"multiple of codec\.downsample \(8\)"),
        ("data.resolution=96", r"latents of side 12, which must be a multiple of 8"),
        ("data.channels=1", "set data.channels=3"),
        ("augment.p=0.1", "augment works on images"),
    ],
)
def test_recipes_of_latents_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("patch-lsun256-latent", [override])


def test_the_published_recipes() -> None:
    recipe = load_recipe("patch-imagenet256-latent")
    assert (recipe.shape, recipe.patch_sizes) == ((4, 32, 32), (16, 32))
    assert recipe.objective.label_dropout == 0.1
    wide = load_recipe("patch-lsun256-latent", ["data.resolution=512"])
    assert (wide.shape, wide.patch_sizes) == ((4, 64, 64), (32, 64))
