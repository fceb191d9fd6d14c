"""From tensors to Triton's kernels: sizes, blocks, launches on the current stream of x's device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ...geometry import PatchGrid
from ...ranges import LogitRanges
from ...weights import Weights
from ..fused import PARTIAL_SUMS, Kernels, operations
from . import interpreted
from .configurations import Configuration, configuration
from .magnitudes import standardise_kernel
from .overlap_add import overlap_add_kernel
from .sblu_kernels import sblu_bwd_state_kernel, sblu_bwd_weight_kernel, sblu_bwd_window_kernel, sblu_fwd_kernel
from .stem_kernels import gather_kernel, stem_fwd_kernel

__all__ = ["embed", "embed_backward", "sblu", "sblu_backward"]

# Lines and frames per program of the overlap-add.
OVERLAP_BLOCK = (8, 128)
# Elements of a patch that the encoder's products take at once, of 16 bits and loaded by 16 bytes half as many, as more
# would spill registers; and hidden units.
PATCH_BLOCK, PACKED_BLOCK = 32, 16
HIDDEN_BLOCK = 16
# Most states that a program holds at once, and elements per program of the separate pass that standardises more.
STATE_BLOCK = 64
STANDARDISE_BLOCK = 1024


def _precision(device: torch.device) -> str:
    """TF32 only where the caller has allowed it, by either of torch's ways: this one knows of both."""
    return "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _narrow(a: Tensor, b: Tensor) -> bool:
    """Whether a product of the two can take its 16-bit operands as they are; the interpreter's goes wrong with them."""
    return a.dtype == b.dtype and a.dtype != torch.float32 and not interpreted()


def _alignment(x: Tensor, grid: PatchGrid) -> int:
    """How many frames of every patch can be loaded in one access: those of 16 bytes, or one."""
    frames = 16 // x.element_size()
    steps = (*x.stride()[:3], grid.patch[1], grid.stride[1])
    return frames if x.stride(3) == 1 and all(step % frames == 0 for step in steps) else 1


def _given(instead: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with `instead` for missing ones: kernels get it but do not look at it."""
    return [instead if value is None else value for value in tensors]


def _row_strides(*tensors: Tensor | None) -> list[int]:
    return [0 if value is None else value.stride(0) for value in tensors]


def _power_of_2(n: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (n - 1).bit_length()))


class TritonKernels(Kernels):
    """Every kernel of one call, with the grid's sizes and the blocks that follow from them."""

    most_states = STATE_BLOCK

    def __init__(self, x: Tensor, states: int, grid: PatchGrid, quadrature: bool, time_major: bool) -> None:
        super().__init__(x, states, grid, quadrature, time_major)
        # products need 16 of everything; below that, multiply-adds
        self.dot = self.projected >= 16
        self.block_states = _power_of_2(states, 16 if self.dot else 1, STATE_BLOCK)
        self.block_rows = 1 if not self.dot else 32 if self.projected % 32 == 0 else 16
        self.sizes: dict[str, Any] = {
            "S": states,
            "R": self.projected,
            "K": grid.window,
            "QUADRATURE": quadrature,
            "TIME_MAJOR": time_major,
            "BS": self.block_states,
            "DOT": self.dot,
            "PRECISION": _precision(x.device),
        }
        self.window: dict[str, Any] = {
            "P_F": grid.patch[0],
            "S_F": grid.stride[0],
            "S_T": grid.stride[1],
            "OFFSET": grid.offset,
            "WITHIN": grid.offset >= 0,  # windows inside their patches need no check against the clip's ends
        }
        self.state_blocks = triton.cdiv(states, self.block_states)
        self.counts = (self.rows, self.n_f, self.n_t)

    def launch(
        self, name: str, kernel: Any, programs: Callable[[int], tuple[int, ...]], *arguments: Any, **sizes: Any
    ) -> None:
        """Run a kernel on the grid that `programs` gives for a block of tokens."""
        # of 16 states, what 16 tokens give is one warp's on tensor cores: others would compute the same once more, and
        # with more tokens it would spill registers
        few = sizes.get("DOT", False) and sizes["BS"] <= 16
        share = 1 if not few else 4 if sizes.get("NARROW") else 2

        def run(chosen: Configuration) -> None:
            warps = max(1, chosen.num_warps // share)
            tokens = min(chosen.tokens, 16 * warps) if few else chosen.tokens
            kernel[programs(tokens)](*arguments, **sizes, BN=tokens, num_warps=warps, num_stages=chosen.num_stages)

        dtypes = "-".join(str(value.dtype).removeprefix("torch.") for value in arguments if isinstance(value, Tensor))
        key = " ".join([*(f"{k}={v}" for k, v in sizes.items()), dtypes])
        narrow = bool(sizes.get("NARROW")) and self.block_states <= 32
        with self.on_device():
            run(configuration(name, self.rows, key, self.x.device, run, narrow))

    def responses(
        self, decay: Tensor, frequency: Tensor, weight: Tensor, out: Tensor | None, ranges: LogitRanges | None = None,
        grad: Tensor | None = None, grad_y: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write features into rows `out`; given `grad`, their cotangent, write that of y into `grad_y` (tokens, 2S)."""
        self.launch(
            "sblu_fwd",
            sblu_fwd_kernel,
            lambda tokens: (triton.cdiv(self.rows, tokens), self.state_blocks),
            self.x, decay, frequency, weight, *_given(self.x, out, grad, grad_y), *self.counts, self.x.shape[3],
            *self.x.stride(), *decay.stride(), *_row_strides(out, grad), *(ranges or (0.0,) * 4),
            **self.sizes, **self.window, **self.planes(out, grad),
            RANGES=ranges is not None, BR=self.block_rows, NARROW=_narrow(self.x, weight),
        )  # fmt: skip

    def planes(self, out: Tensor | None, grad: Tensor | None) -> dict[str, Any]:
        """What a kernel must know about rows of features and of their cotangent."""
        rows = out if grad is None else grad
        assert rows is not None
        return {"PLANES": rows.shape[1] // self.states, "OUT": out is not None, "GRAD": grad is not None}

    def standardise(self, y: Tensor, out: Tensor | None, grad: Tensor | None = None) -> None:
        """Write features of y (tokens, 2S) into rows `out`; given `grad`, their cotangent, replace y by that of y."""
        block = triton.next_power_of_2(self.states)
        tokens = max(1, STANDARDISE_BLOCK // block)
        with self.on_device():
            standardise_kernel[(triton.cdiv(self.rows, tokens),)](
                y, *_given(y, out, grad), self.rows, *_row_strides(out, grad), S=self.states,
                **self.planes(out, grad), BN=tokens, BS=block, num_warps=_power_of_2(block // 256, 4, 16),
            )  # fmt: skip

    def grad_states(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_decay: Tensor,
        grad_frequency: Tensor, y: Tensor | None, ranges: LogitRanges | None = None,
    ) -> None:  # fmt: skip
        """Write rows (tokens, S) of the gradients of decay and frequency, or of their logits, and y if given."""
        self.launch(
            "sblu_bwd_state",
            sblu_bwd_state_kernel,
            lambda tokens: (triton.cdiv(self.rows, tokens), self.state_blocks),
            grad, self.x, decay, frequency, weight, grad_decay, grad_frequency, grad_decay if y is None else y,
            *self.counts, self.x.shape[3], *self.x.stride(), *decay.stride(), *grad.stride(),
            grad_decay.stride(0), 0 if y is None else y.stride(0), *(ranges or (0.0,) * 4),
            **self.sizes, **self.window,
            RANGES=ranges is not None, RESPONSES=y is not None, BR=self.block_rows, NARROW=_narrow(self.x, weight),
        )  # fmt: skip

    def grad_weight(self, grad: Tensor, decay: Tensor, frequency: Tensor, ranges: LogitRanges | None = None) -> Tensor:
        """The gradient of the projection, (S, R) in float32."""
        block = _power_of_2(self.projected, 16, 64) if self.dot else 1
        programs = min(PARTIAL_SUMS, triton.cdiv(self.rows, 16))
        partial = self.x.new_empty(programs, self.states, self.projected, dtype=torch.float32)
        self.launch(
            "sblu_bwd_weight",
            sblu_bwd_weight_kernel,
            lambda _: (programs, self.state_blocks, triton.cdiv(self.projected, block)),
            grad, self.x, decay, frequency, partial, *self.counts, self.x.shape[3], *self.x.stride(),
            *decay.stride(), *grad.stride(), *(ranges or (0.0,) * 4),
            **self.sizes, **self.window, RANGES=ranges is not None, BR=block, NARROW=False,
        )  # fmt: skip
        return partial.sum(0)

    def grad_x(
        self, grad: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, grad_x: Tensor,
        ranges: LogitRanges | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        """Write, or add to, the gradient of x (B, C, F, T), contiguous, by way of every token's window."""
        windows = self.x.new_empty(self.rows, self.projected, self.grid.window, dtype=torch.float32)
        self.launch(
            "sblu_bwd_window",
            sblu_bwd_window_kernel,
            lambda tokens: (triton.cdiv(self.rows, tokens), triton.cdiv(self.projected, self.block_rows)),
            grad, decay, frequency, weight, windows, *self.counts, *decay.stride(), *grad.stride(),
            *(ranges or (0.0,) * 4), **self.sizes, RANGES=ranges is not None, BR=self.block_rows,
        )  # fmt: skip
        self.sum_windows(windows, grad_x, self.grid.window, add)

    def sum_windows(self, windows: Tensor, grad_x: Tensor, length: int, add: bool) -> None:
        """Sum windows (tokens, R, length) into x's gradient; `length` frames are centred on the patch."""
        channels, mel_bins, frames = grad_x.shape[1:]
        lines = grad_x.shape[:3].numel()
        block_lines, block_frames = OVERLAP_BLOCK
        with self.on_device():
            overlap_add_kernel[(triton.cdiv(lines, block_lines) * triton.cdiv(frames, block_frames),)](
                windows, grad_x, self.n_f, self.n_t, lines, mel_bins, frames,
                C=channels, P_F=self.grid.patch[0], S_F=self.grid.stride[0], K=length, S_T=self.grid.stride[1],
                OFFSET=(self.grid.patch[1] - length) // 2, TIME_MAJOR=self.time_major, ADD=add,
                BL=block_lines, BT=block_frames,
            )  # fmt: skip

    def gather(self, out: Tensor) -> None:
        """Write the patches into rows (tokens, C · P_f · P_t) of any row stride."""
        block = _power_of_2(self.patch, 16, 64)
        self.launch(
            "gather",
            gather_kernel,
            lambda tokens: (triton.cdiv(self.rows, tokens), triton.cdiv(self.patch, block)),
            self.x, out, *self.counts, *self.x.stride(), out.stride(0),
            P_F=self.grid.patch[0], P_T=self.grid.patch[1], E=self.patch, S_F=self.grid.stride[0],
            S_T=self.grid.stride[1], TIME_MAJOR=self.time_major, BE=block, ALIGN=_alignment(self.x, self.grid),
        )  # fmt: skip

    def overlap_add(self, windows: Tensor, grad_x: Tensor) -> None:
        """Sum patches as windows of P_t frames."""
        self.sum_windows(windows, grad_x, self.grid.patch[1], add=False)

    def prologue(self, weights: Weights, operand: Tensor, hidden: Tensor, r: Tensor, ranges: LogitRanges) -> None:
        """Write the operand [patch | features], hidden and r."""
        _, _, w1, b1, w2, b2, weight, _ = weights
        width, align = weights.hidden, _alignment(self.x, self.grid)
        block = PACKED_BLOCK if align == 8 else PATCH_BLOCK
        self.launch(
            "stem_fwd",
            stem_fwd_kernel,
            lambda tokens: (triton.cdiv(self.rows, tokens), self.state_blocks),
            self.x, w1, b1, w2, b2, weight, operand, hidden, r, *self.counts, self.x.shape[3], *self.x.stride(),
            *ranges, **self.sizes, **self.window,
            H=width, P_T=self.grid.patch[1], BR=self.block_rows, BH=_power_of_2(width, 16, 2**20), BE=block,
            BK=HIDDEN_BLOCK, WIDTH=operand.stride(0), PLANES=(operand.shape[1] - self.patch) // self.states,
            NARROW_W1=_narrow(self.x, w1), NARROW=_narrow(self.x, weight), ALIGN=align,
        )  # fmt: skip


sblu, sblu_backward, embed, embed_backward = operations(TritonKernels)
