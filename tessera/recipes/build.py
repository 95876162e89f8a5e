"""From the sections of a recipe to the objects that they describe; one place for each."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tessera.data.augment import Augmentation
from tessera.data.codec import Codec, PixelCodec, VaeCodec
from tessera.data.views import FullView, PatchView, View, patch_sizes
from tessera.diffusion import objectives, preconditioning
from tessera.diffusion.discrete import Discrete, DiscreteDenoiser
from tessera.diffusion.discrete_objective import DiscreteObjective
from tessera.diffusion.experts import sigma_range
from tessera.diffusion.objectives import EVERYWHERE, DenoisingObjective
from tessera.diffusion.preconditioning import Iddpm, Preconditioned, Preconditioning
from tessera.networks.adm_unet import AdmUNet
from tessera.networks.lego import Lego
from tessera.networks.patched_unet import PatchedUNet
from tessera.networks.song_unet import SongUNet
from tessera.recipes import schema
from tessera.recipes.size import check_fits
from tessera.sampling.ablation import sample_ablation
from tessera.sampling.core import Sampler
from tessera.sampling.ddpm import sample_ddim, sample_ddpm
from tessera.sampling.edm import sample_edm


def build_network(recipe: schema.Recipe, copies: int = 1) -> nn.Module:
    """The network with fresh weights, on the default device.

    Args:
        copies: how often numbers as many as its weights are kept in the end.

    Raises:
        RecipeError: they do not fit into memory. Never on the meta device, where nothing is kept.
    """
    if torch.empty(0).device.type != "meta":
        check_fits(partial(_network, recipe), recipe.name, copies)
    return _network(recipe)


def _network(recipe: schema.Recipe) -> nn.Module:
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
        case schema.SongUNetConfig():
            network = SongUNet
        case schema.AdmUNetConfig():
            network = AdmUNet
    # Improved DDPM's networks also predict a variance, which its preconditioning leaves out.
    learns_variance = isinstance(recipe.preconditioning, schema.IddpmPreconditioning)
    return network(
        resolution,
        _input_channels(recipe),
        2 * channels if learns_variance else channels,
        num_classes=recipe.data.num_classes,
        augment_dim=recipe.augment_dim,
        coord_frequencies=recipe.coord_frequencies,
        **_options(section),
    )


def _input_channels(recipe: schema.Recipe) -> int:
    """Of the noisy image, and of the enlarged small one."""
    return recipe.shape[0] * (1 if recipe.low_resolution is None else 2)


def build_preconditioning(section: schema.PreconditioningConfig) -> Preconditioning:
    """The four functions of σ around the network."""
    match section:
        case schema.EdmPreconditioning():
            return preconditioning.Edm(**_options(section))
        case schema.VpPreconditioning():
            return preconditioning.Vp(**_options(section))
        case schema.VePreconditioning():
            return preconditioning.Ve(**_options(section))
        case schema.IddpmPreconditioning():
            return preconditioning.Iddpm(**_options(section))
        case schema.DiscretePreconditioning():
            return Discrete(**_options(section))


def build_denoiser(recipe: schema.Recipe, copies: int = 1) -> Preconditioned:
    """The network and its preconditioning, with fresh weights; see `build_network`."""
    return preconditioned(recipe, build_network(recipe, copies))


def preconditioned(recipe: schema.Recipe, network: nn.Module) -> Preconditioned:
    """The recipe's preconditioning around a network."""
    scaling = build_preconditioning(recipe.preconditioning)
    if isinstance(scaling, Discrete):
        return DiscreteDenoiser(network, scaling, recipe.shape, recipe.data.num_classes)
    return Preconditioned(network, scaling, recipe.shape, recipe.data.num_classes)


Objective = DenoisingObjective | DiscreteObjective


def build_objective(
    section: schema.ObjectiveConfig,
    noise_levels: tuple[float, float] = EVERYWHERE,
    steps: int = 0,
) -> Objective:
    """What training minimises.

    Args:
        noise_levels: low <= σ < high, of an expert.
        steps: number of the denoiser's noise levels, for the objective of discrete processes.
    """
    match section:
        case schema.EdmObjective():
            return objectives.EdmObjective(sigma_range=noise_levels, **_options(section))
        case schema.VpObjective():
            return objectives.VpObjective(sigma_range=noise_levels, **_options(section))
        case schema.VeObjective():
            return objectives.VeObjective(sigma_range=noise_levels, **_options(section))
        case schema.DiscreteObjective():
            return DiscreteObjective(steps, sigma_range=noise_levels, **_options(section))


def recipe_objective(recipe: schema.Recipe) -> Objective:
    """What training a recipe minimises, at the noise levels of its expert if it is one."""
    noise_levels = EVERYWHERE
    if recipe.expert is not None:
        noise_levels = sigma_range(recipe.snr_splits, recipe.expert)
    scaling = build_preconditioning(recipe.preconditioning)
    steps = len(scaling.levels) if isinstance(scaling, Iddpm | Discrete) else 0
    return build_objective(recipe.objective, noise_levels, steps)


def build_view(recipe: schema.Recipe) -> View:
    """What of the clean images a step trains on."""
    view, training, side = recipe.view, recipe.training, recipe.shape[1]
    match view:
        case schema.FullView():
            return FullView(training.batch)
        case schema.PatchView():
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
                reduction=recipe_objective(recipe).reduction,
            )


def build_augment(section: schema.AugmentConfig | None) -> Augmentation | None:
    """The augmentation of the training images; None for none."""
    if section is None:
        return None
    return Augmentation(**section.model_dump())


def build_codec(section: schema.CodecConfig, vae: str | None = None) -> Codec:
    """What turns samples into images; a VAE is loaded when it is needed, `vae` in its place."""
    match section:
        case schema.PixelCodec():
            return PixelCodec()
        case schema.VaeCodec():
            return VaeCodec(**(_options(section) | ({"model": vae} if vae is not None else {})))


def build_sampler(section: schema.SamplerConfig) -> Sampler:
    """The sampler with its options bound."""
    match section:
        case schema.EdmSampler():
            return partial(sample_edm, **_options(section))
        case schema.AblationSampler():
            return partial(sample_ablation, **_options(section))
        case schema.DdpmSampler():
            return partial(sample_ddpm, **_options(section))
        case schema.DdimSampler():
            return partial(sample_ddim, **_options(section))


def _options(section: schema.Section) -> dict[str, Any]:
    """A section's keys as keyword arguments of what it describes."""
    return section.model_dump(exclude={"kind"})
