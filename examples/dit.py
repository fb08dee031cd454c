"""Video diffusion transformer: noisy latents, times and captions in, latents without noise out.

DiT with AdaLN-zero (Peebles, Xie: Scalable Diffusion Models with Transformers, arXiv:2212.09748), trained as a flow as in SiT (Ma et al.,
arXiv:2401.08740). Positions are sines and cosines of frame, row and column, added to tokens as in DiT and as rotations of queries and keys
(Su et al.: RoFormer, arXiv:2104.09864). Queries and keys are normalised (Dehghani et al., arXiv:2302.05442). Any latent size works whose
height and width are multiples of the patch.

Letters of shapes: B batch, C latent channels, T H W latent frames, rows, columns; L tokens, D width, N heads, K values of a head,
P values of a patch, S words of the longest caption.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NO_CAPTION, PADDING = 0, -1  # word numbers
TIME_VALUES = 256  # sines and cosines of a time
POSITION_BASE = 256.0  # ratio of the longest to the shortest period, which is 2 pi tokens


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """Sizes of a `DiT`. `patch`: latent frames, rows, columns of a token. Head size `width / heads` must be a multiple of 16.

    `text_width`: values of a text embedding, 0 for captions as hashed words. `known_channels`: of what is known of the latents.
    """

    channels: int
    width: int = 192
    depth: int = 6
    heads: int = 6
    patch: tuple[int, int, int] = (1, 2, 2)
    vocabulary: int = 4096
    text_width: int = 0
    known_channels: int = 0

    def __post_init__(self) -> None:
        if self.width % (16 * self.heads):
            raise ValueError(f"width {self.width}: expected a multiple of 16 x {self.heads} heads")


class DiT(nn.Module):
    """Denoising network. Its output is zero at the start of training, as its last layer and all gates are."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        values = config.channels * math.prod(config.patch)
        self.embed = nn.Linear(values + config.known_channels * math.prod(config.patch), config.width)
        self.time = nn.Sequential(
            nn.Linear(TIME_VALUES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.text = (
            nn.Linear(config.text_width, config.width)
            if config.text_width
            else nn.Embedding(config.vocabulary, config.width)
        )
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.head = nn.Linear(config.width, values)
        self._initialise()

    def forward(self, noisy_BCTHW: Tensor, time_B: Tensor, text: Tensor, known_BCTHW: Tensor | None = None) -> Tensor:
        """Latents without noise `BCTHW`, for times in [0, 1] (1 is noise).

        `text`: captions as `caption_words` makes them, or text embeddings `B text_width`. `known_BCTHW`: what is known of them, such as
        their first frame and where it is, `known_channels` channels.

        Raises:
            ValueError: height or width is not a multiple of the patch.
        """
        grid = self._grid(noisy_BCTHW)
        rotation_LK = rotations(grid, self.config.width // self.config.heads, noisy_BCTHW.device)
        position_LD = torch.cat(rotations(grid, self.config.width, noisy_BCTHW.device), dim=1)
        seen_BCTHW = noisy_BCTHW if known_BCTHW is None else torch.cat([noisy_BCTHW, known_BCTHW], dim=1)
        tokens_BLD = self.embed(to_patches(seen_BCTHW, self.config.patch)) + position_LD
        condition_BD = F.silu(self.time(time_features(time_B)) + self._caption(text))
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD, condition_BD, rotation_LK)
        shift_BD, scale_BD = self.modulation(condition_BD).chunk(2, dim=-1)
        values_BLP = self.head(modulated(tokens_BLD, shift_BD, scale_BD))
        return from_patches(values_BLP, self.config.patch, grid)

    def _grid(self, latent_BCTHW: Tensor) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns."""
        sizes, patch = latent_BCTHW.shape[2:], self.config.patch
        if any(size % step for size, step in zip(sizes, patch, strict=True)):
            raise ValueError(
                f"latents of {'x'.join(map(str, sizes))} frames, rows, columns: expected multiples of the patch {patch}; "
                "filter this bucket out, or choose another patch"
            )
        frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
        return frames, height, width

    def _caption(self, text: Tensor) -> Tensor:
        """Text embeddings at the width of tokens, or the mean embedding of the words, `BD`."""
        if self.config.text_width:
            found: Tensor = self.text(F.layer_norm(text, text.shape[-1:]))
            return found
        present_BS1 = (text != PADDING).unsqueeze(-1)
        found_BSD = self.text(text.clamp(min=0)) * present_BS1
        return found_BSD.sum(1) / present_BS1.sum(1)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if isinstance(self.text, nn.Embedding):
            nn.init.normal_(self.text.weight, std=0.5)
        for name, value in self.named_parameters():
            if name.endswith("modulation.weight") or name == "head.weight":
                nn.init.zeros_(value)


class Block(nn.Module):
    """Self-attention and MLP. Shift, scale and gate of both come from the condition; gates are zero at first (AdaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens_BLD: Tensor, condition_BD: Tensor, rotation_LK: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens `BLD` of the next block."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition_BD).chunk(6, dim=-1)
        mixed_BLD = self._attention(modulated(tokens_BLD, shift_a, scale_a), rotation_LK)
        tokens_BLD = tokens_BLD + gate_a.unsqueeze(1) * mixed_BLD
        return tokens_BLD + gate_m.unsqueeze(1) * self.mlp(modulated(tokens_BLD, shift_m, scale_m))

    def _attention(self, tokens_BLD: Tensor, rotation_LK: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value_BNLK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens_BLD).chunk(3, dim=-1)
        )
        query_BNLK = rotated(self.query_norm(query), rotation_LK).to(value_BNLK.dtype)
        key_BNLK = rotated(self.key_norm(key), rotation_LK).to(value_BNLK.dtype)
        mixed_BNLK = F.scaled_dot_product_attention(query_BNLK, key_BNLK, value_BNLK)
        found: Tensor = self.out(mixed_BNLK.transpose(1, 2).flatten(2))
        return found


def modulated(tokens_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Layer norm without weights of its own, then `x (1 + scale) + shift`."""
    return F.layer_norm(tokens_BLD, tokens_BLD.shape[-1:], eps=1e-6) * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(
        1
    )


def to_patches(latent_BCTHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Patches as tokens `BLP`, frames first, then rows, then columns."""
    t, h, w = patch
    split = latent_BCTHW.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # B C T t H h W w
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_patches(values_BLP: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Inverse of `to_patches`, for a grid of tokens: `BCTHW`."""
    split = values_BLP.unflatten(2, (-1, *patch)).unflatten(1, grid)  # B T H W C t h w
    return split.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def rotations(grid: tuple[int, int, int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `L size/2` of every token's position: a quarter of them of its frame, 3/8 each of its row and column."""
    shares = (size // 4, size * 3 // 8, size * 3 // 8)
    places = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    angles = []
    for place, share in zip(places, shares, strict=True):
        frequencies = POSITION_BASE ** -(torch.arange(0, share, 2, device=device) / share)
        angles.append(place.reshape(-1, 1) * frequencies)
    angles_LK = torch.cat(angles, dim=1)
    return angles_LK.cos(), angles_LK.sin()


def rotated(values_BNLK: Tensor, rotation_LK: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of values turned by the angles of their token."""
    cos, sin = rotation_LK
    one, other = values_BNLK.float().chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1)


def time_features(time_B: Tensor) -> Tensor:
    """Sines and cosines of times in [0, 1], float32 `B TIME_VALUES`, periods from 1/160 to 60."""
    steps = torch.arange(TIME_VALUES // 2, device=time_B.device) / (TIME_VALUES // 2)
    angles = 1000 * time_B.float().unsqueeze(1) * 10_000**-steps
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def caption_words(captions: Sequence[str], vocabulary: int) -> Tensor:
    """Hashed words of captions, int64 `BS` in [1, vocabulary), padded with `PADDING`; `NO_CAPTION` alone for an empty one.

    It stands in for a text encoder: it needs no weights, and tells captions apart by their words.
    """
    rows = [
        [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in re.findall(r"\w+", caption.lower())]
        or [NO_CAPTION]
        for caption in captions
    ]
    longest = max(map(len, rows))
    return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])
