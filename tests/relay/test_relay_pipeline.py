"""Relays from recipe to images, on tiny models: training, chaining, options, and their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import random_images, write_packed
from relay_tiny import FIRST, SECOND, pipeline, recipe, run, small
from training_case import read_metrics

import tessera
from tessera.data.dataset import ShrunkDataset, open_dataset
from tessera.diffusion.blur import Blur, BlurCorruption, block_dct, block_idct, dct_matrix
from tessera.errors import RecipeError, TesseraError
from tessera.pipelines.base import Pipeline
from tessera.pipelines.experts import assemble
from tessera.pipelines.relay import RelayPipeline, assemble_relay
from tessera.randomness import AddressedDraws
from tessera.sampling.seeds import SeedNoise
from tessera.training.evaluation import Evaluation
from tessera.training.feed import Feed
from tessera.training.trainer import Trainer

LEGO = {
    "kind": "lego", "width": 16, "heads": 2, "mlp_ratio": 2, "bricks": [
        {"size": 4, "patch": 2, "depth": 1}, {"size": 8, "patch": 2, "depth": 1},
    ],
}  # fmt: skip
PATCHED = {
    "kind": "patched_unet", "patch_size": 2, "model_channels": 32, "channel_mult": [1, 1],
    "num_blocks": 1, "attn_resolutions": [4], "heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def relay() -> RelayPipeline:
    return assemble_relay([pipeline(FIRST, name="low"), pipeline(SECOND, name="high")])


@pytest.fixture(scope="module")
def three() -> RelayPipeline:
    third = {**SECOND, "data": {"resolution": 16}}
    return assemble_relay([pipeline(FIRST), pipeline(SECOND), pipeline(third)])


# ------------------------------------------------------------------------------------- training


def test_both_stages_train_and_go_on_with_each_other(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])
    shown = {"run": {"preview": {"every_images": 16, "rows": 1, "columns": 2}}}
    for name, changes in (("a", FIRST), ("b", SECOND)):
        made = recipe(changes, shown, data={"path": str(path)}, training={"images": 32})
        Trainer(made, tmp_path / name).run()
        assert len(list((tmp_path / name / "previews").glob("*.png"))) == 2
        assert all(
            np.isfinite(row["loss"]) for row in read_metrics(tmp_path / name) if "loss" in row
        )
    out = run("relay", tmp_path / "a", tmp_path / "b", tmp_path / "r")
    assert "2 stages, 4x4 > 8x8" in out
    run("sample", tmp_path / "r", "--seeds", "0-2", "--out", tmp_path / "s", "--device", "cpu",
        "first.steps=2", "second.s_block=0", "--trajectory", tmp_path / "t.gif")  # fmt: skip
    facts = json.loads((tmp_path / "s" / "sampling.json").read_text())
    assert facts["stages"] == ["first", "second"]
    assert facts["second"]["sampler"]["s_block"] == 0
    assert len(list((tmp_path / "s").glob("*.png"))) == 3
    assert (tmp_path / "t.gif").stat().st_size > 0
    np.savez(tmp_path / "low.npz", arr_0=small())
    run("sample", tmp_path / "r", "--seeds", "0-2", "--out", tmp_path / "u.npz", "--device", "cpu",
        "--start-from", tmp_path / "low.npz")  # fmt: skip
    assert np.load(tmp_path / "u.npz")["arr_0"].shape == (3, 8, 8, 3)
    run("sample", tmp_path / "r", "--seeds", "0", "--out", tmp_path / "v.npz", "--device", "cpu",
        "stages=first")  # fmt: skip
    assert np.load(tmp_path / "v.npz")["arr_0"].shape == (1, 4, 4, 3)
    text = run("sample", tmp_path / "r", "--options")
    assert "first.steps" in text
    assert "second.s_block" in text


@pytest.mark.parametrize(
    "changes", [{"network": LEGO}, {"network": PATCHED}, {"snr_splits": [4], "expert": 1}]
)
def test_other_second_stages_train(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])
    made = recipe(SECOND, changes, data={"path": str(path)}, training={"images": 16})
    Trainer(made, tmp_path / "run").run()
    if "network" in changes:
        both = assemble_relay([pipeline(FIRST), tessera.load(tmp_path / "run", device="cpu")])
        assert both.sample("0-1").shape == (2, 8, 8, 3)


def test_scores_compare_with_images_as_small(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_packed(path, random_images(30), labels=[i % 2 for i in range(30)])
    for changes, side in ((FIRST, 4), (SECOND, 8)):
        made = recipe(changes, data={"path": str(path)}, evaluate={"features": "classifier"})
        assert Evaluation(made, None, tmp_path, [])._images(path).shape == (3, side, side)


def test_shrunk_images_are_means_of_blocks(tmp_path: Path) -> None:
    images = random_images(5)
    path = tmp_path / "d.safetensors"
    write_packed(path, images, labels=[0] * 5)
    dataset = ShrunkDataset(open_dataset(path), 4)
    found = dataset.read(np.array([3, 1]))
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(images[[3, 1]]).float(), 4)
    assert dataset.shape == (3, 2, 2)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, expected.numpy(), atol=0.5)
    with pytest.raises(RecipeError, match=r"data\.shrink=3"):
        Feed(recipe(FIRST, data={"path": str(path), "shrink": 3}), torch.device("cpu"))
    with pytest.raises(RecipeError, match="once they are shrunk 4 times"):
        Feed(recipe(FIRST, data={"path": str(path), "shrink": 4}), torch.device("cpu"))


def test_pictures_to_start_from_are_made_of_the_data(tmp_path: Path) -> None:
    images = random_images(300)
    path = tmp_path / "d.safetensors"
    write_packed(path, images, labels=[0, 1] * 150)
    feed = Feed(recipe(SECOND, data={"path": str(path)}), torch.device("cpu"))
    pictures = feed.start_pictures(280)
    assert isinstance(pictures, np.ndarray)
    assert pictures.shape == (280, 4, 4, 3)
    means = torch.nn.functional.avg_pool2d(torch.from_numpy(images[:280]).float(), 2)
    np.testing.assert_allclose(pictures.transpose(0, 3, 1, 2), means.numpy(), atol=1)
    batch = next(iter(feed.batches(0)))
    # The network of a relay sees nothing of the picture.
    assert all(micro.cond.image is None for micro in feed.micro_batches(batch))


# ------------------------------------------------------------------------------------- sampling


def test_stages_share_the_noise_of_a_seed(relay: RelayPipeline) -> None:
    whole = relay.sample("0-4")
    assert whole.shape == (5, 8, 8, 3)
    assert np.abs(relay.sample("3,1", batch=1).astype(int) - whole[[3, 1]]).max() <= 1
    assert not np.array_equal(whole[0], whole[1])
    # The hand-over, by hand: x of the first stage, not rounded, and the same source of noise.
    plan = relay.plan([2])
    first, second = relay.pipes
    *_, (labels, last) = first.states(first.plan([2]), [0])
    *_, (ours, end) = relay.states(plan, [0])
    states = [state for _, state in relay.states(plan, [0])]
    torch.testing.assert_close(states[1].x, last.x)
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(labels))
    assert [s.step for s in states] == [*range(1, 1 + states[0].steps)]
    alone = second.sample([2], [int(labels)], start_from=last.x)  # type: ignore[arg-type]
    # The same picture and class, but its seed's noise from the beginning.
    assert np.abs(alone - second.to_pixels(end.x).astype(int)).max() > 1


def test_parts_of_a_relay(relay: RelayPipeline) -> None:
    first, second = relay.pipes
    np.testing.assert_array_equal(relay.sample("0-2", stages="first"), first.sample("0-2"))
    low = small()
    given = second.sample("0-2", start_from=low)
    np.testing.assert_array_equal(relay.sample("0-2", start_from=low), given)
    np.testing.assert_array_equal(relay.sample("0-2", start_from=low, stages="second"), given)
    assert not np.array_equal(given, relay.sample("0-2", start_from=255 - low))
    np.testing.assert_array_equal(relay.sample("0", stages="both"), relay.sample("0"))
    np.testing.assert_array_equal(relay.labels("0-4"), relay.pipes[0].labels("0-4"))
    # What is sharpened still looks like the picture: blocks of pixels keep their means roughly.
    latent = torch.rand(2, 3, 4, 4) * 2 - 1
    assert relay.sample("0-1", start_from=latent).shape == (2, 8, 8, 3)


def test_three_stages(three: RelayPipeline, tmp_path: Path) -> None:
    assert three.sample("0-1", labels=1).shape == (2, 16, 16, 3)
    assert three.sample("0", start_from=small(side=8)).shape == (1, 16, 16, 3)
    assert three.sample("0", start_from=small(side=4)).shape == (1, 16, 16, 3)
    assert three.sample("0", start_from=small(side=4), stages="second").shape == (1, 8, 8, 3)
    three.save(tmp_path / "r")
    again = tessera.load(tmp_path / "r", device="cpu")
    assert (again.kind, again.images_seen) == ("relay", 300)
    np.testing.assert_array_equal(again.sample("0-1"), three.sample("0-1"))
    names = {option.name for option in again.options()}
    assert {"stages", "first.steps", "third.s_noise", "second.guidance"} <= names
    text = repr(again)
    assert "pipeline of kind relay" in text
    assert "third" in text
    assert again.checksum is not None


def test_options_go_to_their_stage(relay: RelayPipeline) -> None:
    plan = relay.plan([0], **{"first.steps": "5", "second.s_block": 0.3, "first.guidance": 2.0})
    first, second = (each.options for each in plan.plans)
    assert (first.sampler.steps, first.guidance.guidance) == (5, 2.0)  # type: ignore[union-attr]
    assert (second.sampler.s_block, second.guidance.guidance) == (0.3, 1.0)  # type: ignore[union-attr]
    assert plan.facts["first"]["guidance"] == 2.0
    # Names that one stage takes need no prefix; a stage's may come together.
    plan = relay.plan([0], sigma_start=0.5, first={"steps": 4}, precision="fp32")
    assert plan.plans[1].options.sampler.sigma_start == 0.5  # type: ignore[union-attr]
    assert plan.plans[0].options.sampler.steps == 4  # type: ignore[union-attr]
    assert all(each.facts["precision"] == "fp32" for each in plan.plans)
    # Nor do those of a stage that runs alone.
    assert relay.plan([0], stages="first", steps=7).plans[0].options.sampler.steps == 7  # type: ignore[union-attr]
    assert not np.array_equal(relay.sample("0"), relay.sample("0", **{"second.s_noise": 0.9}))
    latents = torch.zeros(1, 3, 4, 4)
    assert not np.array_equal(relay.sample("0"), relay.sample("0", latents=latents))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, r"first and second both take it.*first\.steps=.* or second\.steps="),
        ({"guidance": 2.0}, "both take it"),
        ({"third.steps": 4}, "no option `third.steps`"),
        ({"sigma_strt": 4}, "Did you mean `second.sigma_start`"),
        ({"first.s_block": 4}, "edm has no option `s_block`. It is one of `sampler=relay`$"),
        ({"second.sampler": "edm"}, "start from pictures"),
        ({"stages": "third"}, "Choose first, second, both, all"),
        ({"stages": "first", "second.steps": 4}, "second does not run here"),
        ({"stages": "second"}, "none were given"),
        ({"stages": "first", "start_from": small()}, "starts from noise"),
        ({"stages": "all", "start_from": small()}, "starts from noise"),
        ({"start_from": small(side=3)}, "these are"),
        ({"second.size": "8x16"}, "would make pictures of 4x4"),
        ({"second.block": 4}, "objective.block=2"),
        ({"second.latents": torch.zeros(1, 3, 8, 8)}, "starts from pictures"),
        ({"second.prob_length": -1}, "prob_length"),
    ],
)
def test_options_that_cannot_be(
    relay: RelayPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TesseraError, match=message):
        relay.check("0", None, **options)


def test_larger_pictures(relay: RelayPipeline) -> None:
    images = relay.sample("0", **{"first.size": "4x8", "second.size": "8x16"})
    assert images.shape == (1, 8, 16, 3)
    wide = np.zeros((1, 4, 8, 3), np.uint8)
    assert relay.sample("0", size="8x16", start_from=wide, stages="second").shape == (1, 8, 16, 3)
    with pytest.raises(TesseraError, match="multiples of 2"):
        relay.check("0", stages="second", size="9x8", layout="pad")


def test_costs(relay: RelayPipeline) -> None:
    # Nothing that is kept from counting stands in the way of a training.
    dct_matrix.cache_clear()
    first, second = (pipe.cost() for pipe in relay.pipes)
    x = torch.rand(1, 3, 8, 8)
    assert torch.isfinite(block_idct(block_dct(x, 2), 2)).all()
    assert torch.isfinite(
        BlurCorruption(blur=Blur(block=2))(
            x, torch.ones(1), AddressedDraws(0, torch.zeros(1).long())
        )
    ).all()
    levels = len(
        relay.pipes[1].plan([0], start_from=small()).sampler.levels(relay.pipes[1].denoiser)
    )
    assert second.evaluations == 2 * levels - 1
    cost = relay.cost()
    assert cost.evaluations == first.evaluations + second.evaluations
    assert cost.sample_flops == first.sample_flops + second.sample_flops
    assert cost.parameters == first.parameters + second.parameters
    assert relay.cost(stages="second").evaluations == second.evaluations


def test_experts_and_super_resolution_as_stages(tmp_path: Path) -> None:
    split = [4.0]
    experts = assemble([pipeline(SECOND, snr_splits=split, expert=index) for index in range(2)])
    made = assemble_relay([pipeline(FIRST), experts])
    made.save(tmp_path / "r")
    again = tessera.load(tmp_path / "r", device="cpu")
    np.testing.assert_array_equal(again.sample("0"), made.sample("0"))
    # A network that sees the picture starts from noise, and is a stage as well.
    seeing = assemble_relay([pipeline(FIRST), pipeline(low_resolution=4)])
    images = seeing.sample("0-2")
    assert np.abs(seeing.sample("2", batch=1)[0].astype(int) - images[2]).max() <= 1
    with pytest.raises(TesseraError, match="is expert 0"):
        assemble_relay([pipeline(FIRST), pipeline(SECOND, snr_splits=split, expert=0)])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([FIRST], "2 to 8 stages"),
        ([FIRST, {}], "starts from noise"),
        ([SECOND, FIRST], "starts from noise"),
        ([{}, SECOND], r"8x8 pixels, and second \(tiny\) starts from 4x4"),
        ([{"data": {"resolution": 4, "channels": 1}}, SECOND], "1 channel"),
        (
            [{"data": {"resolution": 4, "num_classes": 3}}, SECOND],
            "different numbers of classes: 2, 3",
        ),
    ],
)
def test_stages_that_do_not_fit(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TesseraError, match=message):
        assemble_relay([pipeline(changes) for changes in stages])


def test_stages_are_denoisers_of_the_same_classes(relay: RelayPipeline) -> None:
    parts: list[Pipeline] = [relay, pipeline(SECOND)]
    with pytest.raises(TesseraError, match="kind relay"):
        assemble_relay(parts)
    other = pipeline(SECOND)
    other.class_names = ("bee", "ant")
    with pytest.raises(TesseraError, match="different names"):
        assemble_relay([pipeline(FIRST), other])
    # A stage without classes goes on with what it gets.
    plain = assemble_relay(
        [pipeline(FIRST), pipeline(SECOND, data={"num_classes": 0}, objective={"label_dropout": 0})]
    )
    assert plain.sample("0-1", labels="bee").shape == (2, 8, 8, 3)


def test_the_command_refuses(tmp_path: Path) -> None:
    for arguments, message in (
        (("a", "b"), "two stages or more"),
        (("a", "b", str(tmp_path)), "exists already"),
    ):
        with pytest.raises(TesseraError, match=message):
            run("relay", *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"kind": "edm"}}, "sampling.kind=relay"),
        ({"objective": {"block": 3}}, "must divide"),
        ({"objective": {"block": 8}}, "must divide"),
        ({"objective": {"prob_length": 1.1}}, "prob_length"),
        ({"sampling": {"block": 4}}, "objective.block=2"),
        (
            {"view": {"kind": "patches", "sizes": [3, 8]}},
            r"blocks of 2x2.*network: 2, 4, 6, 8\. Set",
        ),
        ({"low_resolution": 2}, "different pictures"),
        ({"objective": {"kind": "edm"}}, "objective.kind=blur"),
        ({"objective": {"kind": "external"}}, "block, blur_sigma_max"),
    ],
)
def test_recipes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(SECOND, changes)


def test_the_sampler_assumes_what_was_trained() -> None:
    made = recipe(
        SECOND, objective={"blur_sigma_max": 2, "prob_length": 0.89}, sampling={"prob_length": 1.05}
    )
    fitted = made.fitted_sampling
    assert (fitted.block, fitted.blur_sigma_max, fitted.prob_length) == (2, 2, 1.05)  # type: ignore[union-attr]
    assert made.start_shape == (3, 4, 4)
    assert recipe(FIRST).start_shape is None


def test_a_network_that_sees_its_start_may_begin_with_it() -> None:
    both = pipeline(SECOND, low_resolution=4)
    low = small()
    plan = both.plan([0], start_from=low)
    start = plan.start([0], plan.noise(SeedNoise([0])))
    image = start.image
    assert image is not None
    assert image.shape == (1, 3, 4, 4)
    assert start.latents.shape == (1, 3, 8, 8)
    assert torch.equal(start.latents[:, :, ::2, ::2], image)
