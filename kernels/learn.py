"""Stage 1 on Triton: masked features and Dice losses of a frozen teacher's features, and the gradients of the tokens.

A launch covers all levels and images of a pyramid. Forward: one read of x gives the masks, the sums of every channel and the
Gram sums of every pair of masks, tile by tile; torch adds up the tiles and makes mask weights and Dice losses of them. Without
mask weights, or with given ones, the kernel also writes y = x * sum_t w m (x comes from L2 the second time: 2 passes over a
feature tensor). Mask weights need sums of the whole image before a pixel can be weighed, so with them another kernel reads x
again and writes y: 3 passes. Backward: one kernel takes a tile of all channels, forms g.x per pixel, then the gradient of the
masks, then the tile's share of the token gradient (x comes from L2 the second time): 2 passes; torch adds the shares. Another
kernel writes the gradient of x where it is wanted: 2 passes more. All reductions have a fixed order, no atomics.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _eager
from .._records import LearnKept, LearnOptions, LearnTables
from . import launch, tuning
from .tiles import (
    add_projection,
    find_level,
    join_split,
    load_masks,
    load_rows,
    load_valid,
    mask_gradient,
    pick,
    pick_int,
    pick_row,
    sigmoid,
    tile_of,
    tile_offsets,
)

BORDER = 8  # programs of an image that add up its border, one for each strip but the first


@triton.jit
def _mask_tile(
    n, tile, tiles, x_ptr, token_ptr, bias_ptr, valid_ptr, weight_ptr, mask_ptr, total_ptr, gram_ptr, y_ptr, C, P, x_row, y_row,
    WEIGHTED: tl.constexpr, WEIGHTS: tl.constexpr, VALID: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Masks and sums of BLOCK_P pixels, and y where not WEIGHTED; ``x_ptr`` and ``y_ptr`` are those of the image."""
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    total_ptr += (n * tiles + tile) * C
    gram_ptr += (n * tiles + tile) * T * T
    logits = tl.zeros((SPLIT * TP, BLOCK_P), ACC)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_offsets(c, p, x_row, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        logits = add_projection(logits, load_rows(token_ptr, c, C, x.dtype, T, TP, SPLIT), x, ACC, UPCAST)
        if WEIGHTED:
            tl.store(total_ptr + c, tl.sum(x.to(ACC), axis=1), mask=c < C)
    token = tl.arange(0, TP)
    real = token < T
    scores = join_split(logits, TP, SPLIT, BLOCK_P)
    if BIASED:
        scores += tl.load(bias_ptr + token, mask=real, other=0.0).to(ACC)[:, None]
    counted = inside
    if VALID:
        counted = load_valid(valid_ptr, n, p, P)
    m = tl.where(counted[None, :], sigmoid(scores), 0.0)
    tl.store(mask_ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :], m, mask=real[:, None] & inside[None, :])
    for j in range(T):
        tl.store(gram_ptr + j * T + token, tl.sum(m * pick_row(m, j, TP)[None, :], axis=1), mask=real)
    if not WEIGHTED:
        if WEIGHTS:
            weighed = m * tl.load(weight_ptr + token, mask=real, other=0.0)[:, None]
        else:
            weighed = tl.where(real[:, None], m, 0.0)
        gate = tl.sum(weighed, axis=0)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c < C)[:, None] & inside[None, :]
            x = tl.load(x_ptr + tile_offsets(c, p, x_row, FAST, ALIGN, WIDE), mask=mask, other=0.0)
            y = x.to(ACC) * gate[None, :]
            if VALID:
                y = tl.where(counted[None, :], y, 0.0)
            y_at = y_ptr + tile_offsets(c, p, y_row, Y_FAST, ALIGN, WIDE)
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _border_sum(
    strip, x_ptr, sum_ptr, H, W, C, x_row,
    ACC: tl.constexpr, FAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of x over one strip of the border; the order of the strips is that of ``_eager.STRIPS``."""
    length = tl.where(strip < 3, W, tl.where(strip < 5, H, 1))
    step = tl.where(strip < 3, 1, W)
    bottom = (strip == 2) | (strip == 7) | (strip == 8)
    right = (strip == 4) | (strip == 6) | (strip == 8)
    first = tl.where(bottom, (H - 1) * W, 0) + tl.where(right, W - 1, 0)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
        for start in tl.range(0, length, BLOCK_P, num_stages=1):
            along = start + tl.arange(0, BLOCK_P)
            mask = (c < C)[:, None] & (along < length)[None, :]
            at = x_ptr + tile_offsets(c, first + along * step, x_row, FAST, ALIGN, WIDE)
            total += tl.load(at, mask=mask, other=0.0).to(ACC)
        tl.store(sum_ptr + strip * C + c, tl.sum(total, axis=1), mask=c < C)


@triton.jit(do_not_specialize=["first", "indices", "Cs", "Ps", "Ws", "x_ns", "x_rows", "y_ns", "y_rows", "weight_ptr", "N"])
def mask_kernel(
    # of every level
    x_ptrs,  # [N, C, P] by strides
    token_ptrs,  # [T, C]
    bias_ptrs,  # [T]
    valid_ptrs,  # [N, P] of bytes: pixels that count, where VALID
    mask_ptrs,  # [N, T, P], written
    total_ptrs,  # [N, tiles, C], written where WEIGHTED
    gram_ptrs,  # [N, tiles, T, T], written
    sum_ptrs,  # [N, 9, C], strips 1 to 8 are written where WEIGHTED
    y_ptrs,  # [N, C, P] by strides, written where not WEIGHTED
    first, Cs, Ps, x_ns, x_rows, y_ns, y_rows, indices, Ws,
    # of all
    weight_ptr,  # [levels, N, T] where WEIGHTS
    N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr, WEIGHTS: tl.constexpr, VALID: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    W = pick_int(Ws, level, LEVELS)
    x_ptr = pick(x_ptrs, level, LEVELS)
    y_ptr = pick(y_ptrs, level, LEVELS)
    sum_ptr = pick(sum_ptrs, level, LEVELS)
    x_row = pick_int(x_rows, level, LEVELS)
    C = pick_int(Cs, level, LEVELS) * C_UNIT
    P = pick_int(Ps, level, LEVELS) * P_UNIT
    tiles = tl.cdiv(P, BLOCK_P)
    blocks = tiles + BORDER
    n = (program // blocks).to(tl.int64)
    block = program % blocks
    image = x_ptr + n * pick_int(x_ns, level, LEVELS) * ALIGN
    if block < tiles:
        _mask_tile(
            n, block, tiles, image, pick(token_ptrs, level, LEVELS), pick(bias_ptrs, level, LEVELS),
            pick(valid_ptrs, level, LEVELS), weight_ptr + (index * N + n) * T,
            pick(mask_ptrs, level, LEVELS), pick(total_ptrs, level, LEVELS), pick(gram_ptrs, level, LEVELS),
            y_ptr + n * pick_int(y_ns, level, LEVELS) * ALIGN, C, P, x_row, pick_int(y_rows, level, LEVELS),
            WEIGHTED, WEIGHTS, VALID, BIASED, ACC, T, TP, SPLIT, FAST, Y_FAST, ALIGN, WIDE, UPCAST,
            BLOCK_C, BLOCK_P, STAGES,
        )  # fmt: skip
    elif WEIGHTED:
        _border_sum(
            block - tiles + 1, image, sum_ptr + n * 9 * C, P // W, W, C, x_row,
            ACC, FAST, ALIGN, WIDE, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "indices", "Cs", "Ps", "x_ns", "x_rows", "y_ns", "y_rows", "weight_ptr", "N"])
def gate_kernel(
    # of every level
    x_ptrs,  # [N, C, P] by strides
    mask_ptrs,  # [N, T, P]
    y_ptrs,  # [N, C, P] by strides, written
    first, Cs, Ps, x_ns, x_rows, y_ns, y_rows, indices,
    # of all
    weight_ptr,  # [levels, N, T]
    N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = x * sum_t weight * mask."""
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    x_ptr = pick(x_ptrs, level, LEVELS)
    y_ptr = pick(y_ptrs, level, LEVELS)
    mask_ptr = pick(mask_ptrs, level, LEVELS)
    x_row = pick_int(x_rows, level, LEVELS)
    y_row = pick_int(y_rows, level, LEVELS)
    token = tl.arange(0, TP)
    real = token < T
    C = pick_int(Cs, level, LEVELS) * C_UNIT
    P = pick_int(Ps, level, LEVELS) * P_UNIT
    n, c, p = tile_of(program, C, P, BLOCK_C, BLOCK_P)
    inside = p < P
    mask = (c < C)[:, None] & inside[None, :]
    x_at = x_ptr + n * pick_int(x_ns, level, LEVELS) * ALIGN + tile_offsets(c, p, x_row, FAST, ALIGN, WIDE)
    y_at = y_ptr + n * pick_int(y_ns, level, LEVELS) * ALIGN + tile_offsets(c, p, y_row, Y_FAST, ALIGN, WIDE)
    x = tl.load(x_at, mask=mask, other=0.0)
    m = load_masks(mask_ptr, n, p, P, T, TP)
    weight = tl.load(weight_ptr + (index * N + n) * T + token, mask=real, other=0.0)
    gate = tl.sum(m * weight[:, None], axis=0)
    y = x.to(gate.dtype) * gate[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _token_gradient_tile(
    n, tile, tiles, g_ptr, x_ptr, mask_ptr, valid_ptr, weight_ptr, pair_ptr, dice, gx_ptr, share_ptr, token_ptr,
    C, P, x_row, g_row,
    VALID: tl.constexpr, X_GRAD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, G_FAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    share_ptr += (n * tiles + tile) * 2 * T
    token_ptr += (n * tiles + tile) * T * C
    products = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_offsets(c, p, x_row, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        g = tl.load(g_ptr + tile_offsets(c, p, g_row, G_FAST, ALIGN, WIDE), mask=mask, other=0.0)
        products += g.to(ACC) * x.to(ACC)
    gx = tl.sum(products, axis=0)
    counted = inside
    if VALID:
        counted = load_valid(valid_ptr, n, p, P)
        gx = tl.where(counted, gx, 0.0)
    if X_GRAD:
        tl.store(gx_ptr + n * P + p, gx, mask=inside)
    token = tl.arange(0, TP)
    real = token < T
    m = load_masks(mask_ptr, n, p, P, T, TP)
    tl.store(share_ptr + token, tl.sum(m * gx[None, :], axis=1), mask=real)
    dl = mask_gradient(m, gx, dice, weight_ptr, pair_ptr, T, TP)
    tl.store(share_ptr + T + token, tl.sum(dl, axis=1), mask=real)
    # rows scaled to 1, in two parts for half features: a half-precision product must not lose small gradients
    largest = tl.max(tl.abs(dl), axis=1)
    largest = tl.where(largest > 0, largest, 1.0)
    dl = dl / largest[:, None]
    high = dl.to(x_ptr.dtype.element_ty)
    low = (dl - high.to(ACC)).to(x_ptr.dtype.element_ty)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_offsets(c, p, x_row, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        if VALID:
            x = tl.where(counted[None, :], x, 0.0)
        across = tl.trans(x)
        share = add_projection(tl.zeros((TP, BLOCK_C), ACC), high, across, ACC, UPCAST)
        if SPLIT == 2:
            share = add_projection(share, low, across, ACC, UPCAST)
        tl.store(token_ptr + token[:, None] * C + c[None, :], share * largest[:, None], mask=real[:, None] & (c < C)[None, :])


@triton.jit(
    do_not_specialize=[
        *("first", "indices", "Cs", "Ps", "x_ns", "x_rows", "g_ns", "g_rows"),
        *("weight_ptr", "pair_ptr", "dice_ptr", "dice_stride", "N"),
    ]
)
def token_gradient_kernel(
    # of every level
    x_ptrs,  # [N, C, P] by strides
    g_ptrs,  # [N, C, P] by strides: the gradient of y
    mask_ptrs,  # [N, T, P]
    valid_ptrs,  # [N, P] of bytes: pixels that count, where VALID
    gx_ptrs,  # [N, P], written where X_GRAD
    token_ptrs,  # [N, tiles, T, C], written: each tile's share of the token gradient
    share_ptrs,  # [N, tiles, 2, T], written: and of the gradients of mask weights and token biases
    first, Cs, Ps, x_ns, x_rows, g_ns, g_rows, indices,
    # of all
    weight_ptr,  # [levels, N, T]
    pair_ptr,  # [levels, N, T, T]
    dice_ptr,  # [levels] by stride: the gradient of the Dice losses
    dice_stride, N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    VALID: tl.constexpr, X_GRAD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, G_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    x_ptr = pick(x_ptrs, level, LEVELS)
    g_ptr = pick(g_ptrs, level, LEVELS)
    dice = tl.load(dice_ptr + index * dice_stride)
    C = pick_int(Cs, level, LEVELS) * C_UNIT
    P = pick_int(Ps, level, LEVELS) * P_UNIT
    tiles = tl.cdiv(P, BLOCK_P)
    n = (program // tiles).to(tl.int64)
    _token_gradient_tile(
        n, program % tiles, tiles, g_ptr + n * pick_int(g_ns, level, LEVELS) * ALIGN,
        x_ptr + n * pick_int(x_ns, level, LEVELS) * ALIGN, pick(mask_ptrs, level, LEVELS),
        pick(valid_ptrs, level, LEVELS),
        weight_ptr + (index * N + n) * T, pair_ptr + (index * N + n) * T * T, dice, pick(gx_ptrs, level, LEVELS),
        pick(share_ptrs, level, LEVELS), pick(token_ptrs, level, LEVELS), C, P,
        pick_int(x_rows, level, LEVELS), pick_int(g_rows, level, LEVELS),
        VALID, X_GRAD, ACC, T, TP, SPLIT, FAST, G_FAST, ALIGN, WIDE, UPCAST, BLOCK_C, BLOCK_P, STAGES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("first", "indices", "Cs", "Ps", "Ws", "g_ns", "g_rows", "d_ns", "d_rows"),
        *("weight_ptr", "pair_ptr", "dice_ptr", "dice_stride", "N"),
    ]
)
def feature_gradient_kernel(
    # of every level
    g_ptrs,  # [N, C, P] by strides: the gradient of y
    gx_ptrs,  # [N, P]
    mask_ptrs,  # [N, T, P]
    valid_ptrs,  # [N, P] of bytes: pixels that count, where VALID
    token_ptrs,  # [T, C]
    to_sum_ptrs,  # [N, 9, C]: the gradients of the strip sums
    d_ptrs,  # [N, C, P] by strides, written
    first, Cs, Ps, g_ns, g_rows, d_ns, d_rows, indices, Ws,
    # of all
    weight_ptr,  # [levels, N, T]
    pair_ptr,  # [levels, N, T, T]
    dice_ptr,  # [levels] by stride: the gradient of the Dice losses
    dice_stride, N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    VALID: tl.constexpr, WEIGHTED: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, G_FAST: tl.constexpr, D_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = g * sum_t weight * mask + sum_t dl * token + the path through the mask weights."""
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    W = pick_int(Ws, level, LEVELS)
    g_ptr = pick(g_ptrs, level, LEVELS)
    d_ptr = pick(d_ptrs, level, LEVELS)
    gx_ptr = pick(gx_ptrs, level, LEVELS)
    mask_ptr = pick(mask_ptrs, level, LEVELS)
    valid_ptr = pick(valid_ptrs, level, LEVELS)
    token_ptr = pick(token_ptrs, level, LEVELS)
    to_sum_ptr = pick(to_sum_ptrs, level, LEVELS)
    g_row = pick_int(g_rows, level, LEVELS)
    d_row = pick_int(d_rows, level, LEVELS)
    dice = tl.load(dice_ptr + index * dice_stride)
    token = tl.arange(0, TP)
    real = token < T
    C = pick_int(Cs, level, LEVELS) * C_UNIT
    P = pick_int(Ps, level, LEVELS) * P_UNIT
    n, c, p = tile_of(program, C, P, BLOCK_C, BLOCK_P)
    inside = p < P
    mask = (c < C)[:, None] & inside[None, :]
    g_at = g_ptr + n * pick_int(g_ns, level, LEVELS) * ALIGN + tile_offsets(c, p, g_row, G_FAST, ALIGN, WIDE)
    d_at = d_ptr + n * pick_int(d_ns, level, LEVELS) * ALIGN + tile_offsets(c, p, d_row, D_FAST, ALIGN, WIDE)
    g = tl.load(g_at, mask=mask, other=0.0)
    gx = tl.load(gx_ptr + n * P + p, mask=inside, other=0.0)
    m = load_masks(mask_ptr, n, p, P, T, TP)
    image = index * N + n
    gate = tl.sum(m * tl.load(weight_ptr + image * T + token, mask=real, other=0.0)[:, None], axis=0)
    dl = mask_gradient(m, gx, dice, weight_ptr + image * T, pair_ptr + image * T * T, T, TP)
    d = g.to(gate.dtype) * gate[None, :]
    for j in range(T):
        row = tl.load(token_ptr + j * C + c, mask=c < C, other=0.0).to(gate.dtype)
        d += row[:, None] * pick_row(dl, j, TP)[None, :]
    if WEIGHTED:
        strip_ptr = to_sum_ptr + n * 9 * C
        h = p // W
        w = p % W
        H = P // W
        for strip in range(9):  # a loop: nine rows at a time would not fit into registers
            top = (strip == 1) | (strip == 5) | (strip == 6)
            bottom = (strip == 2) | (strip == 7) | (strip == 8)
            left = (strip == 3) | (strip == 5) | (strip == 7)
            right = (strip == 4) | (strip == 6) | (strip == 8)
            there = ((h == 0) | (top == 0)) & ((h == H - 1) | (bottom == 0))
            there = there & ((w == 0) | (left == 0)) & ((w == W - 1) | (right == 0))
            row = tl.load(strip_ptr + strip * C + c, mask=c < C, other=0.0)
            d += tl.where(there[None, :], row[:, None], 0.0)
    if VALID:
        d = tl.where(load_valid(valid_ptr, n, p, P)[None, :], d, 0.0)
    tl.store(d_at, d.to(d_ptr.dtype.element_ty), mask=mask)


class _Variant(NamedTuple):
    """What a pass depends on beside what its tensors look like."""

    num_tokens: int
    weighted: bool
    biased: bool
    given_weights: bool
    valid: bool
    heights: tuple[int, ...]

    @classmethod
    def of(cls, options: LearnOptions) -> "_Variant":
        tokens, token_bias, pool_rows, _ = options.tables
        flags = len(pool_rows) > 0, len(token_bias) > 0, len(options.weights) > 0, len(options.valid) > 0
        return cls(len(tokens[0]), *flags, tuple(options.heights))


_Maps = list[list[launch.Map]]
_Forward = tuple[launch.Group, launch.Numbers, launch.Numbers]  # numbers of the mask and the gate kernel
_Backward = tuple[launch.Group, launch.Numbers, launch.Numbers | None]  # of the gradients of tokens and of features


def forward(features: Sequence[Tensor], options: LearnOptions, dice: Tensor, kept: LearnKept) -> list[Tensor]:
    """Masked features in the dtype and, where they are dense, the strides of ``features``; fills ``dice [levels, N]``
    and ``kept``."""
    weights, grams, masks, sums = kept
    launch.check_device(dice)
    masked = [torch.empty_like(x) for x in features]
    if not len(features[0]):
        return masked
    for used, given in zip(weights, options.weights, strict=False):
        used.copy_(given)
    parameters = [[x.contiguous() for x in field] for field in options.tables]
    tokens, token_bias, pool_rows, pool_bias = parameters
    variant, (n, t) = _Variant.of(options), weights.shape[1:]
    looks = launch.looks(features), launch.looks(masked)
    maps, launches = _plan_forward(looks, launch.dtypes(*parameters), variant, dice.device, tuning.generation())
    features, written = launch.readable(features, maps[0]), launch.writable(masked, maps[1])
    with launch.device_of(dice):
        for group, (programs, tables, constants), gate in launches:
            counts = _tiles(group, constants)
            totals = [weights.new_empty((n, k, m.c)) for k, m in zip(counts, group.maps[0], strict=True)]
            products = [weights.new_empty((n, k, t, t)) for k in counts]
            launch.run(
                mask_kernel, programs,
                *group.addresses(features, tokens, token_bias, options.valid, masks),
                *map(launch.per_level, (totals, products)), *group.addresses(sums or masks, written),
                *tables, weights, n, **constants,
            )  # fmt: skip
            for i, total, product in zip(group.levels, totals, products, strict=True):
                torch.sum(product, 1, out=grams[i])
                dice[i] = _eager.dice_of_gram(grams[i])
                if variant.weighted:
                    torch.sum(total, 1, out=sums[i][:, 0])
                    height = variant.heights[i]
                    weights[i] = _eager.weights_of_sums(sums[i], pool_rows[i], pool_bias[i], height, maps[0][i].p // height)
                elif not variant.given_weights:
                    weights[i] = 1.0
            if variant.weighted:
                addresses = group.addresses(features, masks, written)
                launch.run(gate_kernel, gate.programs, *addresses, *gate.tables, weights, n, **gate.constants)
    return launch.copied_back(masked, written)


def _tiles(group: launch.Group, constants: dict[str, Any]) -> list[int]:
    """Tiles of an image of each level, where a program takes all channels of its pixels."""
    return [tuning.ceil_div(m.p, constants["BLOCK_P"]) for m in group.maps[0]]


@functools.lru_cache(launch.PLANS)
def _plan_forward(
    looks: Sequence[Sequence[launch.Look]],
    parameters: Sequence[Sequence[torch.dtype]],
    variant: _Variant,
    device: torch.device,
    _generation: int,
) -> tuple[_Maps, list[_Forward]]:
    """Features and masked features as kernels address them, and the launches."""
    maps = [[launch.Map.of(look) for look in each] for each in looks]
    return maps, [_forward_numbers(group, variant, device) for group in launch.groups(*maps, parameters=parameters)]


def _forward_numbers(group: launch.Group, variant: _Variant, device: torch.device) -> _Forward:
    x, t = group.maps[0], variant.num_tokens
    config = group.config("mask_kernel", t, device)
    rows, split, border = tuning.token_rows(t), launch.split(x[0].dtype), BORDER if variant.weighted else 0
    axes = {"FAST": group.axes[0], "Y_FAST": group.axes[1], **group.constants}
    constants = {
        "WEIGHTED": variant.weighted, "WEIGHTS": variant.given_weights, "VALID": variant.valid, "BIASED": variant.biased,
        "ACC": launch.acc_type(x[0].dtype), "T": t, "TP": rows, "SPLIT": split, "BORDER": border, "UPCAST": launch.INTERPRETED,
        "STAGES": launch.stages(config, split * rows), **axes, **config.tile,
    }  # fmt: skip
    first, programs = launch.first_programs([m.n * (k + border) for m, k in zip(x, _tiles(group, constants), strict=True)])
    tables = [*launch.tables(first), *group.tables(0, 1), *launch.tables(group.levels, _widths(group, variant))]
    config = group.config("gate_kernel", t, device)
    gate_first, gate_programs = launch.tile_programs(x, config)
    gate_tables = [*launch.tables(gate_first), *group.tables(0, 1), *launch.tables(group.levels)]
    gate = {"T": t, "TP": tuning.power_of_2(t), **axes, **config.tile}
    return group, launch.Numbers(programs, tables, constants), launch.Numbers(gate_programs, gate_tables, gate)


def _widths(group: launch.Group, variant: _Variant) -> list[int]:
    return [m.p // height for m, height in zip(group.maps[0], group.own(variant.heights), strict=True)]


def backward(
    features: Sequence[Tensor],
    options: LearnOptions,
    grads: Sequence[Tensor],
    grad_dice: Tensor,
    kept: LearnKept,
    to_tables: LearnTables,
    to_weights: Sequence[Tensor],
    need_features: bool,
) -> list[Tensor]:
    """Gradients of ``features``, if needed; fills ``to_tables`` and ``to_weights``."""
    weights, grams, masks, sums = kept
    launch.check_device(weights)
    result = [torch.empty_like(x) for x in features] if need_features else []
    if not len(features[0]):
        for each in (*to_tables, to_weights):
            for gradient in each:
                gradient.zero_()
        return result
    tokens = [x.contiguous() for x in options.tables.tokens]
    variant, (n, t) = _Variant.of(options), weights.shape[1:]
    looks = launch.looks(features), launch.looks(grads), *([launch.looks(result)] if need_features else [])
    maps, launches = _plan_backward(looks, launch.dtypes(tokens), variant, weights.device, tuning.generation())
    features, grads = launch.readable(features, maps[0]), launch.readable(grads, maps[1])
    written = launch.writable(result, maps[2]) if need_features else []
    gx = [weights.new_empty((n, m.p)) for m in maps[0]] if need_features else []
    to_sums = [torch.empty_like(s) for s in sums]
    of_all = weights, torch.stack([_pairs(gram) for gram in grams]), grad_dice
    with launch.device_of(weights):
        for group, (programs, tables, constants), last in launches:
            counts = _tiles(group, constants)
            token_shares = [weights.new_empty((n, k, t, m.c)) for k, m in zip(counts, group.maps[0], strict=True)]
            shares = [weights.new_empty((n, k, 2, t)) for k in counts]
            launch.run(
                token_gradient_kernel, programs,
                *group.addresses(features, grads, masks, options.valid, gx),
                *map(launch.per_level, (token_shares, shares)), *tables, *of_all, grad_dice.stride(0), n, **constants,
            )  # fmt: skip
            for i, token_share, share in zip(group.levels, token_shares, shares, strict=True):
                of_weights, of_bias = share.sum(1).unbind(1)
                _fill(i, options, kept, to_tables, token_share.sum((0, 1)), of_bias.sum(0), of_weights, to_sums)
                if to_weights:
                    to_weights[i].copy_(of_weights)
            if last:
                addresses = group.addresses(grads, gx, masks, options.valid, tokens, to_sums, written)
                launch.run(
                    feature_gradient_kernel, last.programs,
                    *addresses, *last.tables, *of_all, grad_dice.stride(0), n, **last.constants,
                )  # fmt: skip
    return launch.copied_back(result, written)


def _pairs(gram: Tensor) -> Tensor:
    """``pairs [N, T, T]``: the gradient of the Dice loss for the masks m is ``pairs @ m``; ``gram``: their products."""
    with torch.enable_grad():
        gram = gram.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_eager.dice_of_gram(gram).sum(), gram)
    return gradient + gradient.transpose(1, 2)


def _fill(
    i: int,
    options: LearnOptions,
    kept: LearnKept,
    to_tables: LearnTables,
    of_tokens: Tensor,
    of_bias: Tensor,
    of_weights: Tensor,
    to_sums: Sequence[Tensor],
) -> None:
    """The gradients of level ``i``'s parameters and strip sums, from those of its tokens, token biases and mask weights."""
    to_tables.tokens[i].copy_(of_tokens)
    if to_tables.token_bias:
        to_tables.token_bias[i].copy_(of_bias)
    if to_tables.pool_rows:
        height, pixels = options.heights[i], kept.masks[i].shape[2]
        with torch.enable_grad():
            tables = options.tables.pool_rows[i], options.tables.pool_bias[i]
            inputs = [x.detach().requires_grad_() for x in (kept.sums[i], *tables)]
            weights = _eager.weights_of_sums(*inputs, height, pixels // height)
        outputs = to_sums[i], to_tables.pool_rows[i], to_tables.pool_bias[i]
        for output, gradient in zip(outputs, torch.autograd.grad(weights, inputs, of_weights), strict=True):
            output.copy_(gradient)


@functools.lru_cache(launch.PLANS)
def _plan_backward(
    looks: Sequence[Sequence[launch.Look]],
    parameters: Sequence[Sequence[torch.dtype]],
    variant: _Variant,
    device: torch.device,
    _generation: int,
) -> tuple[_Maps, list[_Backward]]:
    """Features, upstream gradients and, where they are wanted, the features' gradients as kernels address them; launches."""
    maps = [[launch.Map.of(look) for look in each] for each in looks]
    return maps, [_backward_numbers(group, variant, device) for group in launch.groups(*maps, parameters=parameters)]


def _backward_numbers(group: launch.Group, variant: _Variant, device: torch.device) -> _Backward:
    x, t, need_features = group.maps[0], variant.num_tokens, len(group.maps) == 3
    config = group.config("token_gradient_kernel", t, device)
    constants = {
        "VALID": variant.valid, "X_GRAD": need_features, "ACC": launch.acc_type(x[0].dtype), "T": t,
        "TP": tuning.token_rows(t), "SPLIT": launch.split(x[0].dtype), "FAST": group.axes[0], "G_FAST": group.axes[1],
        "UPCAST": launch.INTERPRETED, "STAGES": config.num_stages, **config.tile, **group.constants,
    }  # fmt: skip
    first, programs = launch.first_programs([m.n * k for m, k in zip(x, _tiles(group, constants), strict=True)])
    tables = [*launch.tables(first), *group.tables(0, 1), *launch.tables(group.levels)]
    numbers = launch.Numbers(programs, tables, constants)
    return group, numbers, _feature_gradient_numbers(group, variant, device) if need_features else None


def _feature_gradient_numbers(group: launch.Group, variant: _Variant, device: torch.device) -> launch.Numbers:
    t = variant.num_tokens
    config = group.config("feature_gradient_kernel", t, device, of=2)
    first, programs = launch.tile_programs(group.maps[0], config)
    constants = {
        "VALID": variant.valid, "WEIGHTED": variant.weighted, "T": t, "TP": tuning.power_of_2(t),
        "G_FAST": group.axes[1], "D_FAST": group.axes[2], **config.tile, **group.constants,
    }  # fmt: skip
    tables = [*launch.tables(first), *group.tables(1, 2), *launch.tables(group.levels, _widths(group, variant))]
    return launch.Numbers(programs, tables, constants)
