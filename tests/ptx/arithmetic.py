"""What instructions compute, exactly rounded where numpy does not do so by itself.

Values are arrays of the lanes, or numpy scalars where all lanes have the same.
"""

from typing import Any

import numpy as np

u16, u32, u64, i32, i64, f16, f32, f64 = (
    *(np.uint16, np.uint32, np.uint64, np.int32, np.int64),
    *(np.float16, np.float32, np.float64),
)
TINY = f32(2.0**-126)


def ftz(x: Any) -> Any:
    return np.where(np.abs(x) < TINY, np.copysign(f32(0), x), x)


def round_to_odd(s: Any, error: Any) -> Any:
    """``s + error`` in float64, rounded so that a second rounding is right."""
    bits = np.atleast_1d(s).view(u64).copy()
    error = np.atleast_1d(error)
    fix = (error != 0) & ((bits & u64(1)) == 0) & np.isfinite(np.atleast_1d(s))
    up = (error > 0) == (np.atleast_1d(s) > 0)
    bits[fix & up] += u64(1)
    bits[fix & ~up] -= u64(1)
    return bits.view(f64)


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def fma32(a: Any, b: Any, c: Any) -> Any:
    """Products are exact in float64, so only sums that float64 rounds to a tie of float32 need care."""
    p = np.multiply(a, b, dtype=f64)
    s = p + c
    risky = ((s.view(u64) & u64(0x1FFFFFFF)) == u64(0x10000000)) | ((np.abs(s) < 2.0**-125) & (s != 0))
    if risky.any():
        p, c = np.broadcast_arrays(p, np.asarray(c, f64))
        s[risky] = round_to_odd(*two_sum(p[risky], c[risky]))
    return s.astype(f32)


def _split(a: Any) -> tuple[Any, Any]:
    t = a * 134217729.0
    high = t - (t - a)
    return high, a - high


def fma64(a: Any, b: Any, c: Any) -> Any:
    """Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums"; plain where parts overflow or are not finite."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, f64) for x in (a, b, c)))
    uh = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    ul = ((ah * bh - uh) + ah * bl + al * bh) + al * bl
    th, tl = two_sum(c, ul)
    vh, vl = two_sum(uh, th)
    z = vh + round_to_odd(*two_sum(tl, vl)).reshape(np.shape(vh))
    plain = uh + c
    return np.where(np.isfinite(z) & np.isfinite(plain) & (np.abs(uh) > 1e-280), z, plain)


def int_div(a: Any, b: Any) -> Any:
    """C's division; by 0 all bits set, as the hardware does."""
    zero = b == 0
    b = np.where(zero, np.ones_like(b), b)
    return np.where(zero, np.asarray(-1).astype(a.dtype), (a - np.fmod(a, b)) // b)


def int_rem(a: Any, b: Any) -> Any:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, np.ones_like(b), b)))


def mul_hi(a: Any, b: Any) -> Any:
    kind, bits = a.dtype.kind, a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{kind}{2 * bits // 8}")
        return (np.multiply(a, b, dtype=wide) >> wide.type(bits)).astype(a.dtype)
    au, bu = np.asarray(a).astype(u64), np.asarray(b).astype(u64)
    m, s = u64(0xFFFFFFFF), u64(32)
    al, ah, bl, bh = au & m, au >> s, bu & m, bu >> s
    mid = ((al * bl) >> s) + ((ah * bl) & m) + ((al * bh) & m)
    high = ah * bh + ((ah * bl) >> s) + ((al * bh) >> s) + (mid >> s)
    if kind == "i":
        high = high - np.where(a < 0, bu, u64(0)) - np.where(b < 0, au, u64(0))
    return high.astype(a.dtype)


def bfe(a: Any, pos: Any, length: Any) -> Any:
    """Signed or unsigned by the dtype of ``a``."""
    bits = a.dtype.itemsize * 8
    pos, length = np.asarray(pos).astype(i64) & 255, np.asarray(length).astype(i64) & 255
    if a.dtype.kind == "u":
        mask = np.where(length >= 64, u64(2**64 - 1), (u64(1) << np.minimum(length, 63).astype(u64)) - u64(1))
        return ((a.astype(u64) >> np.minimum(pos, 63).astype(u64)) & mask).astype(a.dtype)
    up = np.clip(bits - pos - length, 0, bits - 1).astype(a.dtype)
    shifted = (a << up) >> np.minimum(up + np.minimum(pos, bits).astype(a.dtype), bits - 1).astype(a.dtype)
    return np.where(length == 0, a.dtype.type(0), shifted)


def bfi(a: Any, b: Any, pos: Any, length: Any) -> Any:
    mask = ((u64(1) << np.asarray(length).astype(u64)) - u64(1)) << np.asarray(pos).astype(u64)
    inserted = np.asarray(a).astype(u64) << np.asarray(pos).astype(u64)
    return ((np.asarray(b).astype(u64) & ~mask) | (inserted & mask)).astype(u32)


def prmt(a: Any, b: Any, selector: Any) -> Any:
    both = np.asarray(a).astype(u64) | (np.asarray(b).astype(u64) << u64(32))
    selector = np.asarray(selector).astype(u64)
    out = u64(0)
    for i in range(4):
        s = (selector >> u64(4 * i)) & u64(15)
        byte = (both >> ((s & u64(7)) * u64(8))) & u64(255)
        byte = np.where((s & u64(8)) != 0, np.where(byte & u64(128), u64(255), u64(0)), byte)
        out = out | (byte << u64(8 * i))
    return out.astype(u32)


def lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    out = u32(0)
    for i in range(8):
        if int(table) >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return out


def shf(direction: str, mode: str, low: Any, high: Any, amount: Any) -> Any:
    amount = np.asarray(amount).astype(u64)
    amount = amount & u64(31) if mode == "wrap" else np.minimum(amount, u64(32))
    both = np.asarray(low).astype(u64) | (np.asarray(high).astype(u64) << u64(32))
    return ((both << amount) >> u64(32) if direction == "l" else both >> amount).astype(u32)


def clz(a: Any) -> Any:
    bits = a.dtype.itemsize * 8
    return bits - sum((a >> a.dtype.type(i) != 0).astype(u32) for i in range(bits))


def brev(a: Any) -> Any:
    bits, one = a.dtype.itemsize * 8, a.dtype.type(1)
    return sum(((a >> a.dtype.type(i)) & one) << a.dtype.type(bits - 1 - i) for i in range(bits)).astype(a.dtype)


def bf16_bits(x: Any) -> Any:
    """float32 to the bits of bfloat16, to nearest even."""
    x = np.asarray(x, f32)
    bits = x.view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return np.where(np.isnan(x), u16(0x7FFF), rounded)


def from_bf16(bits: Any) -> Any:
    return (np.asarray(bits).astype(u32) << u32(16)).view(f32)


def float_to_int(x: Any, target: type, rounding: np.ufunc) -> Any:
    """Saturating; NaN gives 0."""
    x = rounding(np.asarray(x).astype(f64))
    info = np.iinfo(target)
    high = x >= float(info.max)
    low = x <= float(info.min)
    out = np.where(np.isnan(x) | high | low, 0, x).astype(target)
    return np.where(high, target(info.max), np.where(low, target(info.min), out))


def minimum(a: Any, b: Any) -> Any:
    """-0 is below +0, NaN is missing."""
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), a, b), np.fmin(a, b))


def maximum(a: Any, b: Any) -> Any:
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), b, a), np.fmax(a, b))
