"""Masked autoregressive generation: tokens in random order, several at a time (Li et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tessera.conditioning import NO_CLASS, Conditioning
from tessera.diffusion.discrete import spaced_steps
from tessera.diffusion.masked import MaskedModel, ToldHead
from tessera.errors import TesseraError
from tessera.sampling.core import NoiseSource, SamplerState
from tessera.sampling.ddpm import Clip, sample_ddpm

GuidanceSchedule = Literal["linear", "constant"]


class Round(NamedTuple):
    """One iteration: `before` tokens of an image were unknown, and `after` of them stay so."""

    before: int
    after: int


def rounds(unknown: int, num_iter: int) -> list[Round]:
    """How many tokens are unknown before and after each iteration: a cosine, but one at least.

    There are no more iterations than tokens.

    Args:
        unknown: tokens to be made.
        num_iter: iterations.

    Example:
        >>> [before - after for before, after in rounds(16, 3)]
        [3, 5, 8]
    """
    left, made = unknown, []
    for k in range(num_iter):
        planned = math.floor(unknown * math.cos(math.pi / 2 * (k + 1) / num_iter))
        after = max(1, min(left - 1, planned)) if k + 1 < num_iter else 0
        if after < left:
            made.append(Round(left, after))
        left = after
    return made


@dataclass(frozen=True)
class MaskedSampler:
    """Tokens from the end of each image's order to its beginning.

    Args:
        num_iter: iterations, each of which evaluates encoder and decoder once.
        head_steps: steps of the tokens' diffusion, a spacing (see `spaced_steps`).
        temperature: factor of the noise that its steps add.
        guidance: weight; 1 is none.
        guidance_schedule: "constant", or "linear": from 1 on, as the image fills.
        clip: of the estimates of tokens, see `Clip`: "static" for pixels, whose range is known, as
            a head that is not trained for long leaves it; "none", as released, for latents.

    Example:
        >>> MaskedSampler(guidance=3.0).scale(64, 256)
        2.5
    """

    num_iter: int = 64
    head_steps: str = "100"
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_schedule: GuidanceSchedule = "linear"
    clip: Clip = "none"

    def scale(self, left: int, tokens: int) -> float:
        """The weight of guidance in an iteration that leaves so many of the tokens unknown."""
        if self.guidance_schedule == "constant":
            return self.guidance
        # The last iteration counts as if it left one.
        return 1 + (self.guidance - 1) * (tokens - max(left, 1)) / tokens

    def levels(self, model: MaskedModel) -> list[float]:
        """Noise levels of the tokens' diffusion, falling.

        Raises:
            TesseraError: the process does not have `head_steps`.
        """
        levels = model.process.levels
        try:
            kept: list[float] = levels[spaced_steps(len(levels), self.head_steps)].flip(0).tolist()
        except TesseraError as error:
            raise TesseraError(f"`head_steps`: {error}") from error
        return kept

    def maker(self, model: MaskedModel) -> TokenMaker:
        """What makes tokens of vectors.

        Raises:
            TesseraError: see `levels`.
        """
        return TokenMaker(model, self.levels(model), self.temperature, self.clip)

    @torch.no_grad()
    def __call__(
        self,
        model: MaskedModel,
        tokens: Tensor,
        order: Tensor,
        unknown: int,
        labels: Tensor | None,
        noise: NoiseSource,
        maker: TokenMaker | None = None,
    ) -> Iterator[SamplerState]:
        """Make the unknown tokens; the last state's x is the image.

        Args:
            tokens: [B, L, d]; the known ones are kept as they are.
            order: int64 [B, L], permutations of the places; the first `unknown` are to be made.
            unknown: number of them.
            labels: [B] classes, -1 for none; None for a model without.
            noise: one draw an iteration.
            maker: of tokens; None: one of its own.
        """
        network, maker = model.network, maker or self.maker(model)
        guided = self.guidance != 1 and labels is not None
        plan = rounds(unknown, self.num_iter)
        for step, (before, after) in enumerate(plan, 1):
            known = order[:, before:].sort(dim=1).values
            wanted = order[:, after:before].sort(dim=1).values
            draws = noise.normal((len(maker.levels), before - after, tokens.shape[2]))
            # A tensor, of which the counting of costs sees the shape only: one kind of call.
            scale = torch.tensor(self.scale(after, network.tokens)) if guided else None
            inputs, cond = (tokens, known, wanted), Conditioning(labels)
            if guided:
                assert labels is not None
                inputs = tuple(torch.cat([t, t]) for t in inputs)  # type: ignore[assignment]
                cond = Conditioning(torch.cat([labels, torch.full_like(labels, NO_CLASS)]))
            made = maker(network(*inputs, cond), draws, scale)
            places = wanted[:, :, None].expand(-1, -1, tokens.shape[2])
            tokens = tokens.scatter(1, places, made.to(tokens.dtype))
            x = network.join(tokens)
            yield SamplerState(step, len(plan), 0.0, x, x)


class TokenMaker(nn.Module):
    """Tokens from vectors, by the diffusion of the head.

    Args:
        model: whose head it is.
        levels: noise levels of the diffusion, falling.
        temperature: factor of the noise that its steps add.
        clip: of its estimates.
    """

    def __init__(
        self,
        model: MaskedModel,
        levels: Sequence[float],
        temperature: float = 1.0,
        clip: Clip = "none",
    ) -> None:
        super().__init__()
        self.model, self.levels = model, levels
        self.temperature, self.clip = temperature, clip

    def forward(self, z: Tensor, draws: Tensor, scale: Tensor | None = None) -> Tensor:
        """Tokens [B, n, d] from vectors z [B, n, D].

        Args:
            draws: [B, S, n, d], what it begins with and the noise of its steps but the last.
            scale: of guidance; z then has the vectors without class behind the others, [2 B, n, D].
        """
        head = self.model.network.head
        told = ToldHead(head, head.cond_embed(z.flatten(0, 1)), scale=scale)
        first, *others = draws.transpose(0, 1).flatten(1, 2)[..., None, None]
        noise = _Given([self.temperature * draw for draw in others])
        denoiser = self.model.denoiser(told)
        *_, last = sample_ddpm(denoiser, first, Conditioning(), noise, self.levels, clip=self.clip)
        return last.x.reshape(len(draws), -1, draws.shape[3])


class _Given:
    """A sampler's noise that was drawn before."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self._draws = iter(draws)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return next(self._draws).to(dtype)

    def integers(self, high: int) -> Tensor:
        raise NotImplementedError  # classes are drawn before, and nothing else is whole numbers
