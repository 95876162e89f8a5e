"""From recipes to objects: published sizes, and every choice of the schema."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_recipes import TINY, small_copy

from tessera.conditioning import Conditioning
from tessera.diffusion.masked import MaskedModel
from tessera.networks.adm_unet import AdmUNet
from tessera.networks.song_unet import SongUNet
from tessera.randomness import AddressedDraws
from tessera.recipes import build, schema
from tessera.recipes.loading import load_recipe, shipped

# Counted from the released code, but for those of the laptop and of relays, which are as today.
PARAMETERS = {
    "quickstart-digits": None,
    "cifar10-small": None,
    "cifar10-small-linear": 745_699,
    "cifar10-small-patch": None,
    "cifar10-small-pdm": 3_886_968,
    "photos-64": 22_169_955,
    "photos-128": 35_909_260,
    "photos-256-latent": 32_572_816,
    "edm-cifar10-cond-vp": 55_735_299,
    "edm-cifar10-cond-ve": 56_400_643,
    "edm-cifar10-uncond-vp": 55_733_891,
    "edm-cifar10-uncond-ve": 56_397_827,
    "edm-ffhq64-vp": 61_805_571,
    "edm-ffhq64-ve": 62_761_091,
    "edm-afhqv2-64-vp": 61_805_571,
    "edm-afhqv2-64-ve": 62_761_091,
    "edm-imagenet64-adm": 295_899_267,
    "cifar10-small-relay-first": None,
    "cifar10-small-relay-second": None,
    "relay-celebahq-first": 295_132_995,
    "relay-celebahq-second": 552_809_475,
    "relay-imagenet-first": 295_900_995,
    "relay-imagenet-second": 553_833_475,
    "pdm-ffhq1024": 162_645_344,
    "pdm-imagenet256-expert0": 202_148_704,
    "pdm-imagenet256-expert1": 202_148_704,
    "pdm-lsun256-p2": 122_916_120,
    "pdm-lsun256-p4": 121_416_544,
    "pdm-lsun256-p8": 121_011_584,
    "pdm-example256": 30_463_456,
    "patch-celeba64": 61_806_723,
    "patch-ffhq64": 61_806_723,
    "patch-afhqv2-64": 61_806_723,
    "quickstart-digits-lego": None,
    "cifar10-small-lego": None,
    "lego-s-pg-celeba64": 33_750_360,
    "lego-s-pr-celeba64": 33_750_360,
    "lego-s-u-celeba64": 61_624_356,
    "lego-s-pg-ffhq64": 33_750_360,
    "lego-s-pr-ffhq64": 33_750_360,
    "lego-s-u-ffhq64": 61_624_356,
    "lego-l-pg-imagenet64": 501_627_096,
    "lego-l-pr-imagenet64": 501_627_096,
    "lego-l-u-imagenet64": 885_440_932,
    "lego-xl-pg-imagenet64": 729_992_664,
    "lego-xl-pr-imagenet64": 729_992_664,
    "lego-xl-u-imagenet64": 1_358_888_100,
    "lego-s-u-imagenet256-latent": 61_578_800,
    "lego-l-pg-imagenet256-latent": 463_278_368,
    "lego-l-pr-imagenet256-latent": 463_278_368,
    "lego-l-u-imagenet256-latent": 884_294_192,
    "lego-xl-pg-imagenet256-latent": 729_352_224,
    "lego-xl-pr-imagenet256-latent": 729_352_224,
    "lego-xl-u-imagenet256-latent": 1_261_977_392,
    "lego-xl-pg-imagenet512-latent": 730_236_960,
    "lego-xl-pr-imagenet512-latent": 730_236_960,
    "lego-xl-u-imagenet512-latent": 1_359_367_472,
    "patch-lsun256-latent": 279_631_108,
    "patch-imagenet256-latent": 280_399_108,
    "cifar10-small-dit": None,
    "cifar10-small-energy": None,
    "dit-b-imagenet64-latent": 130_315_792,
    "dit-b-imagenet256-latent": 130_500_112,
    "dit-l-imagenet64-latent": 457_840_656,
    "dit-l-imagenet256-latent": 458_086_416,
    "dit-xl-imagenet64-latent": 674_834_704,
    "dit-xl-imagenet256-latent": 675_111_184,
    "energy-b-imagenet64-latent": 129_417_985,
    "energy-b-imagenet256-latent": 129_602_305,
    "energy-l-imagenet64-latent": 456_250_369,
    "energy-l-imagenet256-latent": 456_496_129,
    "energy-xl-imagenet64-latent": 672_824_449,
    "energy-xl-imagenet256-latent": 673_100_929,
    "cifar10-small-mar": None,
    "mar-base-imagenet256": 207_924_768,
    "mar-large-imagenet256": 478_326_304,
    "mar-huge-imagenet256": 942_403_104,
    "mar-large-3x1024-imagenet256": 426_357_792,
}


def test_every_shipped_recipe_has_its_size_here() -> None:
    assert set(PARAMETERS) == set(shipped())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build.build_model(load_recipe(name))
    # Released stacks of bricks train the tables of positions, which are constants here.
    tables = [t for n, t in model.named_buffers() if n.endswith("pos_embed")]
    count = sum(tensor.numel() for tensor in [*model.parameters(), *tables])
    if PARAMETERS[name] is not None:
        assert count == PARAMETERS[name]
    elif name.startswith("cifar10-small"):
        assert 2_500_000 < count < 6_500_000
    else:
        assert count < 3_000_000


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_small_copy_of_every_shipped_recipe_trains_and_samples(name: str) -> None:
    kind, recipe = shipped()[name](), load_recipe(name, small_copy(name))
    denoiser = build.build_model(recipe)
    source = kind.codec if kind.codec.kind == "vae" else kind.data
    assert denoiser.shape == (source.channels, 8, 8)
    x = torch.rand(2, *denoiser.shape) * 2 - 1
    labels = torch.tensor([0, 1]) if recipe.data.num_classes else None
    draws = AddressedDraws(0, torch.arange(2))
    augment = build.build_augment(recipe.augment)
    x, extra = (x, None) if augment is None else augment(x, draws)
    assert (0 if extra is None else extra.shape[1]) == recipe.augment_dim
    cond = Conditioning(labels, extra)
    loss = build.recipe_objective(recipe)(denoiser, x, cond, draws)["loss"]
    loss.sum().backward()
    assert loss.shape == (2,)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    plan = build.build_view(recipe).plan(0)
    assert (plan.first_image, plan.images) == (0, recipe.training.batch)

    from tessera.sampling.seeds import SeedNoise

    noise = SeedNoise([0, 1])
    if isinstance(denoiser, MaskedModel):
        count, size = denoiser.network.tokens, denoiser.network.token_size
        order = noise.normal((count,)).argsort(dim=1)
        steps = build.build_masked_sampler(recipe.sampling)(
            denoiser, torch.zeros(2, count, size), order, count, labels, noise
        )
    else:
        sampler = build.build_sampler(recipe.fitted_sampling)
        steps = sampler(denoiser, noise.normal(denoiser.shape), Conditioning(labels), noise)
    *_, last = steps
    assert last.x.shape == (2, *denoiser.shape)
    assert last.x.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("vp", 0.0010005, 152.167), ("ve", 0.02, 100), ("iddpm", 0.0064223371, 20291.17)],
)
def test_other_preconditionings_by_override(kind: str, low: float, high: float) -> None:
    objective = "edm" if kind == "iddpm" else kind
    recipe = load_recipe(
        "edm-cifar10-uncond-vp",
        [*TINY, f"preconditioning.kind={kind}", f"objective.kind={objective}"],
    )
    denoiser = build.build_denoiser(recipe)
    assert denoiser.sigma_min == pytest.approx(low, rel=1e-4)
    assert denoiser.sigma_max == pytest.approx(high, rel=1e-4)
    x, draws = torch.zeros(2, 3, 8, 8), AddressedDraws(0, torch.arange(2))
    loss = build.build_objective(recipe.objective)(denoiser, x, Conditioning(), draws)["loss"]
    assert loss.isfinite().all()
    assert type(build.build_objective(recipe.objective)).__name__.lower() == f"{objective}objective"


def test_options_reach_the_objects() -> None:
    recipe = load_recipe(
        "cifar10-small",
        ["network.kind=adm_unet", "network.model_channels=64", "network.num_blocks=2",
         "objective.label_dropout=0.25", "preconditioning.sigma_data=0.7", "augment.p=0.3",
         "sampling.kind=ablation", "sampling.discretization=vp"],
    )  # fmt: skip
    with torch.device("meta"):
        network = build.build_network(recipe)
    assert isinstance(network, AdmUNet)
    assert build.build_objective(recipe.objective).label_dropout == 0.25
    preconditioning = build.build_preconditioning(recipe.preconditioning)
    assert preconditioning == build.preconditioning.Edm(sigma_data=0.7)
    augment = build.build_augment(recipe.augment)
    assert augment is not None
    assert augment.p == 0.3
    sampler = build.build_sampler(recipe.sampling)
    assert isinstance(sampler.levels, functools.partial)
    assert sampler.levels.keywords["discretization"] == "vp"
    assert build.build_augment(None) is None


def test_the_schema_and_the_objects_have_the_same_defaults() -> None:
    import dataclasses
    import inspect

    from tessera.diffusion.discrete import Discrete
    from tessera.diffusion.discrete_objective import DiscreteObjective
    from tessera.networks.patched_unet import PatchedUNet
    from tessera.sampling import ablation, ddpm, edm, levels

    pairs = [
        (schema.SongUNetConfig, SongUNet),
        (schema.AdmUNetConfig, AdmUNet),
        (schema.PatchedUNetConfig, PatchedUNet),
        (schema.DdpmSamplerConfig, ddpm.sample_ddpm, levels.process_levels),
        (schema.DdimSamplerConfig, ddpm.sample_ddim, levels.process_levels),
        (schema.DiscreteObjectiveConfig, DiscreteObjective),
        (schema.DiscretePreconditioningConfig, Discrete),
        (schema.EdmSamplerConfig, edm.sample_edm, levels.edm_levels, edm.edm_sampler),
        (schema.AblationSamplerConfig, ablation.sample_ablation, ablation.ablation_levels),
        (schema.EdmLevelsConfig, levels.edm_levels),
        (schema.ProcessLevelsConfig, levels.process_levels),
    ]
    for section, *targets in pairs:
        defaults = {
            name: parameter.default
            for target in targets
            for name, parameter in inspect.signature(target).parameters.items()
        }
        for name, field in section.model_fields.items():
            if name not in ("kind", "levels"):
                assert defaults[name] == field.default, (section, name)
    for section, kind in (
        (schema.AugmentConfig, build.Augmentation),
        (schema.EdmObjectiveConfig, build.objectives.EdmObjective),
        (schema.VpPreconditioningConfig, build.preconditioning.Vp),
    ):
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        for name, field in section.model_fields.items():
            if name != "kind":
                assert fields[name] == field.default, (kind, name)
