"""Small copies of the shipped recipes: what they are overridden with."""

from __future__ import annotations

from tessera.recipes.loading import shipped

TINY = [
    "data.resolution=8", "network.model_channels=16", "network.channel_mult=1,2",
    "network.num_blocks=1", "network.attn_resolutions=[]",
]  # fmt: skip
TINY_LEGO = [
    "data.resolution=8", "network.width=16", "network.heads=2",
    "network.bricks=[{size: 4, patch: 2, depth: 1}, {size: 8, patch: 2, depth: 1}]",
]  # fmt: skip
TINY_DIT = ["data.resolution=8", "network.depth=1", "network.width=16", "network.heads=2"]
TINY_MAR = [
    "data.resolution=8", "network.width=16", "network.depth=1", "network.decoder_depth=1",
    "network.heads=2", "network.buffer=2", "network.head_width=16", "network.head_depth=1",
    "sampling.num_iter=2", "sampling.head_steps=2",
]  # fmt: skip
TINY_PDM = [
    *TINY[:1], "network.model_channels=32", *TINY[2:], "network.patch_size=2",
    "network.head_channels=32",
]  # fmt: skip


def small_copy(name: str) -> list[str]:
    """Overrides that leave of a shipped recipe a tiny network for images or latents of 8x8."""
    kind = shipped()[name]()
    tiny = [*TINY, "sampling.steps=2"]
    if kind.network.kind == "adm_unet":
        tiny.append("network.model_channels=64")
    if kind.network.kind == "lego":
        tiny = [*TINY_LEGO, "sampling.steps=2"]
    if kind.network.kind == "patched_unet":
        tiny = [*TINY_PDM, "sampling.steps=2"]
    if kind.network.kind in ("dit", "energy_dit"):
        tiny = [*TINY_DIT, "sampling.steps=2"]
    if kind.network.kind == "mar":
        tiny = [*TINY_MAR]
    if kind.codec.kind == "vae":
        tiny.append(f"data.resolution={8 * kind.codec.downsample}")
    return tiny
