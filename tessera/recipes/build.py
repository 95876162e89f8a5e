"""From the sections of a recipe to the objects that they describe; one place for each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tessera.data.augment import Augmentation
from tessera.data.codec import Codec, PixelCodec, VaeCodec
from tessera.data.online import OnlineVae
from tessera.data.views import BandShare, BandsView, FullView, PatchView, View, patch_sizes
from tessera.diffusion import objectives, preconditioning
from tessera.diffusion.bands import Band, BandedDenoiser, BandedObjective
from tessera.diffusion.blur import Blur, BlurCorruption, BlurObjective
from tessera.diffusion.denoiser import Denoiser
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.energy_objective import EnergyObjective, EnergyTerms
from tessera.diffusion.experts import sigma_range
from tessera.diffusion.linear import LinearDenoiser, LinearStatistics
from tessera.diffusion.masked import MaskedModel, MaskedObjective
from tessera.diffusion.objectives import EVERYWHERE, DenoisingObjective, Objective
from tessera.diffusion.preconditioning import Iddpm, Preconditioned, Preconditioning
from tessera.diffusion.skipping import (
    BrickSchedule,
    cut_bricks,
    parse_schedule,
    skipping_schedule,
)
from tessera.errors import RecipeError
from tessera.model import Model
from tessera.networks.adm_unet import AdmUNet
from tessera.networks.dit import DiT, EnergyDiT
from tessera.networks.lego import Lego
from tessera.networks.mar import Mar
from tessera.networks.patched_unet import PatchedUNet
from tessera.networks.song_unet import SongUNet
from tessera.recipes import schema
from tessera.recipes.external import own_network, own_objective, own_refine, own_sampler
from tessera.recipes.parts import NO_PARTS, Parts
from tessera.recipes.size import check_fits
from tessera.sampling.ablation import ablation_levels, ablation_sampler
from tessera.sampling.core import Levels, Refine, Sampler
from tessera.sampling.ddpm import ddim_sampler, ddpm_sampler
from tessera.sampling.edm import edm_sampler
from tessera.sampling.levels import edm_levels, listed_levels, process_levels
from tessera.sampling.masked import MaskedSampler
from tessera.sampling.mcmc import Refinement
from tessera.sampling.relay import relay_sampler


def build_network(recipe: schema.Recipe, parts: Parts = NO_PARTS, copies: int = 1) -> nn.Module:
    """The network with fresh weights, on the default device.

    Args:
        parts: functions that make external parts.
        copies: how often numbers as many as its weights are kept in the end.

    Raises:
        RecipeError: they do not fit into memory (never on the meta device, where nothing is kept),
            or an external network is missing or does not fit the recipe.
    """
    # A network of the caller's own is made once, and by the caller's own rules.
    external = isinstance(recipe.network, schema.ExternalNetworkConfig)
    if not external and torch.empty(0).device.type != "meta":
        check_fits(partial(_whole_network, recipe, parts), recipe.name, copies)
    return _whole_network(recipe, parts)


def _whole_network(recipe: schema.Recipe, parts: Parts) -> nn.Module:
    """The network, with what is measured of the training images among its weights."""
    network = _network(recipe, parts)
    section = recipe.preconditioning
    if isinstance(section, schema.LinearPreconditioningConfig):
        classes = recipe.data.num_classes if section.classes else 0
        network.add_module("statistics", LinearStatistics(recipe.shape, classes))
    return network


def build_model(recipe: schema.Recipe, parts: Parts = NO_PARTS, copies: int = 1) -> Model:
    """What a recipe trains, with fresh weights, on the default device.

    Args:
        parts: functions that make external parts.
        copies: see `build_network`.

    Raises:
        RecipeError: an external part was not handed over, or it does not fit into memory.
    """
    return model_around(recipe, build_network(recipe, parts, copies))


def model_around(recipe: schema.Recipe, network: nn.Module) -> Model:
    """What a recipe trains, with this network."""
    if isinstance(network, Mar):
        process = build_preconditioning(recipe.preconditioning)
        assert isinstance(process, Discrete)
        return MaskedModel(network, process, recipe.shape, recipe.data.num_classes)
    return preconditioned(recipe, network)


def _network(recipe: schema.Recipe, parts: Parts) -> nn.Module:
    section = recipe.network
    channels, resolution, _ = recipe.shape
    network: type[SongUNet | AdmUNet]
    match section:
        case schema.LegoConfig():
            options = _options(section) | {
                "bricks": [(brick.size, brick.patch, brick.depth) for brick in section.bricks]
            }
            return Lego(channels, recipe.data.num_classes, recipe.augment_dim, **options)
        case schema.PatchedUNetConfig():
            return PatchedUNet(
                resolution,
                _input_channels(recipe),
                channels,
                recipe.data.num_classes,
                recipe.augment_dim,
                coord_frequencies=recipe.coord_frequencies,
                **_options(section),
            )
        case schema.DiTConfig():
            return _transformer(DiT, recipe, section, _output_channels(recipe))
        case schema.EnergyDiTConfig():
            # Its gradient has no second half, where others put out a variance that is left out.
            return _transformer(EnergyDiT, recipe, section, channels)
        case schema.MarConfig():
            options = _options(section) | section.dimensions._asdict()
            options.pop("size")
            return Mar(resolution, channels, recipe.data.num_classes, **options)
        case schema.ExternalNetworkConfig():
            return own_network(recipe, section, parts)
        case schema.SongUNetConfig():
            network = SongUNet
        case schema.AdmUNetConfig():
            network = AdmUNet
    return network(
        resolution,
        _input_channels(recipe),
        _output_channels(recipe),
        num_classes=recipe.data.num_classes,
        augment_dim=recipe.augment_dim,
        coord_frequencies=recipe.coord_frequencies,
        **_options(section),
    )


def _input_channels(recipe: schema.Recipe) -> int:
    """Of the noisy image, of its linear estimate, and of the enlarged small one."""
    further = [recipe.low_resolution is not None, recipe.preconditioning.of_images]
    return recipe.shape[0] * (1 + sum(further))


def _output_channels(recipe: schema.Recipe) -> int:
    """Of the image, and of a variance beside it."""
    return recipe.shape[0] * (2 if recipe.preconditioning.doubles_channels else 1)


def _transformer(
    kind: type[DiT | EnergyDiT],
    recipe: schema.Recipe,
    section: schema.TransformerSection,
    out_channels: int,
) -> nn.Module:
    options = section.model_dump(exclude={"kind", "size"})
    return kind(
        recipe.shape[1],
        _input_channels(recipe),
        recipe.data.num_classes,
        recipe.augment_dim,
        out_channels=out_channels,
        **(options | {"patch": section.token} | section.dimensions._asdict()),
    )


def build_preconditioning(section: schema.PreconditioningConfig) -> Preconditioning:
    """The four functions of σ around the network."""
    match section:
        case schema.EdmPreconditioningConfig():
            return preconditioning.Edm(**_options(section))
        case schema.LinearPreconditioningConfig():
            return preconditioning.Edm(section.sigma_data)
        case schema.VpPreconditioningConfig():
            return preconditioning.Vp(**_options(section))
        case schema.VePreconditioningConfig():
            return preconditioning.Ve(**_options(section))
        case schema.IddpmPreconditioningConfig():
            return preconditioning.Iddpm(**_options(section))
        case schema.DiscretePreconditioningConfig():
            return Discrete(**_options(section))


def build_denoiser(
    recipe: schema.Recipe, parts: Parts = NO_PARTS, copies: int = 1
) -> Preconditioned:
    """The network and its preconditioning, with fresh weights; see `build_network`."""
    return preconditioned(recipe, build_network(recipe, parts, copies))


def preconditioned(recipe: schema.Recipe, network: nn.Module) -> Preconditioned:
    """The recipe's preconditioning around a network."""
    whole = _whole_preconditioned(recipe, network)
    if isinstance(recipe.view, schema.BandsViewConfig) and not recipe.view.one_denoiser:
        return BandedDenoiser(whole, _bands(recipe.view))
    return whole


def _whole_preconditioned(recipe: schema.Recipe, network: nn.Module) -> Preconditioned:
    """That of all pixels by all of the network, at any noise level."""
    scaling = build_preconditioning(recipe.preconditioning)
    if isinstance(scaling, Discrete):
        return DiscreteDenoiser(network, scaling, recipe.shape, recipe.data.num_classes)
    if isinstance(recipe.preconditioning, schema.LinearPreconditioningConfig):
        assert isinstance(scaling, preconditioning.Edm)
        shown = recipe.network.takes_image
        return LinearDenoiser(network, scaling, recipe.shape, recipe.data.num_classes, shown)
    return Preconditioned(network, scaling, recipe.shape, recipe.data.num_classes)


def _bands(view: schema.BandsViewConfig) -> list[Band]:
    """The bands of a view, from low noise to high."""
    return [
        Band(low, high, band.factor, band.crop, band.halo, band.bricks)
        for band, (low, high) in zip(view.bands, view.sigma_ranges, strict=True)
    ]


def build_objective(
    section: schema.ObjectiveConfig,
    noise_levels: tuple[float, float] = EVERYWHERE,
    steps: int = 0,
    side: int | None = None,
) -> DenoisingObjective | DiscreteObjective:
    """What training minimises.

    Args:
        noise_levels: low <= σ < high, of an expert.
        steps: number of the denoiser's noise levels, for the objective of discrete processes.
        side: of whole images, where parts of them are trained on.
    """
    match section:
        case schema.EdmObjectiveConfig():
            return objectives.EdmObjective(sigma_range=noise_levels, **_options(section))
        case schema.VpObjectiveConfig():
            return objectives.VpObjective(sigma_range=noise_levels, **_options(section))
        case schema.VeObjectiveConfig():
            return objectives.VeObjective(sigma_range=noise_levels, **_options(section))
        case schema.DiscreteObjectiveConfig():
            return DiscreteObjective(steps, sigma_range=noise_levels, **_options(section))
        case schema.BlurObjectiveConfig():
            options = _options(section)
            noise = {name: options.pop(name) for name in ("block_scale", "unit_variance")}
            options = {k: v for k, v in options.items() if k not in schema.BLUR_KEYS}
            corruption = BlurCorruption(blur=build_blur(section), side=side, **noise)
            return BlurObjective(sigma_range=noise_levels, corruption=corruption, **options)
        case schema.MarObjectiveConfig() | schema.ExternalObjectiveConfig():
            raise ValueError(f"the objective {section.kind} is made by `recipe_objective`")


def build_blur(section: schema.BlurObjectiveConfig | schema.RelaySamplerConfig) -> Blur:
    """The blur of every noise level, of an objective or of a sampler's fitted section."""
    return Blur(**{name: getattr(section, name) for name in schema.BLUR_KEYS})


def recipe_objective(recipe: schema.Recipe, parts: Parts = NO_PARTS) -> Objective:
    """What training a recipe minimises, at the noise levels of its expert if it is one."""
    section = recipe.objective
    if isinstance(section, schema.ExternalObjectiveConfig):
        return own_objective(recipe, section, parts)
    noise_levels = EVERYWHERE
    if recipe.expert is not None:
        noise_levels = sigma_range(recipe.snr_splits, recipe.expert)
    scaling = build_preconditioning(recipe.preconditioning)
    steps = len(scaling.levels) if isinstance(scaling, Iddpm | Discrete) else 0
    if isinstance(section, schema.MarObjectiveConfig):
        return MaskedObjective(steps, **_options(section))
    objective = build_objective(section, noise_levels, steps, recipe.shape[1])
    if isinstance(recipe.view, schema.BandsViewConfig):
        assert isinstance(objective, DenoisingObjective)
        return BandedObjective(objective, _bands(recipe.view), recipe.shape[1:])
    if recipe.energy is None:
        return objective
    return EnergyObjective(objective, EnergyTerms(**_options(recipe.energy)))


def build_view(recipe: schema.Recipe, parts: Parts = NO_PARTS) -> View:
    """What of the clean images a step trains on."""
    view, training, side = recipe.view, recipe.training, recipe.shape[1]
    match view:
        case schema.FullViewConfig():
            return FullView(training.batch)
        case schema.PatchViewConfig():
            objective = recipe_objective(recipe, parts)
            return PatchView(
                side,
                training.batch,
                patch_sizes(
                    side, recipe.patch_sizes, view.real_p, view.probabilities, view.multipliers
                ),
                seed=training.seed,
                progressive=view.schedule == "progressive",
                total_images=training.images,
                per_pixel=view.per_pixel,
                reduction=getattr(objective, "reduction", "sum"),
                align=getattr(objective, "alignment", 1),
            )
        case schema.AutoViewConfig():
            raise RecipeError(
                "view.kind=auto is decided by the images when training begins. `tessera plan DATA` "
                "shows the bands"
            )
        case schema.BandsViewConfig():
            objective = recipe_objective(recipe, parts)
            assert isinstance(objective, BandedObjective)
            return BandsView(
                training.batch, _band_shares(view, objective, side), seed=training.seed
            )


def _band_shares(
    view: schema.BandsViewConfig, objective: BandedObjective, side: int
) -> list[BandShare]:
    """What of the training each band gets.

    Raises:
        RecipeError: a band is to be trained, of whose noise levels the objective draws none.
    """
    parts = []
    sections = zip(view.bands, objective.bands, objective.probabilities(), strict=True)
    for index, (section, band, drawn) in enumerate(sections):
        share = drawn if section.share is None else section.share
        if share and not drawn:
            raise RecipeError(
                f"view.bands.{index} has noise levels {band.sigma_min:g} to {band.sigma_max:g}, of "
                "which the objective draws none. Change `below`, or leave the shares out"
            )
        multiplier = section.multiplier or side // (band.crop or side // band.factor)
        parts.append(BandShare(band, share, multiplier, drawn / share if share else 0.0))
    return parts


def build_augment(section: schema.AugmentConfig | None) -> Augmentation | None:
    """The augmentation of the training images; None for none."""
    if section is None:
        return None
    return Augmentation(**section.model_dump())


def build_codec(section: schema.CodecConfig, vae: str | None = None) -> Codec:
    """What turns samples into images; a VAE is loaded when it is needed, `vae` in its place."""
    match section:
        case schema.PixelCodecConfig():
            return PixelCodec()
        case schema.VaeCodecConfig():
            # One that is named in its place may be another one on purpose.
            other = {} if vae is None else {"model": vae, "weights": None}
            return VaeCodec(**(_vae_options(section) | other))


def build_training_codec(recipe: schema.Recipe) -> Codec:
    """The codec of a recipe, whose `train` takes what the recipe's data set holds."""
    section = recipe.codec
    if section.takes_images and isinstance(section, schema.VaeCodecConfig):
        return OnlineVae(
            **_vae_options(section),
            shrink=recipe.data.shrink,
            precision=section.precision,
            batch=section.micro_batch,
        )
    return build_codec(section)


def _vae_options(section: schema.VaeCodecConfig) -> dict[str, Any]:
    options = section.model_dump(exclude={"kind", "encode", "precision", "micro_batch"})
    # Where there is no set yet, as when a recipe's cost is measured.
    unknown = {"scale": 1.0, "shift": 0.0}
    return options | {k: number for k, number in unknown.items() if options[k] == "data"}


def build_refine(section: schema.RefineConfig, parts: Parts = NO_PARTS) -> Refine:
    """What improves samples after each step of a sampler.

    Raises:
        RecipeError: an external part was not handed over.
    """
    match section:
        case schema.McmcRefineConfig():
            return Refinement(**_options(section))
        case schema.ExternalRefineConfig():
            return own_refine(section, parts)


def build_sampler(section: schema.SamplerConfig, parts: Parts = NO_PARTS) -> Sampler:
    """The sampler with its options bound: its own noise levels, or those of `section.levels`.

    Args:
        section: leaves nothing open that the sampler needs; see `SamplerSection.fitted`.
        parts: functions that make external parts.

    Raises:
        RecipeError: an external part was not handed over.
    """
    if isinstance(section, schema.MarSamplerConfig):
        raise ValueError("the sampler of masked models is made by `build_masked_sampler`")
    options = section.model_dump(exclude={"kind", "levels", "refine"})
    if section.refine is not None:
        options["refine"] = build_refine(section.refine, parts)
    match section:
        case schema.ExternalSamplerConfig():
            sampler = own_sampler(section, parts, options.get("refine"))
        case schema.EdmSamplerConfig():
            sampler = edm_sampler(**options)
        case schema.AblationSamplerConfig():
            sampler = ablation_sampler(**options)
        case schema.DdpmSamplerConfig():
            sampler = ddpm_sampler(**options)
        case schema.DdimSamplerConfig():
            sampler = ddim_sampler(**options)
        case schema.RelaySamplerConfig():
            options = {k: v for k, v in options.items() if k not in schema.BLUR_KEYS}
            sampler = relay_sampler(blur=build_blur(section), **options)
    sampler = replace(sampler, refine=options.get("refine"))
    if section.levels is None:
        return sampler
    return replace(sampler, levels=build_levels(section.levels))


def build_masked_sampler(section: schema.MarSamplerConfig) -> MaskedSampler:
    """The sampler of models of masked tokens with its options bound."""
    return MaskedSampler(**_options(section))


def wrap_network(denoiser: Denoiser, section: schema.Section | None, sampler: Sampler) -> Denoiser:
    """The denoiser, doing while sampling what its network's own options say.

    Args:
        section: the network's `sampling_options` as they were chosen; None if it has none.
        sampler: whose steps they may speak of.

    Raises:
        TesseraError: the network cannot do that.
    """
    match section:
        case schema.BricksConfig():
            schedule = _brick_schedule(denoiser, section, sampler)
            return denoiser if schedule is None else cut_bricks(denoiser, schedule)
    return denoiser


def _brick_schedule(
    denoiser: Denoiser, section: schema.BricksConfig, sampler: Sampler
) -> BrickSchedule | None:
    if section.bricks is not None:
        return parse_schedule(section.bricks)
    if section.skip == 0:
        return None
    return skipping_schedule(denoiser, section.skip, sampler.levels(denoiser))


def build_levels(section: schema.LevelsConfig) -> Levels:
    """The function that places the noise levels of a sampler."""
    match section:
        case schema.EdmLevelsConfig():
            return partial(edm_levels, **_options(section))
        case schema.MethodLevelsConfig():
            return partial(ablation_levels, discretization=section.kind, **_options(section))
        case schema.ProcessLevelsConfig():
            return partial(process_levels, **_options(section))
        case schema.ListedLevelsConfig():
            return partial(listed_levels, **_options(section))


def _options(section: schema.Section) -> dict[str, Any]:
    """A section's keys as keyword arguments of what it describes."""
    return section.model_dump(exclude={"kind"})
