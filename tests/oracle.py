"""The quoted formulas written a second time, apart from the product: complex128, one token and one frame at a time.

Slow and obvious on purpose; autograd differentiates it. Not for |Λ| near 0, where the plain gain cancels (the golden
cases cover that).
"""

import math

import torch
from torch import Tensor


def sblu(x: Tensor, decay: Tensor, frequency: Tensor, weight: Tensor, patch, stride, window, kernel) -> Tensor:
    lam = torch.complex(decay, frequency)  # [B, N_f, N_t, S]
    gain = 2 * torch.sinh(lam / 2) / lam
    rows = []
    for i in range(decay.shape[1]):
        bins = slice(i * stride[0], i * stride[0] + patch[0])
        row = []
        for j in range(decay.shape[2]):
            centre = j * stride[1] + (patch[1] - 1) / 2
            g, la = gain[:, i, j], lam[:, i, j]  # [B, S]
            re = im = torch.zeros_like(decay[:, i, j])
            for k in range(window):
                d = k - (window - 1) / 2
                t = centre + d
                assert t == int(t)
                if not 0 <= t < x.shape[3]:
                    continue
                u = torch.einsum("bcp,scp->bs", x[:, :, bins, int(t)], weight)
                h = g * torch.exp(-la * abs(d))
                if kernel == "quadrature":
                    h = torch.complex(h.real, torch.zeros_like(h.real)) if d == 0 else h if d > 0 else h.conj()
                re, im = re + h.real * u, im + h.imag * u
            row.append(torch.stack([re, im], dim=1))
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def features(y: Tensor, planes: int) -> Tensor:
    """What of one token's y (B, 2, S) reaches it: n with 1 plane, y with 2, both with 3."""
    energy = torch.complex(y[:, 0], y[:, 1]).abs().square()
    level = torch.log1p(100 * energy) / 2
    spread = torch.sqrt(torch.var(level, dim=1, correction=0, keepdim=True) + 1e-5)
    n = (level - level.sum(1, keepdim=True) / y.shape[2]) / spread
    return {1: n.unsqueeze(1), 2: y, 3: torch.cat([y, n.unsqueeze(1)], 1)}[planes]


def embed(x, proj_w, proj_b, w1, b1, w2, b2, sblu_w, fusion_w, stride, window, kernel, decay, band) -> Tensor:
    """Frequency-major tokens of x (B, C, F, T), one patch at a time."""
    patch = tuple(proj_w.shape[2:])
    n_f, n_t = ((size - p) // s + 1 for size, p, s in zip(x.shape[2:], patch, stride, strict=True))
    states = sblu_w.shape[0]

    def patch_at(i, j):
        return x[:, :, i * stride[0] : i * stride[0] + patch[0], j * stride[1] : j * stride[1] + patch[1]]

    def logits(i, j):
        hidden = torch.einsum("bcpt,hcpt->bh", patch_at(i, j), w1) + b1
        return torch.einsum("bh,rh->br", hidden / (1 + torch.exp(-hidden)), w2) + b2

    r = torch.stack([torch.stack([logits(i, j) for j in range(n_t)], 1) for i in range(n_f)], 1)
    share = 1 / (1 + torch.exp(-r))
    alpha = decay[0] * (decay[1] / decay[0]) ** share[..., :states]
    omega = band[0] + (band[1] - band[0]) * share[..., states:]
    y = sblu(x, alpha, omega, sblu_w, patch, stride, window, kernel)
    tokens = []
    for i in range(n_f):
        for j in range(n_t):
            token = torch.einsum("bcpt,dcpt->bd", patch_at(i, j), proj_w)
            token = token + torch.einsum("bks,dks->bd", features(y[:, i, j], fusion_w.shape[1]), fusion_w)
            tokens.append(token if proj_b is None else token + proj_b)
    return torch.stack(tokens, 1)


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖; 0 where both are 0."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    difference = torch.linalg.vector_norm(got - want).item()
    return difference / torch.linalg.vector_norm(want).item() if difference else 0.0


def bound(dtype: torch.dtype, whole_stem: bool = False, gradient: bool = False) -> float:
    """The relative error that docs/maths.md §6 allows."""
    table = {
        torch.float64: (1e-12, 1e-11, 1e-12, 1e-11),
        torch.float32: (2e-6, 1e-5, 1e-5, 3e-5),
        torch.bfloat16: (4e-3, 1e-2, 4e-3, 1e-2),
        torch.float16: (5e-4, 2e-3, 5e-4, 2e-3),
    }
    return table[dtype][2 * whole_stem + gradient]


def default_ranges(window: int, stride_t: int) -> tuple[tuple[float, float], tuple[float, float]]:
    return (1 / window, 2.0), (math.pi / stride_t, math.pi)
