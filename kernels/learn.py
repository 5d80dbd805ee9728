"""Stage 1 on Triton: masked features and Dice losses of a frozen teacher's features, and the gradients of the tokens.

Every launch covers all levels and images. Forward: one read of x gives the masks, the sums of every channel and the Gram sums
of every pair of masks; a second launch with one program per level and image adds them up to mask weights and Dice losses.
Without mask weights, or with given ones, the first kernel also writes y = x * sum_t w m (x comes from L2 the second time: 2
passes over a feature tensor). Mask weights need sums of the whole image before a pixel can be weighed, so with them a third
kernel reads x again and writes y: 3 passes. Backward: one kernel takes a tile of all channels, forms g.x per pixel, then the
gradient of the masks, then the tile's share of the token gradient (x comes from L2 the second time): 2 passes; a finishing
kernel adds the shares. Another kernel writes the gradient of x where it is wanted: 2 passes more. All reductions have a fixed
order, no atomics.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._eager import DICE_EPS
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
    sum_ptrs,  # [N, 9, C], strips 1 to 8 are written where WEIGHTED
    y_ptrs,  # [N, C, P] by strides, written where not WEIGHTED
    first, Cs, Ps, x_ns, x_rows, y_ns, y_rows, indices, Ws,
    # of all
    weight_ptr,  # [levels, N, T] where WEIGHTS
    gram_ptr,  # [programs, T, T], written
    N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr, WEIGHTS: tl.constexpr, VALID: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    gram_ptr += program.to(tl.int64) * T * T
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
            pick(mask_ptrs, level, LEVELS), pick(total_ptrs, level, LEVELS), gram_ptr,
            y_ptr + n * pick_int(y_ns, level, LEVELS) * ALIGN, C, P, x_row, pick_int(y_rows, level, LEVELS),
            WEIGHTED, WEIGHTS, VALID, BIASED, ACC, T, TP, SPLIT, FAST, Y_FAST, ALIGN, WIDE, UPCAST,
            BLOCK_C, BLOCK_P, STAGES,
        )  # fmt: skip
    elif WEIGHTED:
        _border_sum(
            block - tiles + 1, image, sum_ptr + n * 9 * C, P // W, W, C, x_row,
            ACC, FAST, ALIGN, WIDE, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "Cs", "Hs", "Ws", "indices", "N", "weight_ptr", "pair_ptr", "dice_ptr"])
def finish_kernel(
    # of every level
    total_ptrs,  # [N, tiles, C]
    sum_ptrs,  # [N, 9, C], strip 0 is written
    pool_ptrs,  # [9, T, C]
    bias_ptrs,  # [T] or, where STANDARD, [5, T]
    first, Cs, Hs, Ws, indices,
    # of all
    gram_ptr,  # [programs, T, T]
    weight_ptr,  # [levels, N, T], written unless WEIGHTS
    pair_ptr,  # [levels, N, T, T], written: the gradient of the Dice loss for the masks is pairs @ m
    dice_ptr,  # [levels, N], written
    N,
    LEVELS: tl.constexpr, WEIGHTED: tl.constexpr, WEIGHTS: tl.constexpr, STANDARD: tl.constexpr, ACC: tl.constexpr,
    EPS: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, TILE: tl.constexpr, BORDER: tl.constexpr,
    ROWS: tl.constexpr, PAIR_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mask weights, Dice losses and their gradients from the sums of one image; TILE is BLOCK_P of the mask kernel."""
    level = tl.program_id(0) // N
    n = (tl.program_id(0) % N).to(tl.int64)
    C = pick_int(Cs, level, LEVELS)
    H = pick_int(Hs, level, LEVELS)
    W = pick_int(Ws, level, LEVELS)
    tiles = tl.cdiv(H * W, TILE)
    gram_ptr += (pick_int(first, level, LEVELS) + n * (tiles + BORDER)) * T * T
    out = pick_int(indices, level, LEVELS) * N + n  # a launch need not have all levels
    token = tl.arange(0, TP)
    real = token < T

    pair = tl.arange(0, TP * TP)
    known = (pair // TP < T) & (pair % TP < T)
    row = tl.arange(0, PAIR_ROWS)
    grams = tl.zeros((PAIR_ROWS, TP * TP), ACC)
    for r in range(0, tiles, PAIR_ROWS):
        gram_at = gram_ptr + (r + row)[:, None] * (T * T) + (pair // TP * T + pair % TP)[None, :]
        grams += tl.load(gram_at, mask=(r + row < tiles)[:, None] & known[None, :], other=0.0)
    gram = tl.reshape(tl.sum(grams, axis=0), (TP, TP))
    same = token[:, None] == token[None, :]
    others = real[:, None] & real[None, :] & (token[:, None] != token[None, :])
    area = tl.sum(tl.where(same, gram, 0.0), axis=0)  # the Gram sums are symmetric
    areas = tl.sum(tl.where(same, gram, 0.0), axis=1)[:, None] + area[None, :] + EPS
    share = tl.where(others, 1.0 / areas, 0.0)
    if T > 1:
        share = share / (N * T * (T - 1))
    dice = 2.0 * share * gram
    # every pair counts twice; the area of a mask is its product with itself, and falls in T - 1 pairs
    falling = tl.sum(tl.where(others, dice / areas, 0.0), axis=1)
    pairs = 4.0 * share - tl.where(same, 4.0 * falling[:, None], 0.0)
    tl.store(dice_ptr + out, tl.sum(tl.sum(dice, axis=1), axis=0))
    pair_at = pair_ptr + out * T * T + token[:, None] * T + token[None, :]
    tl.store(pair_at, pairs, mask=real[:, None] & real[None, :])

    if WEIGHTED:
        total_ptr = pick(total_ptrs, level, LEVELS) + n * tiles * C
        sum_ptr = pick(sum_ptrs, level, LEVELS) + n * 9 * C
        pool_ptr = pick(pool_ptrs, level, LEVELS)
        bias_ptr = pick(bias_ptrs, level, LEVELS)
        row = tl.arange(0, ROWS)
        strip = tl.arange(0, 16)
        score = tl.zeros((TP,), ACC)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            totals = tl.zeros((ROWS, BLOCK_C), ACC)
            for r in range(0, tiles, ROWS):
                total_at = total_ptr + (r + row)[:, None].to(tl.int64) * C + c[None, :]
                totals += tl.load(total_at, mask=(r + row < tiles)[:, None] & (c < C)[None, :], other=0.0)
            strip_sum = tl.sum(totals, axis=0)
            tl.store(sum_ptr + c, strip_sum, mask=c < C)
            # all nine strips at once, the first from above
            pool_at = pool_ptr + (strip[:, None, None] * T + token[None, :, None]) * C + c[None, None, :]
            rows = tl.load(pool_at, mask=(strip < 9)[:, None, None] & real[None, :, None] & (c < C)[None, None, :], other=0.0)
            border = (strip > 0) & (strip < 9)
            sums = tl.load(sum_ptr + strip[:, None] * C + c[None, :], mask=border[:, None] & (c < C)[None, :], other=0.0)
            sums += tl.where((strip == 0)[:, None], strip_sum[None, :], 0.0)
            score += tl.sum(tl.sum(rows.to(ACC) * sums[:, None, :], axis=2), axis=0)
        score = score / (H * W) + tl.load(bias_ptr + token, mask=real, other=0.0).to(ACC)
        if STANDARD:  # what the mean adds to the sums of the border
            score += tl.load(bias_ptr + T + token, mask=real, other=0.0).to(ACC) / H
            score += tl.load(bias_ptr + 2 * T + token, mask=real, other=0.0).to(ACC) / W
            score += tl.load(bias_ptr + 3 * T + token, mask=real, other=0.0).to(ACC) / (H * W)
            score += tl.load(bias_ptr + 4 * T + token, mask=real, other=0.0).to(ACC) / (H * W)
        score = tl.where(real, score, float("-inf"))
        weight = tl.exp(score - tl.max(score, axis=0))
        weight = weight / tl.sum(weight, axis=0)
    else:
        weight = tl.full((TP,), 1.0, ACC)
    if not WEIGHTS:
        tl.store(weight_ptr + out * T + token, weight, mask=real)


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
    token_ptr += (n * tiles + tile) * T * C
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
    first, Cs, Ps, x_ns, x_rows, g_ns, g_rows, indices,
    # of all
    weight_ptr,  # [levels, N, T]
    pair_ptr,  # [levels, N, T, T]
    dice_ptr,  # [levels] by stride: the gradient of the Dice losses
    share_ptr,  # [programs, 2, T], written: each tile's share of the gradients of mask weights and token biases
    dice_stride, N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    VALID: tl.constexpr, X_GRAD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, G_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    share_ptr += program.to(tl.int64) * 2 * T
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
        share_ptr, pick(token_ptrs, level, LEVELS), C, P,
        pick_int(x_rows, level, LEVELS), pick_int(g_rows, level, LEVELS),
        VALID, X_GRAD, ACC, T, TP, SPLIT, FAST, G_FAST, ALIGN, WIDE, UPCAST, BLOCK_C, BLOCK_P, STAGES,
    )  # fmt: skip


@triton.jit
def _add_token_shares(
    token, block, count, token_ptr, share_ptr, to_token_ptr, to_token_bias_ptr, C,
    BIASED: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of the gradient of one token from ``count`` shares, and the gradient of its bias."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros((ROWS, BLOCK_C), ACC)
    bias = tl.zeros((ROWS,), ACC)
    for r in range(0, count, ROWS):
        there = r + row < count
        at = token_ptr + ((r + row) * T + token)[:, None] * C + c[None, :]
        total += tl.load(at, mask=there[:, None] & (c < C)[None, :], other=0.0)
        if BIASED:
            bias += tl.load(share_ptr + ((r + row) * 2 + 1) * T + token, mask=there, other=0.0)
    tl.store(to_token_ptr + token * C + c, tl.sum(total, axis=0).to(to_token_ptr.dtype.element_ty), mask=c < C)
    if BIASED:
        if block == 0:
            tl.store(to_token_bias_ptr + token, tl.sum(bias, axis=0).to(to_token_bias_ptr.dtype.element_ty))


@triton.jit
def _add_weight_shares(
    block, tiles, share_ptr, weight_ptr, sum_ptr, pool_ptr, to_pool_ptr, to_bias_ptr, to_sum_ptr, N, C, H, W,
    STANDARD: tl.constexpr, X_GRAD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of the gradients of pool rows and strip sums, and the gradient of the weighting's bias."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.arange(0, TP)
    real = token < T
    strip = tl.arange(0, 16)
    row = tl.arange(0, ROWS)
    channels = (strip < 9)[:, None] & (c < C)[None, :]
    parameters = channels[:, None, :] & real[None, :, None]
    at = (strip[:, None, None] * T + token[None, :, None]) * C + c[None, None, :]
    pool = tl.load(pool_ptr + at, mask=parameters, other=0.0).to(ACC)
    total = tl.zeros((16, TP, BLOCK_C), ACC)
    constant = tl.zeros((TP,), ACC)
    for n in range(N):
        shares = tl.zeros((ROWS, TP), ACC)
        for r in range(0, tiles, ROWS):
            shares += tl.load(
                share_ptr + (n * tiles + r + row)[:, None].to(tl.int64) * (2 * T) + token[None, :],
                mask=(r + row < tiles)[:, None] & real[None, :],
                other=0.0,
            )
        to_weight = tl.sum(shares, axis=0)
        weight = tl.load(weight_ptr + n * T + token, mask=real, other=0.0)
        to_score = weight * (to_weight - tl.sum(weight * to_weight, axis=0))
        constant += to_score
        to_score = to_score / (H * W)
        image = (n * 9 + strip)[:, None] * C + c[None, :]
        total += to_score[None, :, None] * tl.load(sum_ptr + image, mask=channels, other=0.0)[:, None, :]
        if X_GRAD:
            tl.store(to_sum_ptr + image, tl.sum(to_score[None, :, None] * pool, axis=1), mask=channels)
    tl.store(to_pool_ptr + at, total.to(to_pool_ptr.dtype.element_ty), mask=parameters)
    if block == 0:
        tl.store(to_bias_ptr + token, constant.to(to_bias_ptr.dtype.element_ty), mask=real)
        if STANDARD:
            tl.store(to_bias_ptr + T + token, (constant / H).to(to_bias_ptr.dtype.element_ty), mask=real)
            tl.store(to_bias_ptr + 2 * T + token, (constant / W).to(to_bias_ptr.dtype.element_ty), mask=real)
            tl.store(to_bias_ptr + 3 * T + token, (constant / (H * W)).to(to_bias_ptr.dtype.element_ty), mask=real)
            tl.store(to_bias_ptr + 4 * T + token, (constant / (H * W)).to(to_bias_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["first", "adding", "indices", "Cs", "Hs", "Ws", "weight_ptr", "N"])
def add_shares_kernel(
    # of every level
    token_ptrs,  # [N, tiles, T, C]: the tiles' shares
    sum_ptrs,  # [N, 9, C]
    pool_ptrs,  # [9, T, C]
    to_token_ptrs,  # [T, C], written
    to_token_bias_ptrs,  # [T], written where BIASED
    to_pool_ptrs,  # [9, T, C], written where WEIGHTED
    to_bias_ptrs,  # [T] or, where STANDARD, [5, T], written where WEIGHTED
    to_sum_ptrs,  # [N, 9, C], written where WEIGHTED and X_GRAD
    first,  # programs of the token gradient
    adding,  # first programs of this launch
    indices, Cs, Hs, Ws,
    # of all
    share_ptr,  # [programs of the token gradient, 2, T]
    weight_ptr,  # [levels, N, T]
    N,
    LEVELS: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, STANDARD: tl.constexpr, X_GRAD: tl.constexpr,
    ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SHARE_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters; TILE is BLOCK_P of the token gradient."""
    program = tl.program_id(0)
    level = find_level(program, adding, LEVELS)
    program -= pick_int(adding, level, LEVELS)
    C = pick_int(Cs, level, LEVELS)
    H = pick_int(Hs, level, LEVELS)
    W = pick_int(Ws, level, LEVELS)
    tiles = tl.cdiv(H * W, TILE)
    share_ptr += pick_int(first, level, LEVELS).to(tl.int64) * 2 * T
    blocks = tl.cdiv(C, BLOCK_C)
    role = program // blocks  # a token, or the weighting
    if role < T:
        _add_token_shares(
            role, program % blocks, N * tiles, pick(token_ptrs, level, LEVELS), share_ptr,
            pick(to_token_ptrs, level, LEVELS), pick(to_token_bias_ptrs, level, LEVELS), C, BIASED, ACC, T, ROWS, BLOCK_C,
        )  # fmt: skip
    elif WEIGHTED:
        _add_weight_shares(
            program % blocks, tiles, share_ptr, weight_ptr + pick_int(indices, level, LEVELS) * N * T,
            pick(sum_ptrs, level, LEVELS), pick(pool_ptrs, level, LEVELS), pick(to_pool_ptrs, level, LEVELS),
            pick(to_bias_ptrs, level, LEVELS), pick(to_sum_ptrs, level, LEVELS), N, C, H, W,
            STANDARD, X_GRAD, ACC, T, TP, SHARE_ROWS, BLOCK_C,
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
    standard: bool
    biased: bool
    given_weights: bool
    valid: bool
    heights: tuple[int, ...]

    @classmethod
    def of(cls, options: LearnOptions) -> "_Variant":
        tokens, token_bias, pool_rows, pool_bias = options.tables
        standard = len(pool_bias) > 0 and pool_bias[0].dim() == 2
        return cls(
            len(tokens[0]), len(pool_rows) > 0, standard, len(token_bias) > 0, len(options.weights) > 0,
            len(options.valid) > 0, tuple(options.heights),
        )  # fmt: skip


def forward(features: Sequence[Tensor], options: LearnOptions, dice: Tensor, kept: LearnKept) -> list[Tensor]:
    """Masked features in the dtype and, where they are dense, the strides of ``features``; fills ``dice [levels, N]``
    and ``kept``."""
    weights, pairs, masks, sums = kept
    launch.check_device(dice)
    masked = [torch.empty_like(x) for x in features]
    if not len(features[0]):
        return masked
    for used, given in zip(weights, options.weights, strict=False):
        used.copy_(given)
    parameters = [[x.contiguous() for x in field] for field in options.tables]
    tokens, token_bias, pool_rows, pool_bias = parameters
    variant = _Variant.of(options)
    n, t = weights.shape[1:]
    looks = launch.looks(features), launch.looks(masked)
    maps, launches = _plan_forward(looks, launch.dtypes(*parameters), variant, dice.device, tuning.generation())
    features, written = launch.readable(features, maps[0]), launch.writable(masked, maps[1])
    with launch.device_of(dice):
        for group, counts, tiles, finish, gate in launches:
            sizes = [(n, k, m.c) if variant.weighted else 0 for k, m in zip(counts, group.maps[0], strict=True)]
            totals = [weights.new_empty(size) for size in sizes]
            grams = weights.new_empty((tiles.programs, t, t))
            launch.run(
                mask_kernel, tiles.programs,
                *group.addresses(features, tokens, token_bias, options.valid, masks), launch.per_level(totals),
                *group.addresses(sums or masks, written), *tiles.tables, weights, grams, n, **tiles.constants,
            )  # fmt: skip
            launch.run(
                finish_kernel, finish.programs,
                launch.per_level(totals), *group.addresses(sums or masks, pool_rows, pool_bias), *finish.tables,
                grams, weights, pairs, dice, n, **finish.constants,
            )  # fmt: skip
            if variant.weighted:
                launch.run(
                    gate_kernel, gate.programs,
                    *group.addresses(features, masks, written), *gate.tables, weights, n, **gate.constants,
                )  # fmt: skip
    return launch.copied_back(masked, written)


# Tiles of each level's image; the numbers of the mask, the finishing and the gate kernel
_Forward = tuple[launch.Group, list[int], launch.Numbers, launch.Numbers, launch.Numbers]


@functools.lru_cache(launch.PLANS)
def _plan_forward(
    looks: Sequence[Sequence[launch.Look]],
    parameters: Sequence[Sequence[torch.dtype]],
    variant: _Variant,
    device: torch.device,
    _generation: int,
) -> tuple[list[list[launch.Map]], list[_Forward]]:
    """Features and masked features as kernels address them, and the launches."""
    maps = [[launch.Map.of(look) for look in each] for each in looks]
    return maps, [_forward_numbers(group, variant, device) for group in launch.groups(*maps, parameters=parameters)]


def _forward_numbers(group: launch.Group, variant: _Variant, device: torch.device) -> _Forward:
    x, t = group.maps[0], variant.num_tokens
    heights, widths = _sizes(group, variant)
    config = group.config("mask_kernel", t, device)
    counts = [tuning.ceil_div(m.p, config.block_p) for m in x]
    border = BORDER if variant.weighted else 0
    first, programs = launch.first_programs([m.n * (k + border) for m, k in zip(x, counts, strict=True)])
    acc, rows, split = launch.acc_type(x[0].dtype), tuning.token_rows(t), launch.split(x[0].dtype)
    common = {"WEIGHTED": variant.weighted, "WEIGHTS": variant.given_weights, "ACC": acc, "T": t, "BORDER": border}
    axes = {"FAST": group.axes[0], "Y_FAST": group.axes[1]}
    tiles = {
        "VALID": variant.valid, "BIASED": variant.biased, "TP": rows, "SPLIT": split, "UPCAST": launch.INTERPRETED,
        "STAGES": launch.stages(config, split * rows), **axes, **config.tile, **group.constants, **common,
    }  # fmt: skip
    itemsize, padded = 8 if acc == tl.float64 else 4, tuning.power_of_2(t)
    finish = {
        "LEVELS": len(x), "STANDARD": variant.standard, "EPS": DICE_EPS, "TP": padded, "TILE": config.block_p, "ROWS": 64,
        "PAIR_ROWS": max(1, 16384 // itemsize // padded**2), **_parameter_block(padded, itemsize), **common,
    }  # fmt: skip
    tables = [*launch.tables(first), *group.tables(0, 1), *launch.tables(group.levels, widths)]
    return (
        group,
        counts,
        launch.Numbers(programs, tables, tiles),
        launch.Numbers(len(x) * x[0].n, launch.tables(first, [m.c for m in x], heights, widths, group.levels), finish),
        _gate_numbers(group, t, axes, device),
    )


def _gate_numbers(group: launch.Group, t: int, axes: dict[str, int], device: torch.device) -> launch.Numbers:
    config = group.config("gate_kernel", t, device)
    first, programs = launch.tile_programs(group.maps[0], config)
    tables = [*launch.tables(first), *group.tables(0, 1), *launch.tables(group.levels)]
    return launch.Numbers(programs, tables, {"T": t, "TP": tuning.power_of_2(t), **axes, **config.tile, **group.constants})


def _sizes(group: launch.Group, variant: _Variant) -> tuple[list[int], list[int]]:
    """Heights and widths of a launch's levels."""
    heights = group.own(variant.heights)
    return heights, [m.p // height for m, height in zip(group.maps[0], heights, strict=True)]


def _parameter_block(rows: int, itemsize: int) -> dict[str, int]:
    """Channels of a block that holds pool rows of all strips and tokens in registers, and what a program takes: few run."""
    return {"BLOCK_C": max(4, min(64, 1024 // (rows * itemsize))), "num_warps": itemsize}


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
    weights, pairs, masks, sums = kept
    launch.check_device(weights)
    result = [torch.empty_like(x) for x in features] if need_features else []
    if not len(features[0]):
        for each in (*to_tables, to_weights):
            for gradient in each:
                gradient.zero_()
        return result
    tokens, _, pool_rows, _ = [[x.contiguous() for x in field] for field in options.tables]
    variant = _Variant.of(options)
    n, t = weights.shape[1:]
    looks = launch.looks(features), launch.looks(grads), *([launch.looks(result)] if need_features else [])
    maps, launches = _plan_backward(looks, launch.dtypes(*to_tables), variant, weights.device, tuning.generation())
    features, grads = launch.readable(features, maps[0]), launch.readable(grads, maps[1])
    written = launch.writable(result, maps[2]) if need_features else []
    gx = [weights.new_empty((n, m.p)) for m in maps[0]] if need_features else []
    to_sums = [torch.empty_like(s) for s in sums if need_features]
    of_all = weights, pairs, grad_dice
    with launch.device_of(weights):
        for group, counts, tiles, adding, features_gradient in launches:
            x = group.maps[0]
            token_shares = [weights.new_empty((n, k, t, m.c)) for k, m in zip(counts, x, strict=True)]
            shares = weights.new_empty((tiles.programs, 2, t))
            launch.run(
                token_gradient_kernel, tiles.programs,
                *group.addresses(features, grads, masks, options.valid, gx), launch.per_level(token_shares),
                *tiles.tables, *of_all, shares, grad_dice.stride(0), n, **tiles.constants,
            )  # fmt: skip
            if to_weights:
                for i, own in zip(group.levels, shares.split([n * k for k in counts]), strict=True):
                    torch.sum(own[:, 0].unflatten(0, (n, -1)), 1, out=to_weights[i])
            launch.run(
                add_shares_kernel, adding.programs,
                launch.per_level(token_shares), *group.addresses(sums or masks, pool_rows, *to_tables, to_sums),
                *adding.tables, shares, weights, n, **adding.constants,
            )  # fmt: skip
            if features_gradient:
                launch.run(
                    feature_gradient_kernel, features_gradient.programs,
                    *group.addresses(grads, gx, masks, options.valid, tokens, to_sums, written),
                    *features_gradient.tables, *of_all, grad_dice.stride(0), n, **features_gradient.constants,
                )  # fmt: skip
    return launch.copied_back(result, written)


# Tiles of each level's image; the numbers of the token gradient, what adds its shares, and the features' gradient
_Backward = tuple[launch.Group, list[int], launch.Numbers, launch.Numbers, launch.Numbers | None]


@functools.lru_cache(launch.PLANS)
def _plan_backward(
    looks: Sequence[Sequence[launch.Look]],
    parameters: Sequence[Sequence[torch.dtype]],
    variant: _Variant,
    device: torch.device,
    _generation: int,
) -> tuple[list[list[launch.Map]], list[_Backward]]:
    """Features, upstream gradients and, where they are wanted, the features' gradients as kernels address them; launches."""
    maps = [[launch.Map.of(look) for look in each] for each in looks]
    return maps, [_backward_numbers(group, variant, device) for group in launch.groups(*maps, parameters=parameters)]


def _backward_numbers(group: launch.Group, variant: _Variant, device: torch.device) -> _Backward:
    x, t, need_features = group.maps[0], variant.num_tokens, len(group.maps) == 3
    heights, widths = _sizes(group, variant)
    config = group.config("token_gradient_kernel", t, device)
    counts = [tuning.ceil_div(m.p, config.block_p) for m in x]
    first, programs = launch.first_programs([m.n * k for m, k in zip(x, counts, strict=True)])
    acc, rows = launch.acc_type(x[0].dtype), tuning.token_rows(t)
    common = {"X_GRAD": need_features, "ACC": acc, "T": t, "TP": rows}
    tiles = {
        "VALID": variant.valid, "SPLIT": launch.split(x[0].dtype), "FAST": group.axes[0], "G_FAST": group.axes[1],
        "UPCAST": launch.INTERPRETED, "STAGES": config.num_stages, **config.tile, **group.constants, **common,
    }  # fmt: skip
    block = _parameter_block(rows, 8 if acc == tl.float64 else 4)
    roles = t + variant.weighted
    adding_first, adding_programs = launch.first_programs([roles * tuning.ceil_div(m.c, block["BLOCK_C"]) for m in x])
    adding = {
        "LEVELS": len(x), "WEIGHTED": variant.weighted, "BIASED": variant.biased, "STANDARD": variant.standard,
        "TILE": config.block_p, "ROWS": 64, "SHARE_ROWS": max(16, 2048 // rows), **block, **common,
    }  # fmt: skip
    adding_tables = launch.tables(first, adding_first, group.levels, [m.c for m in x], heights, widths)
    return (
        group,
        counts,
        launch.Numbers(programs, [*launch.tables(first), *group.tables(0, 1), *launch.tables(group.levels)], tiles),
        launch.Numbers(adding_programs, adding_tables, adding),
        _feature_gradient_numbers(group, variant, widths, device) if need_features else None,
    )


def _feature_gradient_numbers(
    group: launch.Group, variant: _Variant, widths: Sequence[int], device: torch.device
) -> launch.Numbers:
    t = variant.num_tokens
    config = group.config("feature_gradient_kernel", t, device, of=2)
    first, programs = launch.tile_programs(group.maps[0], config)
    constants = {
        "VALID": variant.valid, "WEIGHTED": variant.weighted, "T": t, "TP": tuning.power_of_2(t),
        "G_FAST": group.axes[1], "D_FAST": group.axes[2], **config.tile, **group.constants,
    }  # fmt: skip
    tables = [*launch.tables(first), *group.tables(1, 2), *launch.tables(group.levels, widths)]
    return launch.Numbers(programs, tables, constants)
