"""Models of masked tokens: training, sampling, editing, and what the command says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_case import BASE, tiny_recipe
from typer.testing import CliRunner

from tessera.cli import app
from tessera.conditioning import Conditioning
from tessera.errors import RecipeError, TesseraError
from tessera.images import open_image, save_png
from tessera.pipelines import counting
from tessera.pipelines.editing import choose_edit
from tessera.pipelines.loading import build_pipeline, estimate, load
from tessera.pipelines.mar import MarPipeline
from tessera.randomness import AddressedDraws
from tessera.recipes.build import build_model, recipe_objective
from tessera.recipes.loading import load_recipe, parse_recipe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import Recipe
from tessera.training.optimizers import build_optimizer
from tessera.training.trainer import Trainer

MAR: dict[str, Any] = {
    "network": {
        "kind": "mar", "patch": 2, "width": 16, "depth": 1, "heads": 2, "decoder_depth": 2,
        "buffer": 2, "head_width": 16, "head_depth": 1,
    },
    # So little noise that tokens of random weights stay near 1.
    "preconditioning": {"kind": "discrete", "schedule": "linear0.002", "prediction": "eps"},
    "objective": {"kind": "mar", "repeats": 2, "label_dropout": 0.2},
    "sampling": {"kind": "mar", "num_iter": 4, "head_steps": "3"},
}  # fmt: skip


def small(**changes: Any) -> Recipe:
    return parse_recipe(merge(merge(BASE, MAR), changes))


def random_pipeline(**changes: Any) -> MarPipeline:
    """8x8 pixels, 16 tokens; weights that are not those of the beginning, in which all is 0."""
    recipe = small(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(recipe)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = 0.03 if name.endswith("final_layer.linear.weight") else 0.3
                torch.nn.init.normal_(parameter, std=std)
    pipe = build_pipeline(recipe, model)
    assert isinstance(pipe, MarPipeline)
    return pipe


def test_estimates_of_pixels_are_cut_and_those_of_latents_are_not() -> None:
    wild = {"preconditioning": {"schedule": "cosine"}}  # tokens of random weights leave the range
    pipe = random_pipeline(**wild)
    for options, clip in (({}, "static"), ({"clip": "none"}, "none")):
        plan = pipe.plan([0, 1], [0, 1], **options)
        assert plan.facts["sampler"]["clip"] == plan.maker.clip == clip
        *_, (_, last) = pipe.states(plan, [0, 1])
        assert (last.x.abs().max() <= 1) == (clip == "static")
    latents = load_recipe("mar-base-imagenet256")
    assert latents.fitted_sampling.clip == "none"


def test_a_seed_is_an_image_in_any_batch() -> None:
    pipe = random_pipeline()
    options = {"guidance": 3.0, "temperature": 0.9}
    together = pipe.sample(range(5), [0, 1, 0, 1, -1], **options)
    assert len({image.tobytes() for image in together}) == 5
    assert ((together > 0) & (together < 255)).mean() > 0.3, "not all at the ends"
    for seed, label in enumerate([0, 1, 0, 1]):
        alone = pipe.sample([seed], label, **options)[0]
        assert np.abs(alone.astype(int) - together[seed]).max() <= 1
    small_batches = pipe.sample(range(5), [0, 1, 0, 1, -1], batch=2, **options)
    assert np.abs(small_batches.astype(int) - together).max() <= 1
    other = pipe.sample(range(5), [1, 0, 1, 0, -1], **options)
    assert (other[:4] != together[:4]).any()
    # Without class there is nothing to guide by.
    alone = pipe.sample([4], -1, temperature=0.9)[0]
    assert np.abs(alone.astype(int) - together[4]).max() <= 1
    assert pipe.sample([3], temperature=0.0).tobytes() != pipe.sample([3]).tobytes()


def test_only_known_tokens_pass_the_encoder() -> None:
    pipe = random_pipeline()
    lengths: list[int] = []
    block = pipe.masked.network.encoder_blocks[0]
    block.register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
    pipe.sample(range(3), 0)
    known = [0, 2, 5, 10]  # of 16 tokens in 4 rounds of a cosine
    assert lengths == [2 + count for count in known]


def test_edits_keep_tokens_exactly() -> None:
    pipe = random_pipeline()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(2)]
    edit = choose_edit(images, (3, 8, 8), box=(3, 2, 4, 3))
    made = edit.cells(2).repeat(2, 0).repeat(2, 1)
    assert made.sum() == 4 * 6  # columns 2 to 7, rows 2 to 5
    results = pipe.sample(range(4), 1, edit=edit)
    for seed, result in enumerate(results):
        assert np.array_equal(result[~made], images[seed % 2][~made])
        assert (result[made] != images[seed % 2][made]).any()
    assert (results[0] != results[2]).any()
    again = pipe.sample([2], 1, edit=edit)[0]
    assert np.abs(again.astype(int) - results[2]).max() <= 1
    outside = choose_edit([images[0][:4, :4]], (3, 8, 8), place=(4, 2))
    around = pipe.sample([0], edit=outside)[0]
    assert np.array_equal(around[2:6, 4:], images[0][:4, :4])
    keep = choose_edit(images, (3, 8, 8), keep=(4, 2, 4, 4))
    assert np.array_equal(keep.made, outside.made)


def test_edits_that_cannot_be() -> None:
    image, shape = np.zeros((8, 8, 3), np.uint8), (3, 8, 8)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("in one way", {}),
        ("in one way", {"box": (0, 0, 1, 1), "keep": (0, 0, 1, 1)}),
        ("does not lie in", {"box": (6, 0, 4, 1)}),
        ("nothing is to be made", {"keep": (0, 0, 8, 8)}),
        ("`mask`", {"mask": np.zeros((4, 4), np.uint8)}),
    ]
    for words, ways in wrong:
        with pytest.raises(TesseraError, match=words):
            choose_edit([image], shape, **ways)
    with pytest.raises(TesseraError, match="Resize it"):
        choose_edit([image[:4]], shape, box=(0, 0, 1, 1))


def test_the_edit_command(tmp_path: Path) -> None:
    pipe = random_pipeline()
    pipe.save(tmp_path / "mar")
    build_pipeline(parse_recipe(BASE)).save(tmp_path / "edm")
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[:4] = 255
    save_png(tmp_path / "a.png", picture)
    save_png(tmp_path / "mask.png", mask)
    base = [str(tmp_path / "mar"), str(tmp_path / "a.png")]
    out = tmp_path / "out"

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["edit", *words, "--device", "cpu"])

    done = run(*base, f"mask={tmp_path / 'mask.png'}", "num_iter=2", "--class", "1", "--seeds",
               "0-1", "--out", str(out))  # fmt: skip
    assert done.exit_code == 0, repr(done.exception)
    for seed in (0, 1):
        made = np.asarray(open_image(out / f"{seed:06d}.png"))
        assert np.array_equal(made[4:], picture[4:])
        assert (made[:4] != picture[:4]).any()
    for words, message in (
        ([*base, "box=1,2,3"], "X,Y,WIDTH,HEIGHT"),
        ([*base, "box=0,0,2,2", "steps=4"], "num_iter"),
        ([str(tmp_path / "edm"), str(tmp_path / "a.png"), "box=0,0,2,2"], "whole pictures"),
        ([str(tmp_path / "mar"), "no.png", "box=0,0,2,2"], "no image"),
    ):
        failed = run(*words, "--out", str(tmp_path / "none"))
        assert isinstance(failed.exception, TesseraError), failed.output
        assert message in str(failed.exception)
        assert not (tmp_path / "none").exists()


def test_options_of_others_are_refused() -> None:
    pipe = random_pipeline()
    names = {option.name for option in pipe.options()}
    assert names == {
        "num_iter", "head_steps", "temperature", "guidance", "guidance_schedule", "clip",
    }  # fmt: skip
    for options, words in (
        ({"steps": 3}, "num_iter"),
        ({"head_steps": "2000"}, "head_steps"),
        ({"sampler": "edm"}, "none for this model"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule"),
        ({"s_churn": 1}, "no option"),
    ):
        with pytest.raises(TesseraError, match=words):
            pipe.check([0], **options)
    with pytest.raises(TesseraError, match="without a class"):
        pipe.check([0], -1, guidance=2.0)
    pipe.check([0], -1)
    with pytest.raises(TesseraError, match="none for this model"):
        build_pipeline(parse_recipe(BASE)).check([0], sampler="mar")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"kind": "edm"}}, "objective.kind=mar"),
        ({"sampling": {"kind": "ddpm"}}, "sampling.kind=mar"),
        ({"preconditioning": {"kind": "edm"}}, "preconditioning"),
        ({"preconditioning": {"prediction": "x0"}}, "prediction=eps"),
        ({"view": {"kind": "patches"}}, "leave out view.kind=patches"),
        ({"augment": {"p": 0.1}}, "leave out augment"),
        ({"network": {"heads": 3}}, "multiple of heads"),
        ({"network": {"patch": 3}}, "multiple of 3"),
        ({"network": {"patch": 8}}, "make it smaller"),
        ({"network": BASE["network"]}, "do not go together"),
    ],
)
def test_recipes_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        small(**changes)


def test_the_loss_of_a_head_that_says_nothing() -> None:
    """At first the noise is estimated as 0, and the variance as the middle of its bounds."""
    recipe = small(objective={"repeats": 8})
    model, objective = build_model(recipe), recipe_objective(recipe)
    x, cond = torch.randn(4, 3, 8, 8), Conditioning(labels=torch.tensor([0, 1, 0, 1]))
    draws = AddressedDraws(0, torch.arange(4), 96)
    terms = objective(model, x, cond, draws)
    count = math.ceil(16 * 0.7)
    assert terms["mse"].shape == (4,)
    drawn = None
    for masked in range(count, 17):
        noise = draws.normal("noise", 8, masked, 12, 1, 1)
        if torch.allclose(noise.square().flatten(1).mean(dim=1), terms["mse"], rtol=1e-3):
            drawn = masked
    assert drawn is not None, "the mean square of the noise itself"
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    again = objective(model, x[:1], Conditioning(labels=cond.labels[:1]),  # type: ignore[index]
                      AddressedDraws(0, torch.arange(1), 96))  # fmt: skip
    torch.testing.assert_close(again["loss"], terms["loss"][:1])


@pytest.mark.slow
def test_it_learns_what_can_be_known() -> None:
    """Images of one colour: all tokens are known, and so is the noise."""
    recipe = small(
        network={"dropout": 0, "attn_dropout": 0, "head_width": 48},
        objective={"label_dropout": 0},
        preconditioning={"schedule": "cosine"},
    )
    torch.manual_seed(0)
    model, objective = build_model(recipe).train(), recipe_objective(recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    labels = torch.arange(16) % 2
    x = torch.full((16, 3, 8, 8), 0.5)
    losses: list[float] = []
    for step in range(180):
        draws = AddressedDraws(0, torch.arange(16) + 16 * step, 16 * step)
        terms = objective(model, x, Conditioning(labels=labels), draws)
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
        losses.append(float(terms["mse"].detach().mean()))
    assert np.mean(losses[:3]) == pytest.approx(1, abs=0.2)
    assert np.mean(losses[-20:]) < 0.3
    pipe = build_pipeline(recipe, model)
    images = pipe.sample(range(8), head_steps="25")
    assert images.mean() == pytest.approx(0.75 * 255, abs=35)


def test_weight_decay_is_the_released_one() -> None:
    recipe = small(optimizer={"kind": "adamw", "weight_decay": 0.02})
    network = build_model(recipe).network
    groups = build_optimizer(network, recipe.optimizer).param_groups
    decays = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    expected = {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1 and not name.startswith("head.")
    }
    assert {n for n, p in network.named_parameters() if id(p) in decays} == expected
    assert {"class_emb.weight", "fake_latent", "mask_token"} <= expected


def test_runs_resume_bit_for_bit_and_are_loaded(tmp_path: Path) -> None:
    changes = {**MAR, "training": {"images": 32}, "run": {"checkpoint_every_images": 16}}
    recipe = tiny_recipe(tmp_path, **changes)
    whole = Trainer(recipe, tmp_path / "whole")
    whole.run()
    first = Trainer(recipe, tmp_path / "parts")
    for report in first.steps():
        if report.images >= 16:
            break
    first.save()
    second = Trainer(resume=tmp_path / "parts")
    second.run()
    expected = whole.learner.tensors()
    for name, tensor in second.learner.tensors().items():
        assert torch.equal(tensor, expected[name]), name
    one, other = (load(tmp_path / name, device="cpu") for name in ("whole", "parts"))
    assert isinstance(one, MarPipeline)
    assert one.kind == "mar"
    assert np.array_equal(one.sample([0, 1]), other.sample([0, 1]))


@pytest.mark.slow
def test_costs_are_those_of_the_loop() -> None:
    pipe = random_pipeline(sampling={"head_steps": "2"})

    def calls(**options: Any) -> counting.Calls:
        bare = pipe.without_weights()
        plan = bare.plan([0], None, **options)
        return counting.sampling(plan.networks(), lambda: [*bare.states(plan, [0])], plan.helpers())

    plain, guided = calls(), calls(guidance=2.0)
    assert (plain.evaluations, guided.evaluations) == (4, 8)
    assert guided.flops == pytest.approx(2 * plain.flops, rel=0.05)
    # Each step costs as much: encoder, decoder and what a vector is told once do not grow.
    more, again = calls(head_steps="4"), calls(head_steps="6")
    assert again.flops - more.flops == more.flops - plain.flops > 0
    cost = estimate(pipe.recipe)
    assert (cost.evaluations, cost.sample_flops) == (4, plain.flops)
    assert cost.forward_flops == plain.largest
    assert cost.train_flops > 0


@pytest.mark.parametrize(
    ("name", "millions", "head"),
    [("base", 207.92, 35.75), ("large", 478.33, 72.23), ("huge", 942.40, 151.21),
     ("large-3x1024", 426.36, None)],
)  # fmt: skip
def test_sizes_are_the_published_ones(name: str, millions: float, head: float | None) -> None:
    with torch.device("meta"):
        network = build_model(load_recipe(f"mar-{name}-imagenet256")).network
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)
    if head is not None:
        own = sum(p.numel() for n, p in network.named_parameters() if n.startswith("head."))
        assert own / 1e6 == pytest.approx(head, abs=0.01)
