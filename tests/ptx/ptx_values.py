"""What PTX instructions compute, of arrays with an element a thread; what warps do together, of whole warps."""

from __future__ import annotations

import numpy as np

WARP = 32
VALUE_TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.int32, "u32": np.uint32, "s32": np.int32, "b64": np.int64, "u64": np.uint64,
    "s64": np.int64, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
Array = np.ndarray


class KernelError(Exception):
    """Something that a kernel must not do."""


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Rounded to double on the way, which is exact but in one of 2²⁹ cases, where it is off by one ulp."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """The product and the sum with their rounding errors, which Dekker's splitting and Knuth's sum find exactly."""

    def split(value: Array) -> tuple[Array, Array]:
        far = value * 134217729.0
        high = far - (far - value)
        return high, value - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    total = product + c
    shifted = total - product
    error = error + ((product - (total - shifted)) + (c - shifted))
    exact = total + error
    return np.where(np.isfinite(exact), exact, total)


def to_bfloat16(value: Array) -> Array:
    """To nearest, ties to even; NaN is 0x7FFF."""
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: Array) -> Array:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_float16(value: Array) -> Array:
    return np.asarray(value, np.float32).astype(np.float16).view(np.uint16)


def from_float16(bits: Array) -> Array:
    return np.asarray(bits).view(np.float16).astype(np.float32)


def pack_bfloat16(upper: Array, lower: Array) -> Array:
    return pack(to_bfloat16(lower), to_bfloat16(upper), np.int32)


def pack(low: Array, high: Array, to: type) -> Array:
    """Two registers as the halves of one."""
    half = np.dtype(to).itemsize // 2
    unsigned, wide = np.dtype(f"u{half}"), np.dtype(f"u{2 * half}")
    low, high = np.asarray(low).view(unsigned).astype(wide), np.asarray(high).view(unsigned).astype(wide)
    return (low | high << wide.type(8 * half)).view(to)


def unpack(value: Array, upper: bool, to: type) -> Array:
    half = np.dtype(to).itemsize
    unsigned, wide = np.dtype(f"u{half}"), np.dtype(f"u{2 * half}")
    value = np.asarray(value).view(wide)
    return (value >> wide.type(8 * half * upper)).astype(unsigned).view(to)


def flush(value: Array) -> Array:
    """Subnormal numbers are zero, with their sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def exp2(value: Array) -> Array:
    return flush(np.exp2(flush(value).astype(np.float64)).astype(np.float32))


def reciprocal(value: Array) -> Array:
    return flush(np.float32(1) / flush(value))


def to_integer(value: Array, to: type) -> Array:
    """Towards zero, at most the type's range; of NaN zero."""
    info, value = np.iinfo(to), np.asarray(value)
    whole = np.trunc(value.astype(np.float64))
    inside = (whole >= float(info.min)) & (whole < float(info.max) + 1)
    kept = np.where(inside, whole, 0).astype(to)
    return np.where(inside | np.isnan(whole), kept, np.where(whole > 0, to(info.max), to(info.min)))


def divide(a: Array, b: Array) -> Array:
    """Of integers, towards zero."""
    if not np.all(b):
        raise KernelError("an integer divided by zero")
    quotient = np.abs(a) // np.abs(b)
    return quotient if np.asarray(a).dtype.kind == "u" else np.where((a < 0) != (b < 0), -quotient, quotient)


def remainder(a: Array, b: Array) -> Array:
    if not np.all(b):
        raise KernelError("an integer divided by zero")
    return np.fmod(a, b)


def shift_left(value: Array, by: Array) -> Array:
    bits = 8 * np.asarray(value).dtype.itemsize
    by = np.asarray(by).view(np.uint32)
    kept = value << np.minimum(by, bits - 1).astype(np.asarray(value).dtype)
    return np.where(by >= bits, np.asarray(value).dtype.type(0), kept)


def shift_right(value: Array, by: Array) -> Array:
    """Signed numbers keep their sign."""
    dtype = np.asarray(value).dtype
    bits, by = 8 * dtype.itemsize, np.asarray(by).view(np.uint32)
    kept = value >> np.minimum(by, bits - 1).astype(dtype)
    return kept if dtype.kind == "i" else np.where(by >= bits, dtype.type(0), kept)


def insert_bits(bits: Array, into: Array, start: int, length: int) -> Array:
    mask = np.uint32(((1 << length) - 1) << start & 0xFFFFFFFF)
    bits, into = np.asarray(bits).view(np.uint32), np.asarray(into).view(np.uint32)
    return ((into & ~mask) | (bits << np.uint32(start) & mask)).view(np.int32)


def permute_bytes(a: Array, b: Array, selector: int) -> Array:
    both = pack(a, b, np.int64).view(np.uint64)
    out = np.uint32(0)
    for place in range(4):
        choice = selector >> 4 * place & 15
        if choice > 7:
            raise KernelError(f"prmt of a sign, selector {selector:#x}")
        byte = (both >> np.uint64(8 * choice)).astype(np.uint32) & np.uint32(0xFF)
        out = out | byte << np.uint32(8 * place)
    return out.view(np.int32)


def by_warp(value: Array, lanes: Array) -> Array:
    """(warps, 32) of what each active thread has."""
    return np.broadcast_to(value, lanes.shape).reshape(-1, WARP)


def shuffle_xor(value: Array, lanes: Array, distance: int) -> Array:
    return by_warp(value, lanes)[:, np.arange(WARP) ^ distance].ravel()


def shuffle(value: Array, lanes: Array, source: Array) -> Array:
    return np.take_along_axis(by_warp(value, lanes), by_warp(source, lanes) % WARP, 1).ravel()


def floats(pairs: Array) -> Array:
    """(warps, 8, 8) out of a register whose lane 4g + c has columns 2c and 2c + 1 of row g."""
    return from_bfloat16(np.ascontiguousarray(pairs).view(np.uint16)).reshape(-1, 8, 8)


def left_bf16(lanes: Array, *registers: Array) -> Array:
    """(warps, 16, 16)."""
    a, b, c, d = (floats(by_warp(each, lanes)) for each in registers)
    return np.concatenate([np.concatenate([a, c], 2), np.concatenate([b, d], 2)], 1)


def right_bf16(lanes: Array, *registers: Array) -> Array:
    """(warps, 16, 8): the registers hold columns, two rows in each."""
    return np.concatenate([floats(by_warp(each, lanes)) for each in registers], 2).transpose(0, 2, 1)


def tf32(bits: Array, lanes: Array) -> Array:
    """(warps, 8, 4) out of a register whose lane 4g + c has place c of g: the last 13 bits do not count."""
    kept = np.ascontiguousarray(by_warp(bits, lanes)).view(np.uint32) & np.uint32(0xFFFFE000)
    return kept.view(np.float32).reshape(-1, 8, 4)


def left_tf32(lanes: Array, *registers: Array) -> Array:
    """(warps, 16, 8)."""
    a, b, c, d = (tf32(each, lanes) for each in registers)
    return np.concatenate([np.concatenate([a, c], 2), np.concatenate([b, d], 2)], 1)


def right_tf32(lanes: Array, *registers: Array) -> Array:
    """(warps, 8, 8): the registers hold columns, a row in each."""
    return np.concatenate([tf32(each, lanes) for each in registers], 2).transpose(0, 2, 1)


def towards_zero(value: Array) -> Array:
    """To float32, as tensor cores round."""
    nearest = value.astype(np.float32)
    return np.where(np.abs(nearest.astype(np.float64)) > np.abs(value), np.nextafter(nearest, np.float32(0)), nearest)


def multiply(lanes: Array, left: Array, right: Array, *sums: Array) -> list[Array]:
    """Sums of exact products, in an order that PTX leaves open, rounded once."""
    product = (left.astype(np.float64) @ right.astype(np.float64)).reshape(-1, 2, 8, 4, 2)
    # upper and lower eight rows, row, pair of columns, column
    parts = [product[:, half, :, :, column].reshape(-1) for half in (0, 1) for column in (0, 1)]
    return [towards_zero(part + each) for part, each in zip(parts, sums, strict=True)]


def transpose(pairs: Array, lanes: Array) -> Array:
    halves = np.ascontiguousarray(by_warp(pairs, lanes)).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(halves.transpose(0, 2, 1)).view(np.int32).ravel()
