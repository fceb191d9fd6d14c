"""A golden stem's outputs with 40 digits, by mpmath and central differences, apart from the product and from float64.

    python tests/data/precise.py tests/data/stem-both-quiet.npz        rewrites tokens and gradients

`stem-both-quiet` needs it: as it came it had been computed with log(|y|² + ε²), whose rounding in float64 is 5e-12 of
the tokens, more than the 1e-12 that float64 is held to (docs/maths.md §6). The others agree to 1e-15 as they came.
"""

import sys

import mpmath as mp
import numpy as np

mp.mp.dps = 40
STEP = mp.mpf(10) ** -15
INPUTS = ("x", "proj_w", "proj_b", "w1", "b1", "w2", "b2", "sblu_w", "fusion_w")


def exact(values):
    return np.vectorize(lambda value: mp.mpf(float(value)), otypes=[object])(values)


def sigmoid(value):
    return 1 / (1 + mp.exp(-value))


def response(u, decay, frequency, kernel):
    """y of one window u (K) of one state, the direct sum."""
    lam = mp.mpc(decay, frequency)
    gain, window = 2 * mp.sinh(lam / 2) / lam, len(u)
    re = im = mp.mpf(0)
    for k in range(window):
        d = mp.mpf(2 * k - (window - 1)) / 2
        h = gain * mp.exp(-lam * abs(d))
        sign = (d > 0) - (d < 0) if kernel == "quadrature" else 1
        re, im = re + h.real * u[k], im + sign * h.imag * u[k]
    return re, im


def tokens(p, stride, window, kernel, decay, band):
    """(B, N_f · N_t, D), frequency-major."""
    x, patch = p["x"], p["proj_w"].shape[2:]
    n_f, n_t = ((size - q) // s + 1 for size, q, s in zip(x.shape[2:], patch, stride, strict=True))
    states, offset = len(p["sblu_w"]), (patch[1] - window) // 2
    out = []
    for clip in x:
        for i in range(n_f):
            for j in range(n_t):
                rows = clip[:, i * stride[0] : i * stride[0] + patch[0]]
                pixels = rows[:, :, j * stride[1] : j * stride[1] + patch[1]].ravel()
                hidden = p["w1"].reshape(len(p["w1"]), -1) @ pixels + p["b1"]
                r = p["w2"] @ np.array([h * sigmoid(h) for h in hidden]) + p["b2"]
                alpha = [decay[0] * mp.exp(mp.log(decay[1] / decay[0]) * sigmoid(v)) for v in r[:states]]
                omega = [band[0] + (band[1] - band[0]) * sigmoid(v) for v in r[states:]]
                times = range(j * stride[1] + offset, j * stride[1] + offset + window)
                y = []
                for s in range(states):
                    u = [(p["sblu_w"][s] * rows[:, :, t]).sum() if 0 <= t < x.shape[3] else mp.mpf(0) for t in times]
                    y.append(response(u, alpha[s], omega[s], kernel))
                level = np.array([mp.log(1 + 100 * (re**2 + im**2)) / 2 for re, im in y])
                centred = level - level.sum() / states
                n = centred / mp.sqrt((centred**2).sum() / states + mp.mpf("1e-5"))
                plane = [np.array([re for re, _ in y]), np.array([im for _, im in y]), n]
                planes = {1: plane[2:], 2: plane[:2], 3: plane}[p["fusion_w"].shape[1]]
                token = p["proj_w"].reshape(len(p["proj_w"]), -1) @ pixels + p.get("proj_b", 0)
                out.append(token + sum(p["fusion_w"][:, k] @ value for k, value in enumerate(planes)))
    return np.array(out).reshape(len(x), n_f * n_t, -1)


def main(path):
    data = dict(np.load(path))
    p = {name: exact(data[name]) for name in INPUTS if name in data}
    decay, band = (exact(data[name]) for name in ("decay", "band"))
    options = (tuple(data["stride"]), int(data["window"]), str(data["kernel"]), decay, band)
    cotangent = exact(data["cotangent"])
    data["tokens"] = tokens(p, *options).astype(np.float64)
    for name, value in p.items():
        gradient = np.empty(value.shape, dtype=object)
        for at in np.ndindex(value.shape):
            kept, ends = value[at], []
            for step in (STEP, -STEP):
                value[at] = kept + step
                ends.append((tokens(p, *options) * cotangent).sum())
            value[at] = kept
            gradient[at] = (ends[0] - ends[1]) / (2 * STEP)
        data[f"grad_{name}"] = gradient.astype(np.float64)
    np.savez(path, **data)


if __name__ == "__main__":
    main(sys.argv[1])
