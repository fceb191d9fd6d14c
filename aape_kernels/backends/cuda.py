"""The CUDA backend: the native module's kernels for NVIDIA GPUs, with matrix products by the library's GEMM.

The native module has its own CUDA runtime and no libtorch: it is handed pointers, the device and its current stream.
Every call is checked (with `CUDA_LAUNCH_BLOCKING=1` for errors inside the kernel, too) and can be captured in a graph.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ranges import LogitRanges
from ..weights import Weights
from .cpu import NATIVE_BUILT
from .fused import PARTIAL_SUMS, Adjoint, Kernels, operations
from .native import DTYPE_CODES, load, sizes

if TYPE_CHECKING:
    from . import Call

__all__ = ["embed", "embed_backward", "kernels", "reason", "runs_on", "sblu", "sblu_backward", "unusable"]


# Of x, where kernels multiply on tensor cores.
ON_TENSOR_CORES = (torch.float32, torch.bfloat16)


def kernels() -> Any:
    """The module that has the kernels."""
    return load().cuda


def reason(call: Call) -> str | None:
    """Why this backend cannot run `call`, which is on a GPU: the build, the driver or the GPU's capability."""
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, and this PyTorch was built for AMD's"
    properties = torch.cuda.get_device_properties(call.device)
    return _refusal(properties.major, properties.minor)


@functools.cache
def unusable() -> str | None:
    """Why no GPU of any kind can be used from here: the build or the driver; None if neither prevents it."""
    if not NATIVE_BUILT:
        return "the native module was not built; `AAPE_NATIVE=require pip install …` shows why"
    try:
        info = load().build_info()
    except ImportError as error:
        return f"the native module cannot be loaded: {error}"
    if "cuda" not in info["kernels"]:
        return "the native module was built without nvcc; `AAPE_CUDA=require pip install …` shows why"
    devices = load().cuda.devices()
    if not devices["driver"]:
        return "no NVIDIA driver was found"
    if devices["error"]:
        built, driver = _version(devices["runtime"]), _version(devices["driver"])
        return f"it was built with CUDA {built}, and the driver, for CUDA {driver}, says: {devices['error']}"
    return None


def _refusal(major: int, minor: int) -> str | None:
    why = unusable()
    if why is not None:
        return why
    architectures = load().build_info()["cuda_architectures"]
    if runs_on(architectures, major, minor):
        return None
    how = f"`AAPE_CUDA_ARCHS={major}{minor} pip install …` builds it for that"
    return f"it was built for {architectures}, the GPU has compute capability {major}.{minor}; {how}"


# Set by hand, as torch.compiler.assume_constant_result imports all of dynamo: tracing asks, and takes the answer.
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code for any of the `architectures`, "80-real,90" in CMake's notation, runs on a GPU of that capability.

    Machine code runs on its own generation from its minor version on, PTX on everything at least as new; either with
    an "a" on its own architecture only, with an "f" on its generation.
    """
    for entry in architectures.split(","):
        number, _, kind = entry.partition("-")
        own = divmod(int(number.rstrip("af")), 10)
        if number.endswith("a"):
            fits = own == (major, minor)
        elif number.endswith("f") or kind == "real":
            fits = own[0] == major and own[1] <= minor
        else:  # PTX, too: it runs wherever the machine code does
            fits = own <= (major, minor)
        if fits:
            return True
    return False


def _place(device: torch.device) -> tuple[int, int]:
    """Index of the device and its current stream; (0, 0) on the CPU, where the tests emulate a GPU."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _listening(weights: Weights) -> tuple[Tensor, ...]:
    """The encoder's weights and the projection, as the module takes them."""
    return weights.w1, weights.b1, weights.w2, weights.b2, weights.sblu_w


class CudaKernels(Kernels):
    """Every kernel of one call, through the native module."""

    most_states = 32  # lanes of a warp

    def _run(self, op: str, name: str, *arguments: Any) -> Any:
        """Call the module's `name` for this grid, on the device's current stream."""
        native, device = kernels(), self.x.device
        with self.on_device():
            try:
                return getattr(native, name)(self.x, sizes(self.grid, self.states), *arguments, _place(device))
            except RuntimeError as error:
                call = f"x {tuple(self.x.shape)} {self.x.dtype} on {device}, {self.states} states, {self.grid}"
                raise RuntimeError(f"aape::{op}, backend 'cuda': {error} ({call})") from error

    def _states(self, decay: Tensor, frequency: Tensor) -> list[Tensor]:
        """Both in the arithmetic's dtype and with the same strides."""
        wide = [decay.to(self.work), frequency.to(self.work)]
        return wide if wide[0].stride() == wide[1].stride() else [value.contiguous() for value in wide]

    def _planes(self, rows: Tensor | None) -> Tensor | None:
        """Rows (tokens, planes·S) as (B, N_f, N_t, planes, S)."""
        return None if rows is None else self.by_token(rows.unflatten(1, (-1, self.states)))

    def responses(
        self, decay: Tensor, frequency: Tensor, weight: Tensor, out: Tensor | None, ranges: LogitRanges | None = None,
        grad: Tensor | None = None, grad_y: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write features into rows `out`; given `grad`, rows of their cotangent, also write that of y into `grad_y`."""
        states, wide = self._states(decay, frequency), weight.to(self.work)
        (like, *_) = (rows for rows in (out, grad) if rows is not None)
        self._run(
            "sblu", "sblu", self.quadrature, ranges, *states, wide, self._planes(out),
            like.shape[1] // self.states, self._planes(grad), self._planes(grad_y),
        )  # fmt: skip

    def standardise(self, y: Tensor, out: Tensor | None, grad: Tensor | None = None) -> None:
        """Write features of y into rows `out`; given `grad`, rows of their cotangent, overwrite y with that of y."""
        (like, *_) = (rows for rows in (out, grad) if rows is not None)
        planes = [None if rows is None else rows.unflatten(1, (-1, self.states)) for rows in (out, grad)]
        self._run("embed", "standardise", like.shape[1] // self.states, y, *planes)

    def grad_states(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_decay: Tensor,
        grad_frequency: Tensor, y: Tensor | None, ranges: LogitRanges | None = None,
    ) -> None:  # fmt: skip
        """Write rows (tokens, S) of the gradients of decay and frequency, or of their logits, and y if given."""
        states, wide = self._states(decay, frequency), weight.to(self.work)
        out = self.by_token(grad_decay), self.by_token(grad_frequency)
        self._run(
            "sblu_backward", "sblu_backward_states", self.quadrature, ranges, grad, *states, wide,
            self._planes(y), *out,
        )  # fmt: skip

    def grad_weight(self, grad: Tensor, decay: Tensor, frequency: Tensor, ranges: LogitRanges | None = None) -> Tensor:
        """The gradient of the projection, (S, C·P_f), in the arithmetic's dtype."""
        programs = min(PARTIAL_SUMS, -(-self.rows // 16))
        partial = self.x.new_empty(programs, self.states, self.projected, dtype=self.work)
        states = self._states(decay, frequency)
        self._run(
            "sblu_backward", "sblu_backward_weight", self.quadrature, ranges, grad, *states, partial, programs,
        )  # fmt: skip
        return partial.sum(0)

    def grad_x(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_x: Tensor,
        ranges: LogitRanges | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """Write, or add to, the gradient of x (B, C, F, T), contiguous, by way of the windows of tokens or of tiles."""
        batch = self.x.shape[0]
        windows = self._windows()
        if windows is not None:
            done = self._pass(grad, decay, frequency, weight, ranges, windows=windows)
            if done is not None:
                self._sum(windows, grad_x, 1, self.grid.window, self.grid.offset, add)
                return
        tile = kernels().tile_tokens(self.x, sizes(self.grid, self.states), DTYPE_CODES[self.x.dtype])
        length, tiles = (tile - 1) * self.grid.stride[1] + self.grid.window, -(-self.n_t // tile)
        padded = -(-length // 8) * 8
        windows = self.x.new_empty(batch, self.n_f, tiles, self.projected, padded, dtype=self.work)
        states, wide = self._states(decay, frequency), weight.to(self.work)
        self._run(
            "sblu_backward", "sblu_backward_windows", self.quadrature, ranges, grad, *states, wide, windows,
        )  # fmt: skip
        self._sum(windows, grad_x, tile, length, self.grid.offset, add)

    def at_once(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, wanted: set[str]
    ) -> dict[str, Tensor]:
        """What tensor cores can give in one pass over x, of what is wanted."""
        if not wanted or self.x.dtype not in ON_TENSOR_CORES:
            return {}
        got: dict[str, Tensor] = {}
        gradients: tuple[Tensor, ...] = ()
        own = windows = None
        if "x" in wanted:
            got["x"] = self.x.new_empty(self.x.shape)
            own = self._windows_of(got["x"])
            windows = self._windows() if own is None else own
        if wanted & {"decay", "frequency"}:
            shape = (self.rows, self.states)
            got |= {name: self.x.new_empty(shape, dtype=self.work) for name in ("decay", "frequency")}
            gradients = self.by_token(got["decay"]), self.by_token(got["frequency"])
        partial = None
        if "x" not in wanted or windows is not None:
            partial = self._pass(grad, decay, frequency, weight, None, gradients, "weight" in wanted, windows)
        if partial is None:  # perhaps without x's
            return self.at_once(grad, decay, frequency, weight, wanted - {"x"}) if "x" in wanted else {}
        if "weight" in wanted:
            got["weight"] = partial.sum(0)
        if windows is not None and own is None:
            self._sum(windows, got["x"], 1, self.grid.window, self.grid.offset, add=False)
        return got

    def _pass(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, ranges: LogitRanges | None,
        gradients: tuple[Tensor, ...] = (), need_weight: bool = False, windows: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """One pass over x on tensor cores, which writes `gradients` of decay and frequency, and those of all windows,
        where given; the parts of the weight's gradient, empty if not needed. None if there is no such kernel."""
        programs = self._run("sblu_backward", "warp_sblu_programs", self.quadrature, grad, windows)
        if not programs:
            return None
        shape, leaves = (programs, self.states, self.projected), (*self._states(decay, frequency), weight)
        partial = self.x.new_empty(shape if need_weight else 0, dtype=self.work)
        self._run(
            "sblu_backward", "warp_sblu_backward", self.quadrature, ranges, grad, leaves,
            gradients or (None, None), partial if need_weight else None, windows,
        )  # fmt: skip
        return partial

    def _windows(self) -> Tensor | None:
        """For every token's part of x's gradient, (B, N_f, N_t, C·P_f, K); None if they would be much larger than x, or
        nothing could write them."""
        if self.x.dtype not in ON_TENSOR_CORES or self.grid.window > 2 * self.grid.stride[1]:
            return None
        shape = (self.x.shape[0], self.n_f, self.n_t, self.projected, self.grid.window)
        return self.x.new_empty(shape, dtype=self.work)

    def _windows_of(self, grad_x: Tensor) -> Tensor | None:
        """The same as a view of x's gradient, if no pixel is in two windows; what is in none is set to zero."""
        (patch_f, patch_t), (stride_f, stride_t), window = self.grid.patch, self.grid.stride, self.grid.window
        batch, channels, mel_bins, frames = grad_x.shape
        if channels > 1 or stride_f < patch_f or stride_t < window or window != patch_t:
            return None
        if (patch_f, window, mel_bins, frames) != (stride_f, stride_t, self.n_f * stride_f, self.n_t * stride_t):
            grad_x.zero_()
        shape = (batch, self.n_f, self.n_t, patch_f, window)
        return grad_x.as_strided(shape, (mel_bins * frames, stride_f * frames, stride_t, frames, 1))

    def overlap_add(self, windows: Tensor, grad_x: Tensor) -> None:
        """Sum the patches' gradients, rows (tokens, C·P_f·P_t) in the arithmetic's dtype, into that of x."""
        patches = self.by_token(windows.unflatten(1, (self.projected, -1)))
        self._sum(patches, grad_x, 1, self.grid.patch[1], 0, add=False)

    def _sum(self, windows: Tensor, grad_x: Tensor, tile: int, length: int, offset: int, add: bool) -> None:
        self._run("overlap_add", "overlap_add", windows, grad_x, tile, length, offset, add)

    def gather(self, out: Tensor) -> None:
        """Write the patches into rows (tokens, C·P_f·P_t) of any row stride."""
        self._run("gather", "gather", self.by_token(out))

    def prologue(self, weights: Weights, operand: Tensor, hidden: Tensor, r: Tensor, ranges: LogitRanges) -> None:
        """Write rows of the operand [patch | features], of hidden (tokens, H) and of r (tokens, 2S)."""
        planes = (operand.shape[1] - self.patch) // self.states
        before, after = (self.quadrature, self.time_major, ranges), (weights.hidden, planes)
        narrow, rows = _listening(weights), (operand, hidden, r)
        if self._run("embed", "warp_stem", *before, narrow, rows, *after):
            return
        wide = tuple(value.to(self.work) for value in narrow)
        self._run("embed", "stem", *before, wide, rows, *after)

    def tokens(self, weights: Weights, hidden: Tensor, r: Tensor, ranges: LogitRanges) -> Tensor | None:
        """All of it in one kernel, of patches of 16 × 16 and in dtypes that tensor cores are used for; else None."""
        dtype, sizes = weights.proj_w.dtype, (weights.hidden, weights.planes)
        size = self._run("embed", "warp_tokens_bytes", self.quadrature, DTYPE_CODES[dtype], *sizes, weights.dim)
        if not size:
            return None
        out = self.x.new_empty(self.rows, weights.dim, dtype=dtype)
        bias = None if weights.proj_b is None else weights.proj_b.contiguous()
        product = weights.proj_w.contiguous(), bias, weights.fusion_w.contiguous()
        packed = self.x.new_empty(size // 4, dtype=torch.float32)
        self._run(
            "embed", "warp_tokens", self.quadrature, self.time_major, ranges, _listening(weights),
            (out, hidden, r), *sizes, product, weights.dim, packed,
        )  # fmt: skip
        return out

    def adjoint(
        self, grad: Tensor, weights: Weights, hidden: Tensor, r: Tensor, ranges: LogitRanges, need_y: bool
    ) -> Adjoint | None:
        """The backward in one pass, if tensor cores can do it; else None."""
        units, planes = hidden.shape[1], grad.shape[1] // self.states
        end = self.patch + grad.shape[1]
        sector = 32 // grad.element_size()  # whole sectors of memory before and after
        active = -(-(end + 1) // sector) * sector
        operand = grad.new_empty(self.rows, -(-(active + units) // sector) * sector)
        programs = self._run("embed_backward", "warp_stem_programs", self.quadrature, operand, units, planes)
        if not programs:
            return None
        encoder = grad.new_empty(self.rows, 2 * self.states + units)
        grad_y = self.x.new_empty(self.rows, 2 * self.states, dtype=self.work) if need_y else None
        partial = self.x.new_empty(programs, self.states, self.projected, dtype=self.work)
        self._run(
            "embed_backward", "warp_stem_backward", self.quadrature, self.time_major, ranges,
            _listening(weights), (operand, hidden, r), units, planes, (grad, encoder, grad_y, partial), end, active,
        )  # fmt: skip
        return Adjoint(operand[:, : active + units], end, active, encoder, grad_y, partial)

    def gradients(self, parts: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
        """Each in its weight's dtype and shape, all in one launch."""
        alike = weights._asdict()
        got = {name: torch.empty_like(alike[name], memory_format=torch.contiguous_format) for name in parts}
        given = []
        for name, part in parts.items():
            part = part if part.dim() == 3 else part[None]
            given.append((part, got[name], tuple(part.shape)))
        if given:
            self._run("embed_backward", "gradients", tuple(given))
        return got


sblu, sblu_backward, embed, embed_backward = operations(CudaKernels)
