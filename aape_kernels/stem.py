"""AaPE, the patch-embedding stem as an `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import check_backend
from .branch import Filters, Fusion, LambdaEncoder, as_made, convolves, hooked
from .checks import DTYPES, KERNELS, LAYOUTS, check_name, check_states
from .functional import Responses, analyse, embed, embed_by_parts, listen_by_parts, responses
from .geometry import PatchGrid, pair, sizes_of
from .ranges import check_band, check_decay
from .reference import PLANES, magnitudes
from .sizes import SizedStem, check_flag

__all__ = ["AaPE"]

# Attributes of a stem that cannot change once it is made: its keywords, and what a convolution has.
KEYWORDS = frozenset(
    {"patch_size", "stride", "window", "kernel", "features", "band", "decay", "layout", "num_states", "encoder_dim"}
    | {"in_chans", "embed_dim"}
)
SETTLED = KEYWORDS | {"in_channels", "out_channels", "kernel_size", "padding", "dilation", "groups"}


def _positive(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _factory(device: object, dtype: object) -> dict[str, Any]:
    """`device` and `dtype` as PyTorch's constructors take them."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
    if device is not None:
        try:
            torch.device(device)  # type: ignore[call-overload]  # of any type: torch is to judge it
        except (RuntimeError, TypeError) as error:
            raise ValueError(f'device: expected one such as "cpu" or "cuda:0", or None, got {device!r}') from error
    return {"device": device, "dtype": dtype}


def _means(value: object, known: object) -> bool:
    """Whether `value` is another way to write `known` that convolutions accept: 8 or [8, 8] for (8, 8)."""
    if not isinstance(known, tuple):
        return False
    return list(known) == (list(value) if isinstance(value, tuple | list) else [value] * len(known)) or (
        value == "valid" and known == (0, 0)
    )


def _forward(stem: AaPE, x: Tensor) -> Tensor:
    """What a stem's class computes, without hooks."""
    return AaPE.forward(stem, x)


def computes_conv(conv: nn.Conv2d) -> bool:
    """Whether calling it convolves with its weight and does nothing else; another forward would be lost."""
    kind = type(conv)
    own = kind.forward is nn.Conv2d.forward and kind.__call__ is nn.Conv2d.__call__
    return own and "forward" not in conv.__dict__ and convolves(conv)


class AaPE(SizedStem):
    """Aliasing-aware Patch Embedding: a drop-in for the `nn.Conv2d` stem of an audio ViT.

        token = W_p · vec(patch) + b_p + W_y · f,   f = [Re y ; Im y ; n]

    where y is the response of S complex sinusoidal filters under a two-sided exponential window (`aape_kernels.sblu`),
    and n how strongly each of them responds, whatever the phase:

        e = ½ log1p(|y|²/ε²),   ε = 0.1;   n = (e − mean e) / sqrt(var e + 1e-5), over the S states of a token

    y rotates with the phase of the modulation, so that its mean over time vanishes; n stays. A small encoder estimates
    the filters' decays and frequencies from the patch itself:

        r = W2 · SiLU(W1 · vec(patch) + b1) + b2
        α = α_lo (α_hi/α_lo)^σ(r_α),   ω = ω_lo + (ω_hi − ω_lo) σ(r_ω)

    Args:
        img_size: (F, T) of the input; None accepts any size that holds at least one patch.
        patch_size: P_f × P_t, mel bins × frames; one int for a square patch.
        in_chans: channels C of the spectrogram.
        embed_dim: size D of a token.
        stride: S_f × S_t; the patch size unless given. Overlap and gaps are allowed.
        num_states: S, filters per patch; at least 2 unless `features` is "complex".
        encoder_dim: hidden width of the encoder.
        window: K in frames, of P_t's parity; P_t unless given. With K > P_t a token also sees frames of its
            neighbours, which masked pre-training must avoid.
        kernel: "quadrature" (h(−d) = conj h(d); ours) or "bilateral" (the paper's quoted formula).
        features: f, which part of the responses reaches the token: "both" (y and n), "complex" (y) or "magnitude" (n).
        band: (ω_lo, ω_hi) in rad/frame within [0, π]; `band_from_hz` converts. Unless given, (π/S_t, π), the
            alias-prone band; required if S_t = 1.
        decay: (α_lo, α_hi) in 1/frame; `decay_from_hz` converts. (1/K, 2) unless given.
        bias: whether `proj` has one.
        layout: "FT" for input (B, C, F, T); "TF" for (B, C, T, F). With "TF" `img_size`, `patch_size`, `stride`,
            `grid_size` and `proj.weight` follow the input's order (time, frequency) and tokens are time-major.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        norm_layer: makes `norm` from D, the last layer that the tokens go through; None for an identity.
        flatten: False for tokens as the convolution lays them out, "NCHW".
        output_fmt: "NCHW", "NHWC", "NCL" or "NLC", which takes precedence over `flatten`: N the batch, C the token's
            D, H × W the token grid in the input's order and L its tokens. A view of contiguous "NLC".
        strict_img_size: whether every input must have `img_size`; otherwise it only gives `grid_size`.
        dynamic_img_pad: pad the ends of both axes with zeros until no frame or mel bin is left over after the last
            patch; otherwise what is left over is not used.
        device: of the parameters.
        dtype: of the parameters.

    From `norm_layer` on, these are the keywords of timm's stem: `timm.create_model(..., embed_layer=AaPE)`.

    Shapes: x (B, C, F, T) -> tokens (B, N_f·N_t, D), contiguous, frequency-major (i·N_t + j); for layout "TF"
    x (B, C, T, F) -> time-major tokens.

    Precision: encoder and filters run in float32 (float64 for float64 input), the features are rounded once; the
    product and the tokens have the input's dtype, or autocast's. Without autocast, x must have `proj.weight`'s dtype.

    Attributes: `proj` (the `nn.Conv2d` this replaces: its checkpoints load), `encoder`, `sblu`, `fusion`, `norm`;
    `img_size`, `patch_size`, `stride`, `grid_size` and `num_patches` (None without `img_size`), `window`, `band`,
    `decay`.

    Errors: `TypeError`, `ValueError` or `RuntimeError` naming the argument, what was expected and what came.
    Source: arXiv 2512.03637; the magnitudes n, layer sizes, ranges and initialisation are ours.

    Examples:
        >>> stem = AaPE(embed_dim=192)
        >>> stem(torch.zeros(2, 1, 128, 1024)).shape
        torch.Size([2, 512, 192])
    """

    # 2: the fusion has a plane for n. See `_load_from_state_dict`.
    _version = 2
    # whether the stem itself holds the weight of the convolution whose place it takes: `surgery.AaPEConv2d`
    _is_proj = False

    def __init__(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 1,
        embed_dim: int = 768,
        *,
        stride: int | Sequence[int] | None = None,
        num_states: int = 16,
        encoder_dim: int = 32,
        window: int | None = None,
        kernel: str = "quadrature",
        features: str = "both",
        band: Sequence[float] | None = None,
        decay: Sequence[float] | None = None,
        bias: bool = True,
        layout: str = "FT",
        backend: str = "auto",
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # `surgery.AaPEConv2d` is an nn.Conv2d too: skip that constructor
        self.layout = check_name(layout, "layout", LAYOUTS)
        self.kernel = check_name(kernel, "kernel", KERNELS)
        self.features = check_name(features, "features", tuple(PLANES))
        self.backend = check_backend(backend)
        self.in_chans = _positive(in_chans, "in_chans")
        self.embed_dim = _positive(embed_dim, "embed_dim")
        self.num_states = check_states(_positive(num_states, "num_states"), features, "num_states")
        self.encoder_dim = _positive(encoder_dim, "encoder_dim")
        self.patch_size = pair(patch_size, "patch_size")
        self.stride = self.patch_size if stride is None else pair(stride, "stride")
        self._grid = PatchGrid.make(self._mel_first(self.patch_size), self._mel_first(self.stride), window)
        self.window = self._grid.window
        self.band = check_band(band, self._grid)
        self.decay = check_decay(decay, self._grid)

        if norm_layer is not None and (not callable(norm_layer) or isinstance(norm_layer, nn.Module)):
            raise TypeError(f"norm_layer: expected a module's class or another callable, or None, got {norm_layer!r}")
        self._set_format(flatten, output_fmt)
        self._set_sizes(img_size, strict_img_size, dynamic_img_pad)

        factory = _factory(device, dtype)
        bias = check_flag(bias, "bias")
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, bias=bias, **factory)
        self.encoder = LambdaEncoder(in_chans, self._grid.patch, encoder_dim, num_states, **factory)
        self.sblu = Filters(num_states, in_chans, self._grid.patch[0], **factory)
        self.fusion = Fusion(embed_dim, PLANES[features], num_states, **factory)
        given = {name: value for name, value in factory.items() if value is not None}
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim, **given)
        self._reset_branch()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, layout: str = "FT", **options: Any) -> AaPE:
        """A stem that computes what `conv` computes, until training moves its fusion weight from zero.

        Args:
            conv: a patch embedding without padding, dilation or groups. Its weights are copied; device, dtype,
                training mode and `requires_grad` are kept.
            layout: order of the last two axes of conv's input, "FT" (B, C, F, T) or "TF" (B, C, T, F).
            options: any other keyword of `AaPE` that conv does not settle.

        Errors: `TypeError` if `conv` is no `nn.Conv2d`, `ValueError` naming the property that does not fit.
        Source: ours (docs/maths.md §4).

        Examples:
            >>> conv = nn.Conv2d(1, 192, 16, 16)
            >>> stem, x = AaPE.from_conv(conv), torch.randn(2, 1, 128, 256)
            >>> torch.allclose(stem(x), conv(x).flatten(2).transpose(1, 2), atol=1e-5)
            True
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        if not computes_conv(conv):
            raise TypeError(f"conv: expected an nn.Conv2d with nn.Conv2d's forward, got {type(conv).__name__}")
        if (conv._forward_hooks or conv._forward_pre_hooks) and not cls._is_proj:  # `replace_stem` takes them along
            raise ValueError(
                "conv: expected one without forward hooks, such as weight_norm's or pruning's, which the stem would "
                "not have: remove them first (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)"
            )
        padding = (0, 0) if conv.padding == "valid" else conv.padding
        for name, got, expected in (
            ("padding", padding, (0, 0)),
            ("dilation", conv.dilation, (1, 1)),
            ("groups", conv.groups, 1),
        ):
            if got != expected:
                raise ValueError(f"conv: expected {name} {expected}, got {got}")
        if conv.weight.dim() != 4:
            raise ValueError(f"conv: expected a weight of four axes, got {tuple(conv.weight.shape)}")
        # which counts, not the attributes: it may have been adapted, as from three colours to one channel
        dim, channels, *patch = sizes_of(conv.weight)
        settled = {"patch_size", "in_chans", "embed_dim", "stride", "bias", "device", "dtype"} & options.keys()
        if settled:
            raise TypeError(f"{', '.join(sorted(settled))}: expected to be left out, as conv settles it")
        stem = cls(
            patch_size=patch,
            in_chans=channels,
            embed_dim=dim,
            stride=conv.stride,
            bias=conv.bias is not None,
            layout=layout,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        stem.fusion.starts_at_zero = True
        stem.fusion.reset_parameters()
        with torch.no_grad():
            stem.proj.weight.copy_(conv.weight)
            stem.proj.weight.requires_grad_(conv.weight.requires_grad)
            if stem.proj.bias is not None and conv.bias is not None:
                stem.proj.bias.copy_(conv.bias)
                stem.proj.bias.requires_grad_(conv.bias.requires_grad)
        return stem.train(conv.training)

    def _reset_branch(self) -> None:
        self.encoder.reset_parameters()
        self.sblu.reset_parameters()
        self.fusion.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter afresh, as the constructor or `from_conv` did; after `to_empty`, say."""
        self.proj.reset_parameters()
        self._reset_branch()
        for module in self.norm.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: the biases, including `encoder.b2`, which holds where the
        filters lie in the decay range and the band."""
        return {"proj.bias", "bias", "encoder.b1", "encoder.b2"} & dict(self.named_parameters()).keys()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) of a log-mel spectrogram (B, C, F, T), or (B, C, T, F) for layout "TF"; see `output_fmt`."""
        if isinstance(x, torch.fx.Proxy):
            return self._leaf(x)
        x = self._fit(x)
        if not self._as_made_for_tokens():
            return self.norm(self._arrange(self._by_parts(x), sizes_of(x)[2:]))  # type: ignore[no-any-return]
        proj, encoder = self.proj, self.encoder  # each access costs a search
        tokens = embed(
            x,
            proj.weight,
            proj.bias,
            encoder.w1,
            encoder.b1,
            encoder.w2,
            encoder.b2,
            self.sblu.weight,
            self.fusion.weight,
            stride=self.stride,
            window=self.window,
            kernel=self.kernel,
            decay=self.decay,
            band=self.band,
            layout=self.layout,
            backend=self.backend,
        )
        return self.norm(self._arrange(tokens, sizes_of(x)[2:]))  # type: ignore[no-any-return]

    def _as_made(self) -> bool:
        """Whether the parts can be read for one fused call; else they are called, one by one."""
        return as_made(self.encoder, LambdaEncoder) and as_made(self.sblu, Filters) and as_made(self.fusion, Fusion)

    def _as_made_for_tokens(self) -> bool:
        proj = self.proj
        if isinstance(proj, nn.Conv2d):
            # people set these on a convolution, which then follows them; the filters' window and band cannot
            for name, want in (("stride", self.stride), ("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
                got = getattr(proj, name)
                if got != want and not _means(got, want):
                    raise ValueError(
                        f"proj.{name}: expected {want}, as the stem was made, got {got}; "
                        "for another one make another stem"
                    )
        return self._as_made() and (convolves(proj) if self._is_proj else as_made(proj, nn.Conv2d))

    def _by_parts(self, x: Tensor) -> Tensor:
        proj: Callable[[Tensor], Tensor] = self._project if self._is_proj else self.proj
        return embed_by_parts(x, proj, self.encoder, self.sblu, self.fusion, self.features, *self._listens())

    def _listens(self) -> tuple[Any, ...]:
        """The options of `listen_by_parts`."""
        sizes = (self._grid.patch, self.stride, self.window)
        return *sizes, self.kernel, self.decay, self.band, self.layout, self.backend

    def _project(self, x: Tensor) -> Tensor:
        """The convolution alone, if the stem is in the place of one."""
        return nn.Conv2d.forward(self.proj, x)

    def _leaf(self, x: Any) -> Any:
        """One node of `torch.fx`'s graph: what happens inside depends on sizes, which its tracer does not know."""
        path = x.tracer.path_of_module(self)
        if not path:
            raise TypeError("torch.fx: expected a model that holds the stem, such as nn.Sequential(stem), got the stem")
        if type(self).__module__.startswith("aape_kernels.") and not hooked(self):
            return x.tracer.create_proxy("call_module", path, (x,), {})
        # the tracer has met its hooks, and what a subclass does besides: they are nodes of their own
        stem = x.tracer.create_proxy("get_attr", path, (), {})
        return x.tracer.create_proxy("call_function", _forward, (stem, x), {})

    @torch.no_grad()
    def analyse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder chose for each patch, to look at and plot; without gradients.

        x (B, C, F, T), or (B, C, T, F) for layout "TF" -> decay (1/frame) and frequency (rad/frame), each
        (B, N_f, N_t, S) whatever the layout, in float32 (float64 for float64 input).
        """
        encoder = self.encoder
        if not self._as_made():
            return listen_by_parts(self._fit(x), encoder, self.sblu, *self._listens())[:2]
        return analyse(
            self._fit(x),
            encoder.w1,
            encoder.b1,
            encoder.w2,
            encoder.b2,
            stride=self.stride,
            window=self.window,
            decay=self.decay,
            band=self.band,
            layout=self.layout,
        )

    @torch.no_grad()
    def responses(self, x: Tensor) -> Responses:
        """What the stem hears in each patch, to plot or to probe; without gradients.

        x (B, C, F, T), or (B, C, T, F) for layout "TF" -> named tuple of decay (1/frame), frequency (rad/frame) and
        magnitude n, each (B, N_f, N_t, S), and y (B, N_f, N_t, 2, S), whatever the layout and `features`; in float32
        (float64 for float64 input).

        Examples:
            >>> heard = AaPE(embed_dim=8, num_states=4).responses(torch.randn(1, 1, 128, 64))
            >>> {name: tuple(value.shape) for name, value in heard._asdict().items()}
            {'decay': (1, 8, 4, 4), 'frequency': (1, 8, 4, 4), 'y': (1, 8, 4, 2, 4), 'magnitude': (1, 8, 4, 4)}
        """
        encoder = self.encoder
        if not self._as_made():
            decay, frequency, y = listen_by_parts(self._fit(x), encoder, self.sblu, *self._listens())
            return Responses(decay, frequency, y, magnitudes(y))
        return responses(
            self._fit(x),
            encoder.w1,
            encoder.b1,
            encoder.w2,
            encoder.b2,
            self.sblu.weight,
            stride=self.stride,
            window=self.window,
            kernel=self.kernel,
            decay=self.decay,
            band=self.band,
            layout=self.layout,
            backend=self.backend,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTLED and (known := getattr(self, name, None)) is not None:
            if value != known and not _means(value, known):
                another = f"; make another stem with {name}={value!r}" if name in KEYWORDS else ""
                raise AttributeError(
                    f"{name}: cannot be set, as window, band and weights belong to {known}, got {value!r}{another}"
                )
            value = known  # in its own notation
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            "torch.jit.script: expected a model without AaPE, whose backends TorchScript cannot compile; "
            "torch.jit.trace(model, x) works, through the reference"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # a stem that was pickled whole before it had features
        self.__dict__.setdefault("features", "complex")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *context: Any
    ) -> None:
        # `replace_stem` leaves the branch beside the weight of the convolution: `proj.encoder.w1`, say
        for name in self.state_dict():
            beside = f"{prefix}proj.{name}"
            if not name.startswith("proj.") and beside in state_dict:
                state_dict[prefix + name] = state_dict.pop(beside)
        # Version 1 had no n: a plane of zeros in its place gives the same tokens. Files such as safetensors' lose the
        # version, but versions differ in n's plane alone.
        fusion = state_dict.get(f"{prefix}fusion.weight")
        if (
            local_metadata.get("version", 1) < 2
            and self.features == "both"
            and isinstance(fusion, Tensor)
            and tuple(fusion.shape) == (self.embed_dim, PLANES["complex"], self.num_states)
        ):
            state_dict[f"{prefix}fusion.weight"] = F.pad(fusion, (0, 0, 0, 1))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *context)

    def extra_repr(self) -> str:
        """The arguments that determine what is computed, with the ranges in the units of the formulas."""
        sizes = f"{self.in_chans}, {self.embed_dim}, patch_size={self.patch_size}, stride={self.stride}"
        image = "" if self.img_size is None else f"img_size={self.img_size}, grid_size={self.grid_size}, "
        return (
            f"{sizes}, {image}num_states={self.num_states}, encoder_dim={self.encoder_dim}, window={self.window}, "
            f"kernel={self.kernel!r}, features={self.features!r}, "
            f"band=({self.band[0]:.4g}, {self.band[1]:.4g}) rad/frame, "
            f"decay=({self.decay[0]:.4g}, {self.decay[1]:.4g}) /frame, layout={self.layout!r}, backend={self.backend!r}"
        )
