"""MAR: time per image against iterations and head steps, the share of the head, what is saved.

A network of `cifar10-small-mar` on the CPU, of MAR-base with 256 tokens on an accelerator, with
random weights. Token evaluations are tokens that pass a transformer block, and rows that pass the
head; those of the released loop are counted from what it computes: the decoder's last block for all
places, the noise of both halves of guidance, and whole iterations in which no token is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import device, interleaved, now, record, section
from benchmarks.models import without_zeros
from tessera.conditioning import Conditioning
from tessera.diffusion.masked import MaskedModel, ToldHead
from tessera.networks.mar import Mar
from tessera.recipes.build import build_model
from tessera.recipes.loading import load_recipe
from tessera.sampling.masked import MaskedSampler, TokenMaker, rounds
from tessera.sampling.seeds import SeedNoise

ITERATIONS, HEAD_STEPS = (8, 16, 32, 64), (10, 25, 50, 100)
USUAL = (16, 25)
"""Iterations and head steps of the rows in which the other is varied."""


@dataclass(frozen=True)
class Case:
    """A model on a device, and a number of images."""

    model: MaskedModel
    batch: int
    where: torch.device

    def sample(self, num_iter: int, steps: int) -> tuple[Callable[[], object], TokenMaker]:
        """What makes the images, without guidance, and what of it runs the head."""
        network = self.model.network
        sampler = MaskedSampler(num_iter=num_iter, head_steps=str(steps))
        maker = sampler.maker(self.model)
        labels = torch.zeros(self.batch, dtype=torch.int64, device=self.where)
        blank = torch.zeros(self.batch, network.tokens, network.token_size, device=self.where)

        def made() -> object:
            noise = SeedNoise(range(self.batch), self.where)
            order = noise.normal((network.tokens,)).argsort(dim=1)
            return [*sampler(self.model, blank, order, network.tokens, labels, noise, maker)]

        return made, maker


def head_share(made: Callable[[], object], maker: TokenMaker) -> float:
    """The share of the time of a call that `maker` takes."""
    marks: list[float] = []
    hooks = [
        maker.register_forward_pre_hook(lambda *_: marks.append(-now())),
        maker.register_forward_hook(lambda *_: marks.append(now())),
    ]
    begin = now()
    made()
    whole = now() - begin
    for hook in hooks:
        hook.remove()
    return sum(marks) / whole


def token_evaluations(network: Mar, num_iter: int) -> tuple[int, int]:
    """Tokens through transformer blocks for one image: here, and in the released loop."""
    encoder, decoder = len(network.encoder_blocks), len(network.decoder_blocks)
    plan = rounds(network.tokens, num_iter)
    full = network.buffer + network.tokens
    ours = released = 0
    for before, after in plan:
        encoded = encoder * (network.buffer + network.tokens - before)
        ours += encoded + (decoder - 1) * full + before - after
        released += encoded + decoder * full
    # Iterations without a token to make: one is left until the last.
    empty = num_iter - len(plan)
    released += empty * (encoder * (full - 1) + decoder * full)
    return ours, released


def times(case: Case, repeats: int) -> str:
    """Time per image and its parts."""
    settings = [(n, USUAL[1]) for n in ITERATIONS] + [(USUAL[0], s) for s in HEAD_STEPS]
    settings = [*dict.fromkeys(settings)]
    calls = {setting: case.sample(*setting) for setting in settings}
    taken = interleaved({setting: made for setting, (made, _) in calls.items()}, repeats)
    rows = []
    for setting, seconds in taken.items():
        share = head_share(*calls[setting])
        ours, released = token_evaluations(case.model.network, setting[0])
        rows.append(
            [
                f"{setting[0]}",
                f"{setting[1]}",
                f"{1000 * seconds / case.batch:.1f}",
                f"{share:.0%}",
                f"{ours:,}",
                f"{released:,}",
                f"{case.model.network.tokens * setting[1]:,}",
            ]
        )
    columns = [
        "num_iter", "head_steps", "ms an image", "of it the head", "tokens through blocks",
        "released loop", "rows through the head",
    ]  # fmt: skip
    return section(f"Sampling, fp32, batch {case.batch}", columns, rows)


def saved(case: Case, repeats: int) -> str:
    """What is not computed again, part by part: before and after."""
    network, head, batch, where = (
        case.model.network, case.model.network.head, case.batch, case.where,
    )  # fmt: skip
    half = network.tokens // 2
    places = torch.arange(network.tokens, device=where).expand(batch, -1)
    known, few = places[:, :half], places[:, half : half + 4]
    cond = Conditioning(torch.zeros(batch, dtype=torch.int64, device=where))
    tokens = torch.randn(batch, network.tokens, network.token_size, device=where)
    encoded = network.encode(tokens, known, cond)
    z = network.decode(encoded, known, few).flatten(0, 1)
    rows = torch.randn(len(z), network.token_size, 1, 1, device=where)
    noise = torch.full((len(z),), 500.0, device=where)
    vectors = head.cond_embed(z)
    variants: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "decoder's last block: all places, then those made only": (
            lambda: network.decode(encoded, known, places),
            lambda: network.decode(encoded, known, few),
        ),
        "a head step: vectors and times of each row, then once": (
            lambda: ToldHead(head, head.cond_embed(z), steps=1000)(rows, noise, cond),
            lambda: ToldHead(head, vectors)(rows, noise, cond),
        ),
        "encoder: masked tokens padded, then dropped": (
            lambda: network.encode(tokens, places, cond),
            lambda: network.encode(tokens, known, cond),
        ),
    }
    table = []
    for name, (before, after) in variants.items():
        seconds = interleaved({"before": before, "after": after}, repeats)
        quotient = seconds["before"] / seconds["after"]
        table.append([name, *(f"{1000 * s:.2f}" for s in seconds.values()), f"{quotient:.2f}x"])
    columns = ["what", "ms before", "ms after", ""]
    return section(f"Not computed again, half of the tokens known, batch {batch}", columns, table)


@torch.no_grad()
def run(rounds: int, record_figures: bool) -> None:
    """Time all variants, print the tables, and keep them if asked to."""
    where = device()
    accelerated = where.type == "cuda"
    recipe = load_recipe("mar-base-imagenet256" if accelerated else "cifar10-small-mar")
    torch.manual_seed(0)
    with where:
        model = build_model(recipe).eval()
    assert isinstance(model, MaskedModel)
    assert isinstance(model.network, nn.Module)
    without_zeros(model.network)
    case = Case(model, 64 if accelerated else 8, where)
    sections = [f"Recipe {recipe.name}.", times(case, rounds), saved(case, rounds)]
    if record_figures:
        record("MAR: sampling", "\n\n".join(sections))
