"""The encoder, a ViT over visible tokens, and the predictor of the masked ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aape_kernels import AaPE
from aape_kernels.reference import PLANES

from .._messages import at_least, did_you_mean, one_of

__all__ = [
    "SIZES",
    "ConvMLPStem",
    "ConvStem",
    "Encoder",
    "FixedAaPE",
    "Predictor",
    "Size",
    "make_stem",
    "sincos_positions",
]

StemName = Literal["aape", "aape-fixed", "conv", "conv+mlp"]


class Size(NamedTuple):
    """Width D, layers and heads of a ViT; the hidden layer of its MLPs is 4 D wide."""

    dim: int
    depth: int
    heads: int


SIZES = {"tiny": Size(192, 12, 3), "small": Size(384, 12, 6), "base": Size(768, 12, 12)}


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | str | None = None) -> Tensor:
    """2-D sin-cos position embedding (N_f·N_t, dim), frequency-major, of any token grid.

        [sin(i ω_k), cos(i ω_k), sin(j ω_k), cos(j ω_k)],   ω_k = 10000^(−4k/dim),   k = 0 … dim/4 − 1

    Errors: `ValueError` unless dim is a multiple of 4. Source: MAE's.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4, got {dim}")
    rates = torch.exp(torch.arange(dim // 4, device=device) * (-4 * math.log(10_000) / dim))
    axes = []
    for count in grid:
        angle = torch.arange(count, device=device)[:, None] * rates
        axes.append(torch.cat([angle.sin(), angle.cos()], -1))  # [N, dim/2]
    mel, time = axes
    return torch.cat([mel.repeat_interleave(grid[1], 0), time.repeat(grid[0], 1)], -1)


class ConvStem(nn.Module):
    """The plain patch embedding: one `nn.Conv2d`. x (B, C, F, T) -> tokens (B, N_f·N_t, D)."""

    def __init__(self, patch_size: int | tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of a log-mel spectrogram."""
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class FixedAaPE(AaPE):
    """AaPE whose filters are the same for every patch: `encoder.w2` is 0 and the encoder is frozen.

    Decays and frequencies stay at their initial values, the frequencies evenly over the band; filters, magnitudes and
    fusion are AaPE's and learn as in AaPE. Arguments and parameters are AaPE's too: a checkpoint of one loads
    into the other. `requires_grad_(True)` on the whole lets the encoder learn.

    Source: ours; it shows what choosing the filters by the patch brings, beyond having filters.
    """

    def _reset_branch(self) -> None:
        super()._reset_branch()
        nn.init.zeros_(self.encoder.w2)
        self.encoder.requires_grad_(False)


class ConvMLPStem(ConvStem):
    """The control: the plain patch embedding, and beside it an MLP of the size of AaPE's branch instead of filters.

        token = W_p · vec(patch) + b_p + W_y · SiLU(W2 · SiLU(W1 · vec(patch) + b1) + b2)

    with W_y (D, pS) as wide as AaPE's fusion, p = 3 planes for the features "both", 2 for "complex". The hidden width
    h makes the parameters as many as AaPE's, to within half of a hidden unit's (P + 1 + pS), where P is the pixels of
    a patch: AaPE's encoder (W1, b1, W2, b2) and projection B have H (P + 1) + 2S (H + 1) + S C P_f, and so

        h = round( (H (P + 1) + 2S (H + 1) + S C P_f − pS) / (P + 1 + pS) )

    Args:
        patch_size, in_chans, embed_dim: of the convolution.
        num_states, encoder_dim, features: S, H and what tells p, of the AaPE whose size it matches.

    Source: ours; it shows whether AaPE's gain comes from its filters, or from any branch of its size.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        num_states: int = 16,
        encoder_dim: int = 32,
        features: str = "both",
    ) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        one_of(PLANES, features=features)
        pixels, width = in_chans * math.prod(self.proj.kernel_size), PLANES[features] * num_states
        encoder = encoder_dim * (pixels + 1) + 2 * num_states * (encoder_dim + 1)
        projection = num_states * in_chans * self.proj.kernel_size[0]
        hidden = max(1, round((encoder + projection - width) / (pixels + 1 + width)))
        self.branch = nn.Sequential(
            nn.Conv2d(in_chans, hidden, patch_size, patch_size),
            nn.SiLU(),
            nn.Conv2d(hidden, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, embed_dim, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of a log-mel spectrogram."""
        return super().forward(x) + self.branch(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def make_stem(
    name: StemName, patch_size: int | tuple[int, int], embed_dim: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """The stem of that name, whose tokens see their own patch and nothing else.

    name: "aape", "aape-fixed" (`FixedAaPE`), "conv" or "conv+mlp" (`ConvMLPStem`).
    options: further keywords of `AaPE`, for the fixed one too, or `num_states`, `encoder_dim` and `features` of the
    MLP; "conv" has none.

    Errors: `ValueError` for another name, for an option that the stem does not have, and for an AaPE whose tokens see
    pixels of their neighbours' patches (a window longer than the patch, a shorter stride), which would give masked
    pre-training's answer away, or not all pixels (a longer stride).
    """
    one_of(get_args(StemName), stem=name)
    options = dict(options or {})
    kinds: dict[str, type[nn.Module]]
    kinds = {"aape": AaPE, "aape-fixed": FixedAaPE, "conv": ConvStem, "conv+mlp": ConvMLPStem}
    known = inspect.signature(kinds[name]).parameters.keys() - {"patch_size", "in_chans", "embed_dim"}
    for option in options.keys() - known:
        raise ValueError(f"stem_options: {name} has no option {option}{did_you_mean(option, known)}")
    stem = kinds[name](patch_size=patch_size, in_chans=1, embed_dim=embed_dim, **options)
    if isinstance(stem, AaPE) and (stem.window > stem.patch_size[1] or stem.stride != stem.patch_size):
        raise ValueError(
            f"stem: expected tokens that see their own patch only, got patch_size {stem.patch_size} with stride "
            f"{stem.stride} and window {stem.window}"
        )
    return stem


def gather_tokens(tokens: Tensor, numbers: Tensor) -> Tensor:
    """tokens (B, N, D) at `numbers` (B, M, n) -> (B, M, n, D)."""
    batch = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    return tokens[batch, numbers]


class Encoder(nn.Module):
    """A ViT over the visible tokens of M masks a clip, or over all of them.

    Stem, 2-D sin-cos positions, pre-norm transformer layers without dropout (`nn.TransformerEncoderLayer`, SDPA), a
    last layer norm. The stem runs once per clip, whatever M is.

    Args:
        size: "tiny" (D 192, 12 layers, 3 heads), "small" (384, 12, 6), "base" (768, 12, 12), or (D, layers, heads).
        stem: "aape", "aape-fixed" (without adapting), "conv" or "conv+mlp" (of AaPE's size): `make_stem`.
        patch_size: P_f × P_t, mel bins × frames; one int for a square patch.
        stem_options: further keywords of the stem (`make_stem`).

    Errors: `ValueError` naming the argument. Source: ViT, MAE; sizes are DeiT's.
    """

    def __init__(
        self,
        size: str | tuple[int, int, int] = "base",
        stem: StemName = "aape",
        patch_size: int | tuple[int, int] = 16,
        stem_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"size: expected one of {', '.join(SIZES)} or (D, layers, heads), got {size!r}")
        given = SIZES[size] if isinstance(size, str) else tuple(size)
        if len(given) != 3 or min(given) < 1:
            raise ValueError(f"size: expected (D, layers, heads), each at least 1, got {given}")
        self.size = Size(*given)
        dim, depth, heads = self.size
        if dim % heads or dim % 4:
            raise ValueError(f"size: expected a D divisible by 4 and by the heads, got {given}")
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.stem = make_stem(stem, patch_size, dim, stem_options)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """The token grid (N_f, N_t) of x (B, 1, F, T); bins and frames after the last whole patch are not used."""
        if x.dim() != 4 or x.shape[1] != 1:
            raise ValueError(f"x: expected shape (batch, 1, mel bins, frames), got {tuple(x.shape)}")
        n_f, n_t = x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]
        if not (n_f and n_t):
            raise ValueError(f"x: expected at least one patch, {self.patch_size}, got {tuple(x.shape[2:])}")
        return n_f, n_t

    def check_frames(self, frames: int) -> None:
        """Check that a crop of so many frames holds a patch. Errors: `ValueError`."""
        if frames < self.patch_size[1]:
            raise ValueError(f"frames: expected at least {self.patch_size[1]}, those of a patch, got {frames}")

    def embed(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """The input of the first layer: x (B, 1, F, T) -> (B, N, D), or (B·M, N_v, D) for `visible` (B, M, N_v)."""
        positions = sincos_positions(self.grid(x), self.size.dim, x.device)
        tokens: Tensor = self.stem(x)
        tokens = tokens + positions.to(tokens)
        return tokens if visible is None else gather_tokens(tokens, visible).flatten(0, 1)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """x (B, 1, F, T) -> tokens (B, N, D); with `visible` (B, M, N_v), token numbers, (B, M, N_v, D)."""
        tokens = self.embed(x, visible)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm(tokens)
        return tokens if visible is None else tokens.unflatten(0, visible.shape[:2])  # type: ignore[no-any-return]

    def hidden(self, x: Tensor, top: int) -> list[Tensor]:
        """Outputs (B, N, D) of the last `top` layers for the whole clip, the last one without the last norm."""
        tokens, outputs = self.embed(x), []
        for layer in self.layers:
            tokens = layer(tokens)
            outputs.append(tokens)
        return outputs[-top:]

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone besides biases and norms: the stem's own."""
        return {f"stem.{name}" for name in self.stem.no_weight_decay()} if isinstance(self.stem, AaPE) else set()


class CrossAttention(nn.Module):
    """One layer of the predictor: queries attend to the visible tokens, then an MLP; both pre-norm and residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, queries: Tensor, context: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """queries (B, N_q, D), context (B, N_v, D) -> (B, N_q, D), and weights (B, N_q, N_v), the mean over heads."""
        attended, weights = self.attention(self.norm1(queries), context, context, need_weights=need_weights)
        queries = queries + attended
        return queries + self.mlp(self.norm2(queries)), weights


class Predictor(nn.Module):
    """Predicts the teacher's tokens at masked places, by cross-attention from mask queries to the visible tokens.

        query = learned mask token + position;   context = W · visible token + position

    Queries do not attend to one another: each prediction depends on the visible tokens and its own position alone.

    Args:
        encoder_dim: D of the input tokens and of the predictions.
        dim: width of the predictor; D unless given.
        depth, heads: of the predictor.

    Errors: `ValueError` naming the argument.
    Source: the paper's second version has a cross-attention predictor; its layers and sizes are ours.
    """

    def __init__(self, encoder_dim: int, dim: int | None = None, depth: int = 2, heads: int = 6) -> None:
        super().__init__()
        self.dim = encoder_dim if dim is None else dim
        at_least(1, dim=self.dim, depth=depth, heads=heads)
        if self.dim % heads or self.dim % 4:
            raise ValueError(f"dim: expected a multiple of 4 and of the {heads} heads, got {self.dim}")
        self.mask_token = nn.Parameter(torch.empty(self.dim).normal_(std=0.02))
        self.context = nn.Linear(encoder_dim, self.dim)
        self.layers = nn.ModuleList(CrossAttention(self.dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(self.dim)
        self.head = nn.Linear(self.dim, encoder_dim)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, M, N_v, D) at `visible` (B, M, N_v) -> predictions (B, M, N_m, D) at `masked` (B, M, N_m)."""
        queries, context = self._embed(tokens, visible, masked, grid)
        for layer in self.layers:
            queries, _ = layer(queries, context)
        return self.head(self.norm(queries)).unflatten(0, masked.shape[:2])  # type: ignore[no-any-return]

    def attention(self, tokens: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """The share of the queries' attention that each visible token gets, (B, M, N_v); 1 in all.

        Mean over queries, heads and layers, for the arguments of `forward`. It holds all pairs; `forward` never does.
        """
        queries, context = self._embed(tokens, visible, masked, grid)
        shares = []
        for layer in self.layers:
            queries, weights = layer(queries, context, need_weights=True)
            shares.append(weights.mean(1))
        return torch.stack(shares).mean(0).unflatten(0, masked.shape[:2])  # type: ignore[no-any-return]

    def _embed(self, tokens: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        positions = sincos_positions(grid, self.dim, tokens.device).to(tokens)
        context = (self.context(tokens) + F.embedding(visible, positions)).flatten(0, 1)
        queries = (self.mask_token + F.embedding(masked, positions)).flatten(0, 1)
        return queries, context
