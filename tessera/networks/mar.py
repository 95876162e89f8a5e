"""MAR: masked autoregression over continuous tokens (Li, Tian, Li, Deng & He 2024, "Autoregressive
Image Generation without Vector Quantization").

An image is L tokens of p x p pixels. The encoder sees the known ones, behind some copies of the
class; the decoder puts a mask token at all other places and gives each a vector, from which a small
network (`diffusion_head`) makes the token. Parameters carry the names of the released checkpoints,
but that `diffloss.net` is `head` here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.conditioning import Conditioning
from tessera.errors import TesseraError
from tessera.networks.diffusion_head import DiffusionHead
from tessera.networks.lego import Grid
from tessera.networks.transformer import ViTBlock, tokens_at


class Mar(nn.Module):
    """Encoder and decoder of masked tokens, and the head that makes tokens of vectors.

    Args:
        side: of the images in model space.
        channels: of the images.
        num_classes: 0 for a network without classes. No class is a vector of its own.
        patch: side p of a token.
        width, depth, heads: of the encoder.
        decoder_width, decoder_depth, decoder_heads: of the decoder; None: as the encoder.
        mlp_ratio: hidden layer of the blocks' MLPs / width.
        buffer: number of copies of the class.
        attn_dropout, dropout: see `ViTBlock`.
        head_width, head_depth: of the head.

    Raises:
        TesseraError: sizes that do not fit.
    """

    def __init__(
        self,
        side: int,
        channels: int,
        num_classes: int = 0,
        *,
        patch: int = 1,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_width: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        mlp_ratio: float = 4.0,
        buffer: int = 64,
        attn_dropout: float = 0.1,
        dropout: float = 0.1,
        head_width: int = 1024,
        head_depth: int = 6,
    ) -> None:
        super().__init__()
        wide, deep = decoder_width or width, decoder_depth or depth
        decoder_heads = decoder_heads or heads
        if side % patch or width % heads or wide % decoder_heads:
            raise TesseraError(
                f"MAR on images of side {side} with tokens of {patch}, widths {width} and {wide}: "
                "the side must be a multiple of the token's, and widths multiples of heads"
            )
        self.patch, self.channels, self.buffer = patch, channels, buffer
        self.rows = side // patch
        self.tokens, self.token_size = self.rows**2, channels * patch**2
        places, drops = buffer + self.tokens, {"attn_dropout": attn_dropout, "dropout": dropout}
        self.class_emb = nn.Embedding(num_classes, width) if num_classes else None
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj = nn.Linear(self.token_size, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, width))
        self.encoder_blocks = nn.ModuleList(
            ViTBlock(width, heads, mlp_ratio, **drops) for _ in range(depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, wide)
        self.mask_token = nn.Parameter(torch.empty(1, 1, wide))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, wide))
        self.decoder_blocks = nn.ModuleList(
            ViTBlock(wide, decoder_heads, mlp_ratio, **drops) for _ in range(deep)
        )
        self.decoder_norm = nn.LayerNorm(wide, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, self.tokens, wide))
        self._initialise()
        self.head = DiffusionHead(self.token_size, wide, head_width, head_depth)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [
            self.fake_latent, self.mask_token, self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned,
        ]  # fmt: skip
        for table in (*tables, *([self.class_emb.weight] if self.class_emb else [])):
            nn.init.normal_(table, std=0.02)

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated transformer blocks; the head names its own."""
        yield from self.encoder_blocks
        yield from self.decoder_blocks

    def cut(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to tokens [B, L, d], row after row; in a token channel after channel.

        Example:
            >>> network = Mar(4, 3, patch=2, width=8, depth=1, heads=1, head_width=8, head_depth=1)
            >>> x = torch.randn(2, 3, 4, 4)
            >>> network.cut(x).shape, bool((network.join(network.cut(x)) == x).all())
            (torch.Size([2, 4, 12]), True)
        """
        return self._grid.cut(x)

    def join(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, d] to images [B, C, H, W]; `cut` undone."""
        split = tokens.reshape(len(tokens), self.tokens, self.channels, self.patch**2)
        return self._grid.join(split.transpose(2, 3).flatten(2))

    @property
    def _grid(self) -> Grid:
        side = self.rows * self.patch
        return Grid(side, side, side, self.patch)

    def forward(
        self,
        tokens: Tensor,
        known: Tensor,
        wanted: Tensor,
        cond: Conditioning,
    ) -> Tensor:
        """The vectors of the places `wanted`, given the tokens at the places `known`.

        Only known tokens pass the encoder, and only wanted ones leave the decoder's last block.

        Args:
            tokens: [B, L, d]; what stands at other places than the known ones does not matter.
            known: int64 [B, K], numbers of places.
            wanted: int64 [B, n], numbers of places.
            cond: of it the classes.

        Returns:
            z [B, n, D_d] in the network's precision.
        """
        return self.decode(self.encode(tokens, known, cond), known, wanted)

    def encode(self, tokens: Tensor, known: Tensor, cond: Conditioning) -> Tensor:
        """The buffer and the known tokens after the encoder, [B, b + K, D_e]."""
        given = self._classes(cond, len(tokens))[:, None].expand(-1, self.buffer, -1)
        x = self.z_proj(tokens_at(tokens, known))
        h = torch.cat([given.to(x.dtype), x], dim=1)
        h = self.z_proj_ln(h + _places(self.encoder_pos_embed_learned, self.buffer, known))
        for block in self.encoder_blocks:
            h = block(h)
        encoded: Tensor = self.encoder_norm(h)
        return encoded

    def decode(self, h: Tensor, known: Tensor, wanted: Tensor) -> Tensor:
        """The vectors z [B, n, D_d] of the wanted places, from the encoder's output."""
        h = self.decoder_embed(h)
        full = self.mask_token.to(h.dtype).expand(len(h), self.tokens, -1)
        full = full.scatter(1, known[:, :, None].expand(-1, -1, h.shape[2]), h[:, self.buffer :])
        h = torch.cat([h[:, : self.buffer], full], dim=1) + self.decoder_pos_embed_learned
        *blocks, last = self.decoder_blocks
        for block in blocks:
            h = block(h)
        h = self.decoder_norm(last(h, self.buffer + wanted))
        return h + F.embedding(wanted, self.diffusion_pos_embed_learned[0])

    def _classes(self, cond: Conditioning, batch: int) -> Tensor:
        """Vectors [B, D_e] of the classes, or of no class."""
        fake = self.fake_latent.expand(batch, -1)
        if self.class_emb is None or cond.labels is None:
            return fake
        labels = cond.labels.to(fake.device)
        # Also of a batch without classes, so that the table takes part in every loss.
        return torch.where(labels[:, None] < 0, fake, self.class_emb(labels.clamp(min=0)))


def _places(table: Tensor, buffer: int, known: Tensor) -> Tensor:
    """The position vectors [B, b + K, D] of the buffer and of the known places."""
    shared = table[:, :buffer].expand(len(known), -1, -1)
    return torch.cat([shared, F.embedding(buffer + known, table[0])], dim=1)
