"""Images that are encoded in the step: the losses of a cache, and what else the step must be."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from data_files import random_images, write_packed
from processes_case import in_processes
from tiny_vae import latent_recipe, save_vae
from training_case import read_metrics

import tessera
from tessera.data import codec as codecs
from tessera.data.augment import Augmentation
from tessera.data.codec import VaeCodec, sample_posterior
from tessera.data.dataset import open_dataset
from tessera.data.encoding import write_latents
from tessera.data.loader import Batch
from tessera.errors import CheckpointError, RecipeError
from tessera.images import from_uint8
from tessera.randomness import AddressedDraws
from tessera.recipes.parts import Parts
from tessera.recipes.schema import Recipe
from tessera.training import probe
from tessera.training.feed import Feed
from tessera.training.learner import MicroBatch, fresh_model, learner_of
from tessera.training.stopwatch import Stopwatch
from tessera.training.tracking import describe_metrics
from tessera.training.trainer import Trainer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FULL: dict[str, Any] = {"kind": "full"}
SHRUNK: dict[str, Any] = {"data": {"resolution": 8, "shrink": 2}, "view": FULL}
TOKENS: dict[str, Any] = {
    "view": FULL,
    "network": {"kind": "mar", "patch": 2, "width": 16, "depth": 1, "decoder_depth": 1,
                "heads": 2, "buffer": 2, "head_width": 16, "head_depth": 1},
    "preconditioning": {"kind": "discrete", "prediction": "eps"},
    "objective": {"kind": "mar"},
    "sampling": {"kind": "mar", "num_iter": 2, "head_steps": 2},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "patches": {},
    "xflip": {"data": {"xflip": True}, "view": FULL},
    "subset": {"data": {"max_images": 7, "order": "windowed", "xflip": True}},
    "relay, first": SHRUNK,
    "relay, second": {
        "view": {"kind": "patches", "sizes": [4, 8]},
        "objective": {"kind": "blur", "block": 2},
        "sampling": {"kind": "relay", "steps": 3},
    },
    "lego": {
        "view": FULL,
        "network": {"kind": "lego", "width": 16, "heads": 2, "bricks": [
            {"size": 4, "patch": 2, "depth": 1}, {"size": 8, "patch": 2, "depth": 1}]},
    },
    "energy": {
        "view": FULL,
        "network": {"kind": "energy_dit", "depth": 1, "width": 16, "heads": 2},
        "preconditioning": {"kind": "discrete", "prediction": "eps"},
        "objective": {"kind": "discrete"},
        "sampling": {"kind": "ddpm"},
    },
    "masked tokens": TOKENS,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/, images.safetensors and latents.safetensors of float32, mirrored, too."""
    folder = tmp_path_factory.mktemp("online")
    vae = save_vae(folder / "vae")
    images = write_packed(
        folder / "images.safetensors",
        random_images(10, size=16),
        labels=[i % 2 for i in range(10)],
        class_names=("ant", "bee"),
    )
    write_latents(
        open_dataset(images), VaeCodec(str(vae)), folder / "latents.safetensors", xflip=True,
        precision="float32",
    )  # fmt: skip
    return folder


def recipe(made: Path, encode: str = "online", **changes: Any) -> Recipe:
    """A tiny recipe on the images or the latents of `made`, in float32."""
    data = made / f"{'images' if encode == 'online' else 'latents'}.safetensors"
    changes["codec"] = {"encode": encode, **changes.get("codec", {})}
    changes["training"] = {"images": 24, "precision": "fp32", **changes.get("training", {})}
    return latent_recipe(made / "vae", data, **changes)


def rounds(feed: Feed) -> Iterator[tuple[Batch, list[MicroBatch]]]:
    with feed.batches(0) as batches:
        for batch in batches:
            yield batch, list(feed.micro_batches(batch))


def losses(made: Recipe) -> list[float]:
    """The loss of each step of a run."""
    feed = Feed(made, CPU)
    learner = learner_of(made, fresh_model(made, CPU), CPU)
    return [
        float(learner.update(micro, batch.plan.images, batch.plan.first_image).terms["loss"])
        for batch, micro in rounds(feed)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_a_cache(kind: str, made: Path) -> None:
    online, cached = (
        losses(recipe(made, encode, **KINDS[kind])) for encode in ("online", "cached")
    )
    assert len(online) > 1
    np.testing.assert_allclose(online, cached, rtol=2e-5)


def test_images_are_augmented_before_they_are_encoded(made: Path) -> None:
    settings = {"p": 0.9, "brightness": 1, "rotate_int": 1}
    chosen = recipe(made, view=FULL, augment=settings)
    feed, vae = Feed(chosen, CPU), VaeCodec(str(made / "vae"))
    batch, (micro,) = next(rounds(feed))
    draws = AddressedDraws(3, batch.numbers)
    images, labels = Augmentation(**settings)(from_uint8(batch.images), draws)
    expected = sample_posterior(vae.encode(images), draws, 0.5)
    torch.testing.assert_close(micro.x, expected, rtol=1e-5, atol=1e-5)
    assert micro.cond.augment is not None
    assert torch.equal(micro.cond.augment, labels)
    assert (
        float((sample_posterior(vae.encode(batch.images), draws, 0.5) - micro.x).abs().max()) > 0.1
    )
    assert losses(chosen)[0] > 0
    with pytest.raises(RecipeError, match=r"augment.*codec\.encode=online"):
        recipe(made, "cached", view=FULL, augment=settings)


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], int]:
    """The folder of a run with everything in it, what it said, and how often it loaded a VAE."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    opened, open_vae, said = [], codecs._open, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(codecs, "_open", lambda name: opened.append(name) or open_vae(name))
        Trainer(whole_run(made), folder).run()
    return folder, said.getvalue().splitlines(), len(opened)


def whole_run(made: Path) -> Recipe:
    """Previews, a validation and two checkpoints, of an augmented run."""
    return recipe(
        made,
        data={"held_out": 0.3},
        augment={"p": 0.5},
        training={"images": 32},
        validation={"every_images": 16},
        run={"checkpoint_every_images": 16, "log_every_images": 8},
    )


def test_a_run_says_what_the_encoder_takes(trained: tuple[Path, list[str], int]) -> None:
    folder, said, loaded = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [line["encoder_share"] for line in lines if "loss" in line]
    assert len(shares) > 2
    assert all(0 < share < 1 for share in shares)
    assert any("encoder " in line and "% of the time" in line for line in said)
    assert any("validation/loss" in line for line in lines)
    assert list((folder / "previews").glob("*.png"))
    assert loaded == 1
    assert tessera.load(folder).sample([0], steps=2).shape == (1, 16, 16, 3)


def test_of_the_autoencoder_nothing_is_trained_or_kept(
    trained: tuple[Path, list[str], int],
) -> None:
    folder, _, _ = trained
    trainer = Trainer(resume=folder)
    vae = trainer._feed.codec._load()  # type: ignore[attr-defined]
    assert not any(weight.requires_grad or weight.grad is not None for weight in vae.parameters())
    assert not {*vae.modules()} & {*trainer.learner.step.modules()}  # nor is any of it compiled
    names = {*trainer.learner.tensors(), *tessera.load(folder).model.state_dict()}
    for path in [
        *folder.glob("checkpoints/*/*.safetensors"),
        *folder.glob("pipeline/*.safetensors"),
    ]:
        names |= set(safetensors.torch.load_file(path))
    assert names
    assert not [name for name in names if "decoder" in name or "quant_conv" in name]


def test_a_resumed_run_is_the_same(
    trained: tuple[Path, list[str], int], made: Path, tmp_path: Path
) -> None:
    stopped = Trainer(whole_run(made), tmp_path / "run")
    for report in stopped.steps():
        if report.images >= 8:
            stopped.save()
            break
    Trainer(resume=tmp_path / "run").run()
    folders = trained[0], tmp_path / "run"
    logs = [[line | {"encoder_share": 0} for line in read_metrics(folder)] for folder in folders]
    assert logs[0] == logs[1]
    files = [folder / "pipeline" / "model.safetensors" for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes()


def train_and_note(made: Path, out: Path) -> None:
    Trainer(recipe(made, view=FULL), out / "two").run()


def test_two_processes_train_as_one(made: Path, tmp_path: Path) -> None:
    in_processes(2, train_and_note, made, tmp_path)
    Trainer(recipe(made, view=FULL), tmp_path / "one").run()
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], rel=1e-4)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)
    assert all("encoder_share" in line for line in two)


def test_the_encoder_has_a_precision_and_a_micro_batch_of_its_own(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    from_images = codecs.from_uint8
    monkeypatch.setattr(codecs, "from_uint8", lambda x: sizes.append(len(x)) or from_images(x))
    full, few, half = (
        next(rounds(Feed(recipe(made, view=FULL, codec=section), CPU)))[1][0].x
        for section in ({}, {"micro_batch": 3}, {"precision": "bf16"})
    )
    assert sizes[1:4] == [3, 3, 2]
    torch.testing.assert_close(few, full, rtol=1e-5, atol=1e-5)
    assert half.dtype == torch.float32
    assert 1e-5 < float((half - full).abs().max()) < 0.1
    with pytest.raises(RecipeError, match=r"codec\.micro_batch are those of the encoder"):
        recipe(made, "cached", codec={"micro_batch": 3})


def test_pictures_to_start_from_are_of_encoded_images(made: Path) -> None:
    online, cached = (
        Feed(recipe(made, encode, **KINDS["relay, second"]), CPU).start_pictures(3)
        for encode in ("online", "cached")
    )
    assert isinstance(online, torch.Tensor)
    assert isinstance(cached, torch.Tensor)
    assert online.shape == (3, 4, 4, 4)
    torch.testing.assert_close(online, cached, rtol=1e-5, atol=1e-5)


def test_what_a_run_takes_includes_the_encoder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = VaeCodec.encode
    monkeypatch.setattr(
        VaeCodec, "encode", lambda self, images: calls.append(images.shape) or encode(self, images)
    )
    chosen = recipe(made, **SHRUNK)
    blank = probe.blank_images(chosen)
    assert blank.read(np.zeros(1, np.int64)).shape == (1, 3, 16, 16)
    assert blank.read(np.zeros(1, np.int64)).dtype == np.uint8
    timings = probe.measure(chosen, Feed(chosen, CPU, dataset=blank), CPU, 0.02, show=False)
    assert min(timings.steps.values()) > 0
    assert (calls[-1][1:], len(calls) > 1) == ((3, 16, 16), True)
    # Of a validation, encoding is not a third of that of the training.
    timings = probe.measure(
        chosen, Feed(chosen, CPU, dataset=blank), CPU, 0.02, show=False, validated=300
    )
    assert timings.validation > 100 * min(timings.steps.values()) / 8 * 1.001


def test_a_run_goes_on_from_another_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    chosen = recipe(made, view=FULL, codec={"model": "vae"}, run={"preview": None})
    for report in (trainer := Trainer(chosen, tmp_path / "run")).steps():
        if report.images >= 8:
            trainer.save()
            break
    assert Trainer(chosen, resume=tmp_path / "run").images_seen == 8
    monkeypatch.chdir(tmp_path)
    resumed = Trainer(resume="run")
    resumed.run()
    assert resumed.images_seen == 24


def test_data_that_do_not_fit(made: Path) -> None:
    images, latents = (str(made / f"{name}.safetensors") for name in ("images", "latents"))
    with pytest.raises(
        RecipeError, match=r"holds latents.*codec\.encode=online.*codec\.encode=cached"
    ):
        Feed(recipe(made, data={"path": latents}), CPU)
    with pytest.raises(RecipeError, match=r"holds no latents.*\n.*codec\.encode=online"):
        Feed(recipe(made, "cached", data={"path": images}), CPU)
    with pytest.raises(RecipeError, match=r"16x16 pixels, but data\.resolution is 32"):
        Feed(recipe(made, data={"resolution": 32}), CPU)
    with pytest.raises(RecipeError, match=r"data\.resolution \(16\).*shrunk 2 times.*of 32"):
        Feed(recipe(made, view=FULL, data={"shrink": 2}), CPU)
    with pytest.raises(RecipeError, match=r"codec\.encode: 'onlin' is not one of cached or online"):
        recipe(made, codec={"encode": "onlin"})
    with pytest.raises(RecipeError, match=r"codec\.encode: unknown key"):
        recipe(made, codec={"kind": "pixels", "encode": "online"})
    with pytest.raises(CheckpointError, match="there is no VAE folder"):
        Feed(recipe(made, codec={"model": str(made / "gone")}), CPU)
    own = open_dataset(made / "images.safetensors")
    with pytest.raises(RecipeError, match=r"shape is .* but the latents of the recipe are"):
        Feed(recipe(made, "cached", data={"path": None}), CPU, Parts(dataset=lambda _: own))


def test_an_own_data_set_is_one_of_images(made: Path) -> None:
    chosen = recipe(made, view=FULL, data={"path": None, "xflip": True})
    own = open_dataset(made / "images.safetensors")
    feed = Feed(chosen, CPU, Parts(dataset=lambda _: own))
    expected = next(rounds(Feed(recipe(made, view=FULL, data={"xflip": True}), CPU)))
    assert torch.equal(next(rounds(feed))[1][0].x, expected[1][0].x)


class _Event:
    """An event of a device whose clock goes on by a second with each record."""

    now, waiting = 0, False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.now += 1
        self.at = _Event.now

    def query(self) -> bool:
        return not _Event.waiting

    def synchronize(self) -> None:
        _Event.waiting = False

    def elapsed_time(self, end: _Event) -> float:
        return 1000.0 * (end.at - self.at)


def test_time_on_a_device_is_read_when_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    watch = Stopwatch(torch.device("cuda"))
    with watch.running():
        _Event.now += 2
    assert not watch._pending  # blocks that are done are counted on the way
    _Event.waiting = True
    for _ in range(2):
        with watch.running():
            pass
    assert len(watch._pending) == 2
    assert watch.lap() == 3 + 1 + 1
    assert watch.lap() == 0
    assert "encoder 25% of the time" in describe_metrics(
        {"loss_per_pixel": 1.0, "skipped": 0, "memory_gb": 1.0, "encoder_share": 0.25}
    )
