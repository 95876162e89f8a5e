"""Training and sampling on a GPU: `pytest -m gpu` where there is one.

What can be known without one is tested without one: on PyTorch's meta device every copy from the
host and every read of a value shows.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_case import read_metrics

import tessera
from tessera.data.augment import Augmentation
from tessera.data.loader import Batch
from tessera.randomness import AddressedDraws
from tessera.recipes.build import build_model, recipe_objective
from tessera.recipes.loading import parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import Recipe
from tessera.training.feed import Feed
from tessera.training.learner import TrainStep
from tessera.training.trainer import Trainer

CUDA = torch.device("cuda")


def gpu(test: Any) -> Any:
    """A test that needs a CUDA device."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(absent(test))


AUGMENT = {
    "p": 0.5, "rotate_int": 1, "translate_int": 1, "brightness": 1, "contrast": 1, "lumaflip": 1,
    "hue": 1, "saturation": 1,
}  # fmt: skip

BASE: dict[str, Any] = {
    "name": "device",
    "data": {"resolution": 16, "num_classes": 2, "workers": 1},
    "augment": AUGMENT,
    "objective": {"kind": "edm", "label_dropout": 0.2},
    "optimizer": {"lr": 1e-3, "rampup_images": 0, "clip_norm": 10},
    "ema": [{"halflife_images": 50}, {"halflife_images": 500}],
    "training": {"images": 48, "batch": 8, "micro_batch": 4, "seed": 3, "precision": "bf16"},
    "sampling": {"kind": "edm", "steps": 4},
    "run": {
        "log_every_images": 24,
        "checkpoint_every_images": 24,
        "preview": {"every_images": 48, "rows": 1, "columns": 2},
        "tensorboard": False,
    },
}

UNET = {
    "kind": "song_unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [8], "dropout": 0.1,
}  # fmt: skip
PATCHED = {
    "kind": "patched_unet", "patch_size": 2, "model_channels": 32, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4],
}  # fmt: skip

# Every kind of network; between them every view, preconditioning and objective.
KINDS: dict[str, dict[str, Any]] = {
    "song_unet": {"network": UNET},
    "ncsnpp": {
        "network": {
            **UNET, "embedding": "fourier", "encoder": "residual", "resample_filter": [1, 3, 3, 1],
        },
        "preconditioning": {"kind": "ve"},
        "objective": {"kind": "ve"},
    },
    "adm_unet": {
        "network": {
            "kind": "adm_unet", "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1,
            "attn_resolutions": [8],
        },
        "preconditioning": {"kind": "vp"},
        "objective": {"kind": "vp"},
        "snr_splits": [1.0],
        "expert": 0,
    },
    "lego": {
        "network": {
            "kind": "lego", "width": 32, "heads": 2,
            "bricks": [{"size": 4, "depth": 1}, {"size": 16, "depth": 1}],
        },
    },
    "patched_unet": {"network": PATCHED, "view": {"kind": "patches", "sizes": [4, 8, 16]}},
    "discrete": {
        "network": {**PATCHED, "learn_variance": True, "recompute": True},
        "preconditioning": {"kind": "discrete", "timesteps": 100, "schedule": "cosine"},
        "objective": {
            "kind": "discrete", "timesteps": "loss_second_moment", "label_dropout": 0.2,
        },
        "sampling": {"kind": "ddpm", "steps": "4"},
    },
    "blur": {"network": UNET, "objective": {"kind": "blur"}, "sampling": {"kind": "relay"}},
    "energy_dit": {
        "network": {
            "kind": "energy_dit", "size": "S/4", "depth": 1, "width": 32, "heads": 2,
            "learn_step_size": True,
        },
        "energy": {"contrastive": 0.1, "refinement": 0.1},
    },
    "mar": {
        "augment": None,
        "network": {
            "kind": "mar", "patch": 4, "width": 32, "depth": 1, "heads": 2, "buffer": 2,
            "head_width": 32, "head_depth": 1,
        },
        "preconditioning": {"kind": "discrete", "prediction": "eps"},
        "objective": {"kind": "mar"},
        "sampling": {"kind": "mar", "num_iter": 4, "head_steps": "4"},
    },
}  # fmt: skip


def device_recipe(folder: Path, kind: str, **changes: Any) -> Recipe:
    """A recipe of one of the `KINDS`, on random images of 16x16 pixels in `folder`."""
    path = folder / "images.safetensors"
    if not path.exists():
        write_packed(path, random_images(20, size=16), labels=[i % 2 for i in range(20)])
    recipe = merge(BASE, {"data": {"path": str(path)}})
    for part in (KINDS[kind], changes):
        recipe = merge(recipe, part)
    return parse_recipe(recipe)


# ------------------------------------------------------------------------------ without a GPU


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait: a copy to the meta device, or a value read from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        devices = {t.device.type for t in inputs}
        arrives = devices == {"cpu"} and any(t.device.type == "meta" for t in outputs)
        assert not arrives, f"{func} copies from the host: {[tuple(t.shape) for t in inputs]}"
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
        assert "meta" not in devices or not any(w in str(func) for w in waits), func
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_copy_nothing_from_the_host(kind: str, tmp_path: Path) -> None:
    meta = torch.device("meta")
    recipe = device_recipe(tmp_path, kind)
    feed = Feed(recipe, meta)
    step = TrainStep(build_model(recipe), recipe_objective(recipe)).to(meta).train()
    # One step of each size of patches.
    starts = range(0, 20 * recipe.training.batch, recipe.training.batch)
    plans = {plan.patch: plan for plan in map(feed.view.plan, starts)}
    assert len(plans) == len(feed.view.shares())

    def train(most: int | None = None) -> None:
        for plan in plans.values():
            count = plan.images
            batch = Batch(
                torch.empty(count, 3, 16, 16, dtype=torch.uint8, device=meta),
                torch.empty(count, dtype=torch.int64, device=meta),
                torch.empty(count, dtype=torch.int64, device=meta),
                plan,
            )
            for micro in itertools.islice(feed.micro_batches(batch), most):
                step(micro.x, micro.cond, micro.draws)["loss"].sum().backward()

    train(1)  # tables are made when they are first needed
    with NoWaiting():
        train()


# --------------------------------------------------------------------------------- with a GPU


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_gpu(kind: str, precision: str, tmp_path: Path) -> None:
    never = 10**6
    recipe = device_recipe(
        tmp_path,
        kind,
        training={"images": never, "precision": precision},
        run={"log_every_images": never, "checkpoint_every_images": never, "preview": None},
    )
    trainer = Trainer(recipe, tmp_path / "run")
    steps = trainer.steps()
    sizes = {trainer._feed.view.plan(n).patch for n in range(0, 800, 8)}
    seen = set()
    while seen < sizes or trainer.step < 3:  # tables are made when they are first needed
        seen.add(trainer._feed.view.plan(trainer.images_seen).patch)
        next(steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        steps.close()
    assert trainer.learner.weights_finite()


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_samples_in_bf16(kind: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    Trainer(device_recipe(tmp_path, kind), run_dir).run()
    lines = read_metrics(run_dir)
    assert [line["images"] for line in lines] == sorted({line["images"] for line in lines})
    assert lines[-1]["skipped"] == 0
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert list((run_dir / "previews").iterdir())

    # The images of the CPU but for rounding, in both precisions and for any batch.
    expected = tessera.load(run_dir, device="cpu").sample(range(4), labels=1, batch=4).astype(int)
    pipe = tessera.load(run_dir, device="cuda")
    assert pipe.device.type == "cuda"
    for options, difference in (({}, 2), ({"batch": 3}, 2), ({"precision": "bf16"}, 6)):
        images = pipe.sample(range(4), labels=1, **options)
        assert images.shape == expected.shape
        assert images.std() > 1
        assert np.abs(images - expected).mean() < difference, options


@gpu
@pytest.mark.parametrize("kind", ["song_unet", "discrete"])
def test_resumes_on_the_gpu(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    recipe = device_recipe(tmp_path, kind, training={"precision": "fp32"}, run={"preview": None})
    whole, parted = Trainer(recipe, tmp_path / "whole"), Trainer(recipe, tmp_path / "parted")
    whole.run()
    steps = parted.steps()
    while parted.images_seen < 24:
        next(steps)
    saved = {name: t.clone() for name, t in parted.learner.tensors().items()}
    next(steps)  # a step that is lost
    steps.close()

    resumed = Trainer(resume=tmp_path / "parted")
    assert resumed.images_seen == 24
    for name, tensor in resumed.learner.tensors().items():
        assert tensor.device == saved[name].device, name
        assert torch.equal(tensor, saved[name]), name
    resumed.run()
    # Some of the GPU's kernels add in any order.
    for name, tensor in resumed.learner.tensors().items():
        torch.testing.assert_close(
            tensor, whole.learner.tensors()[name], rtol=1e-3, atol=1e-4, msg=name
        )
    for one, other in zip(
        read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parted"), strict=True
    ):
        assert one.keys() == other.keys()
        assert one["images"] == other["images"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@gpu
@pytest.mark.parametrize("kind", ["song_unet", "lego"])
def test_compiled_training_equals_eager_on_the_gpu(kind: str, tmp_path: Path) -> None:
    network = {"channel_mult": [1], "attn_resolutions": []} if kind == "song_unet" else {}
    losses = []
    for compiled in (False, True):
        recipe = device_recipe(
            tmp_path,
            kind,
            network=network,
            training={"compile": compiled, "precision": "fp32", "micro_batch": None},
            run={"log_every_images": 8, "preview": None},
        )
        run_dir = tmp_path / f"compiled-{compiled}"
        Trainer(recipe, run_dir).run()
        losses.append([line["loss"] for line in read_metrics(run_dir)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@gpu
def test_draws_and_augmentation_are_those_of_the_cpu() -> None:
    numbers = torch.arange(100, 164)
    here, there = AddressedDraws(5, numbers), AddressedDraws(5, numbers.to(CUDA))
    assert torch.equal(here.integers("a", 1000, 7), there.integers("a", 1000, 7).cpu())
    assert torch.equal(here.uniform("a", 7), there.uniform("a", 7).cpu())
    torch.testing.assert_close(here.normal("a", 7), there.normal("a", 7).cpu())

    augmentation = Augmentation(**AUGMENT)
    images = here.uniform("images", 3, 16, 16) * 2 - 1
    expected, labels = augmentation(images, here)
    actual, same_labels = augmentation(images.to(CUDA), there)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(same_labels.cpu(), labels)
