"""The work on one tile: its place in the pyramid, addressing in any layout, receptive-token projections, masks.

A launch covers all levels of a pyramid. What differs from level to level (addresses, lengths, strides) comes as a tuple with an
entry per level, or as the entry itself where there is one level; a program finds its level and picks its own. A tile is
``[BLOCK_C, BLOCK_P]`` of a feature map, channels by pixels. Strides come as ``quotient * ALIGN`` with a constexpr ``ALIGN``
(what 16-byte accesses need, or 1), which tells the compiler how wide an access may be at sizes that 16 does not divide.
"""

import triton
import triton.language as tl

PIXELS, CHANNELS = 0, 1  # the axis along which a tensor is contiguous


@triton.jit
def pick(values, level, LEVELS: tl.constexpr):
    """``values[level]`` of addresses, which keep what is known of their alignment."""
    if LEVELS == 1:
        value = values
    else:
        value = values[0]
        for i in tl.static_range(1, LEVELS):
            value = tl.where(level == i, values[i], value)
    return value


@triton.jit
def pick_int(values, level, LEVELS: tl.constexpr):
    """``values[level]`` of a `launch.table`."""
    if LEVELS == 1:  # not by pick: calls are what the interpreter takes longest for
        value = values
    else:
        value = values[0]
        for i in tl.static_range(1, LEVELS):
            value = tl.where(level == i, values[i], value)
    return (value >> 1) - 1


@triton.jit
def find_level(program, first, LEVELS: tl.constexpr):
    """The level of a program, given every level's first program."""
    level = 0
    if LEVELS > 1:
        for i in tl.static_range(1, LEVELS):
            level += (program >= (first[i] >> 1) - 1).to(tl.int32)
    return level


@triton.jit
def place(first, Cs, Ps, LEVELS: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr):
    """Find this program's number within its level, that level, and the level's channels and pixels."""
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    return program, level, pick_int(Cs, level, LEVELS) * C_UNIT, pick_int(Ps, level, LEVELS) * P_UNIT


@triton.jit
def tile_of(program, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, channels and pixels of a program of a level whose tiles are walked along pixels, channels, images."""
    tiles = tl.cdiv(P, BLOCK_P)
    across = program // tiles
    blocks = tl.cdiv(C, BLOCK_C)
    c = (across % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    return (across // blocks).to(tl.int64), c, p


@triton.jit
def load_masks(ptr, n, p, P, T: tl.constexpr, TP: tl.constexpr):
    """Masks [TP, BLOCK_P] of image ``n`` from [N, T, P]; 0 for the rows that pad T."""
    token = tl.arange(0, TP)
    at = ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :]
    return tl.load(at, mask=(token < T)[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def load_valid(ptr, n, p, P):
    """Which of the pixels ``p`` of image ``n`` count, from [N, P] of bytes. Others are to be selected away: multiplied by 0,
    NaN stays NaN."""
    return tl.load(ptr + n * P + p, mask=p < P, other=0) != 0


@triton.jit
def tile_offsets(c, p, row, FAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_P] inside one image, ``row`` between channels or, where these lie next to each other, between
    pixels; 64-bit when an image has 2**31 elements or more."""
    if WIDE:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    if FAST == 0:
        return c[:, None] * (row * ALIGN) + p[None, :]
    return c[:, None] + p[None, :] * (row * ALIGN)


@triton.jit
def load_rows(ptr, c, C, DTYPE: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr):
    """Rows [SPLIT * TP, BLOCK_C] of a [T, C] matrix as DTYPE; SPLIT = 2 appends the rounding residue as rows of its own,
    so that float32 tokens keep 16 bits in a bfloat16 product."""
    token = tl.arange(0, TP)
    value = tl.load(ptr + token[:, None] * C + c[None, :], mask=(token < T)[:, None] & (c < C)[None, :], other=0.0)
    if SPLIT == 1:
        rows = value.to(DTYPE)
    else:
        value = value.to(tl.float32)
        if DTYPE == tl.float16:
            value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)  # an infinite token would turn into NaN below
        high = value.to(DTYPE)
        both = tl.join(high, (value - high.to(tl.float32)).to(DTYPE))
        rows = tl.reshape(tl.permute(both, (2, 0, 1)), (2 * TP, value.shape[1]))
    return rows


@triton.jit
def add_projection(acc, rows, x, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """``acc + rows @ x``, exact products, sums in ACC; never tf32."""
    if ACC == tl.float64:
        acc += tl.sum(rows[:, :, None] * x[None, :, :], axis=1)
    elif UPCAST:  # the interpreter has no bfloat16 arithmetic
        acc = tl.dot(rows.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(rows, x, acc, input_precision="ieee")
    return acc


@triton.jit
def join_split(acc, TP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr):
    """[SPLIT * TP, BLOCK_P] -> [TP, BLOCK_P]: add the products of the residue rows.

    An infinite product stays: that of the residue may have the other sign, or be NaN."""
    if SPLIT == 1:
        return acc
    main = (tl.arange(0, SPLIT * TP) < TP)[:, None]
    products = tl.sum(tl.reshape(tl.where(main, acc, 0.0), (SPLIT, TP, BLOCK_P)), axis=0)
    both = tl.sum(tl.reshape(acc, (SPLIT, TP, BLOCK_P)), axis=0)
    return tl.where(tl.abs(products) < float("inf"), both, products)


@triton.jit
def reconstructed(t, affine_ptr, c, C, STANDARD: tl.constexpr, ACC: tl.constexpr):
    """The student's target: ``t [BLOCK_C, BLOCK_P]`` in ACC, or ``(t - mean) / std``."""
    value = t.to(ACC)
    if STANDARD:
        mean = tl.load(affine_ptr + c, mask=c < C, other=0.0).to(ACC)
        reciprocal = tl.load(affine_ptr + C + c, mask=c < C, other=0.0).to(ACC)
        value = (value - mean[:, None]) * reciprocal[:, None]
    return value


@triton.jit
def smooth_l1(x, beta):
    """``x^2 / (2 beta)`` where ``|x| < beta``, ``|x| - beta / 2`` elsewhere."""
    size = tl.abs(x)
    return tl.where(size < beta, x * x * (0.5 / beta), size - 0.5 * beta)


@triton.jit
def mask_of(logits):
    """The mask's formula, a sigmoid; `mask_slope` is its derivative."""
    return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def mask_slope(m):
    """The derivative of `mask_of` for the logits, by the mask's own value."""
    return m * (1.0 - m)


@triton.jit
def pick_row(x, i, ROWS: tl.constexpr):
    """Row ``i`` of ``x [ROWS, BLOCK]``."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == i)[:, None], x, 0.0), axis=0)


@triton.jit
def mask_gradient(m, gx, dice, weight_ptr, pair_ptr, T: tl.constexpr, TP: tl.constexpr):
    """Gradient [TP, BLOCK_P] of the mask logits: ``dm = weight * gx + dice * pair @ m``, times the slope."""
    token = tl.arange(0, TP)
    real = token < T
    dm = tl.load(weight_ptr + token, mask=real, other=0.0)[:, None] * gx[None, :]
    for j in range(T):
        column = tl.load(pair_ptr + j * T + token, mask=real, other=0.0) * dice
        dm += column[:, None] * pick_row(m, j, TP)[None, :]
    return dm * mask_slope(m)
