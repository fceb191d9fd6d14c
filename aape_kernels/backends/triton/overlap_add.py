"""Overlap-add: every pixel's sum over the windows that hold it, the gradient of cutting windows out of x."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("n_f", "n_t", "lines", "mel_bins", "frames"))
def overlap_add_kernel(
    p_windows, p_x, n_f, n_t, lines, mel_bins, frames,
    C: tl.constexpr, P_F: tl.constexpr, S_F: tl.constexpr, K: tl.constexpr, S_T: tl.constexpr, OFFSET: tl.constexpr,
    TIME_MAJOR: tl.constexpr, ADD: tl.constexpr, BL: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """x[b, c, f, t] = Σ_i Σ_j windows[b, i, j, c, f − i S_F, t − j S_T − OFFSET], in the order of i and j.

    windows (tokens, C, P_F, K) -> x (B, C, F, T) contiguous, B · C · F lines; a program has BL lines by BT frames.
    ADD adds to x.
    """
    # one axis for both, as the others have 65,535 programs at the most, which 23 hours of frames would exceed
    line_blocks = tl.cdiv(lines, BL)
    line = tl.program_id(0) % line_blocks * BL + tl.arange(0, BL)[:, None]
    t = tl.program_id(0) // line_blocks * BT + tl.arange(0, BT)[None, :]
    f, c, b = line % mel_bins, line // mel_bins % C, (line // mel_bins // C).to(tl.int64)
    inside = (line < lines) & (t < frames)
    total = tl.zeros([BL, BT], tl.float32)
    # Counted upwards: with Triton 3.6 ptxas turns "j − 0", in 64 bits, into j − 2³² on an H200.
    first_i, first_j = f // S_F - (P_F - 1) // S_F, (t - OFFSET) // S_T - (K - 1) // S_T
    for step_i in range((P_F - 1) // S_F + 1):
        i = first_i + step_i
        p = f - i * S_F
        m_line = (i >= 0) & (i < n_f) & (p < P_F)
        for step_j in range((K - 1) // S_T + 1):
            j = first_j + step_j
            k = t - OFFSET - j * S_T
            if TIME_MAJOR:
                token = (b * n_t + j) * n_f + i
            else:
                token = (b * n_f + i) * n_t + j
            mask = inside & m_line & (j >= 0) & (j < n_t) & (k >= 0) & (k < K)
            total += tl.load(p_windows + ((token * C + c) * P_F + p) * K + k, mask=mask, other=0.0)
    o_x = line.to(tl.int64) * frames + t
    if ADD:
        total += tl.load(p_x + o_x, mask=inside, other=0.0)
    tl.store(p_x + o_x, total, mask=inside)
