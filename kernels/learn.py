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

from collections.abc import Sequence

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
    sum_rows,
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
            tl.store(total_ptr + c, sum_rows(tl.trans(x.to(ACC)), FAST == 1, 16), mask=c < C)
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
    for distance in range(TP):  # every pair of masks, by rows that threads of a warp hand to each other
        partner = token ^ distance
        other = tl.gather(m, tl.broadcast_to(partner[:, None], (TP, BLOCK_P)), axis=0)
        tl.store(gram_ptr + partner * T + token, tl.sum(m * other, axis=1), mask=real & (partner < T))
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


@triton.jit(
    do_not_specialize=["first", "aligns", "indices", "Cs", "Ps", "Ws", "x_ns", "x_rows", "y_ns", "y_rows", "weight_ptr", "N"]
)
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
    first, aligns, indices, Cs, Ps, Ws, x_ns, x_rows, y_ns, y_rows,
    # of all
    weight_ptr,  # [levels, N, T] where WEIGHTS
    gram_ptr,  # [programs, T, T], written
    N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, END: tl.constexpr, STEP: tl.constexpr,
    C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr, WEIGHTS: tl.constexpr, VALID: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    gram_ptr += program.to(tl.int64) * T * T
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    own = pick_int(aligns, level, LEVELS)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    W = pick_int(Ws, level, LEVELS)
    x_ptr = pick(x_ptrs, level, LEVELS)
    y_ptr = pick(y_ptrs, level, LEVELS)
    sum_ptr = pick(sum_ptrs, level, LEVELS)
    x_row = pick_int(x_rows, level, LEVELS)
    for align in tl.static_range(ALIGN, END, STEP):
        if align == own:
            C = pick_int(Cs, level, LEVELS) * (align if C_UNIT else 1)
            P = pick_int(Ps, level, LEVELS) * (align if P_UNIT else 1)
            tiles = tl.cdiv(P, BLOCK_P)
            blocks = tiles + BORDER
            n = (program // blocks).to(tl.int64)
            block = program % blocks
            image = x_ptr + n * pick_int(x_ns, level, LEVELS) * align
            if block < tiles:
                _mask_tile(
                    n, block, tiles, image, pick(token_ptrs, level, LEVELS), pick(bias_ptrs, level, LEVELS),
                    pick(valid_ptrs, level, LEVELS), weight_ptr + (index * N + n) * T,
                    pick(mask_ptrs, level, LEVELS), pick(total_ptrs, level, LEVELS), gram_ptr,
                    y_ptr + n * pick_int(y_ns, level, LEVELS) * align, C, P, x_row, pick_int(y_rows, level, LEVELS),
                    WEIGHTED, WEIGHTS, VALID, BIASED, ACC, T, TP, SPLIT, FAST, Y_FAST, align, WIDE, UPCAST,
                    BLOCK_C, BLOCK_P, STAGES,
                )  # fmt: skip
            elif WEIGHTED:
                _border_sum(
                    block - tiles + 1, image, sum_ptr + n * 9 * C, P // W, W, C, x_row,
                    ACC, FAST, align, WIDE, BLOCK_C, BLOCK_P,
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


@triton.jit(do_not_specialize=["first", "aligns", "indices", "Cs", "Ps", "x_ns", "x_rows", "y_ns", "y_rows", "weight_ptr", "N"])
def gate_kernel(
    # of every level
    x_ptrs,  # [N, C, P] by strides
    mask_ptrs,  # [N, T, P]
    y_ptrs,  # [N, C, P] by strides, written
    first, aligns, indices, Cs, Ps, x_ns, x_rows, y_ns, y_rows,
    # of all
    weight_ptr,  # [levels, N, T]
    N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, END: tl.constexpr, STEP: tl.constexpr,
    C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = x * sum_t weight * mask."""
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    own = pick_int(aligns, level, LEVELS)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    x_ptr = pick(x_ptrs, level, LEVELS)
    y_ptr = pick(y_ptrs, level, LEVELS)
    mask_ptr = pick(mask_ptrs, level, LEVELS)
    x_row = pick_int(x_rows, level, LEVELS)
    y_row = pick_int(y_rows, level, LEVELS)
    token = tl.arange(0, TP)
    real = token < T
    for align in tl.static_range(ALIGN, END, STEP):
        if align == own:
            C = pick_int(Cs, level, LEVELS) * (align if C_UNIT else 1)
            P = pick_int(Ps, level, LEVELS) * (align if P_UNIT else 1)
            n, c, p = tile_of(program, C, P, BLOCK_C, BLOCK_P)
            inside = p < P
            mask = (c < C)[:, None] & inside[None, :]
            x_at = x_ptr + n * pick_int(x_ns, level, LEVELS) * align + tile_offsets(c, p, x_row, FAST, align, WIDE)
            y_at = y_ptr + n * pick_int(y_ns, level, LEVELS) * align + tile_offsets(c, p, y_row, Y_FAST, align, WIDE)
            x = tl.load(x_at, mask=mask, other=0.0)
            m = load_masks(mask_ptr, n, p, P, T, TP)
            weight = tl.load(weight_ptr + (index * N + n) * T + token, mask=real, other=0.0)
            gate = sum_rows(m * weight[:, None], P_UNIT)
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
    gx = sum_rows(products, FAST == 0)
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
    dl = mask_gradient(m, gx, dice, weight_ptr, pair_ptr, T, TP, FAST == 0)
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
        *("first", "aligns", "indices", "Cs", "Ps", "x_ns", "x_rows", "g_ns", "g_rows"),
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
    first, aligns, indices, Cs, Ps, x_ns, x_rows, g_ns, g_rows,
    # of all
    weight_ptr,  # [levels, N, T]
    pair_ptr,  # [levels, N, T, T]
    dice_ptr,  # [levels] by stride: the gradient of the Dice losses
    share_ptr,  # [programs, 2, T], written: each tile's share of the gradients of mask weights and token biases
    dice_stride, N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, END: tl.constexpr, STEP: tl.constexpr,
    C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    VALID: tl.constexpr, X_GRAD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, G_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    share_ptr += program.to(tl.int64) * 2 * T
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    own = pick_int(aligns, level, LEVELS)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    x_ptr = pick(x_ptrs, level, LEVELS)
    g_ptr = pick(g_ptrs, level, LEVELS)
    dice = tl.load(dice_ptr + index * dice_stride)
    for align in tl.static_range(ALIGN, END, STEP):
        if align == own:
            C = pick_int(Cs, level, LEVELS) * (align if C_UNIT else 1)
            P = pick_int(Ps, level, LEVELS) * (align if P_UNIT else 1)
            tiles = tl.cdiv(P, BLOCK_P)
            n = (program // tiles).to(tl.int64)
            _token_gradient_tile(
                n, program % tiles, tiles, g_ptr + n * pick_int(g_ns, level, LEVELS) * align,
                x_ptr + n * pick_int(x_ns, level, LEVELS) * align, pick(mask_ptrs, level, LEVELS),
                pick(valid_ptrs, level, LEVELS),
                weight_ptr + (index * N + n) * T, pair_ptr + (index * N + n) * T * T, dice, pick(gx_ptrs, level, LEVELS),
                share_ptr, pick(token_ptrs, level, LEVELS), C, P,
                pick_int(x_rows, level, LEVELS), pick_int(g_rows, level, LEVELS),
                VALID, X_GRAD, ACC, T, TP, SPLIT, FAST, G_FAST, align, WIDE, UPCAST, BLOCK_C, BLOCK_P, STAGES,
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
        *("first", "aligns", "indices", "Cs", "Ps", "Ws", "g_ns", "g_rows", "d_ns", "d_rows"),
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
    first, aligns, indices, Cs, Ps, Ws, g_ns, g_rows, d_ns, d_rows,
    # of all
    weight_ptr,  # [levels, N, T]
    pair_ptr,  # [levels, N, T, T]
    dice_ptr,  # [levels] by stride: the gradient of the Dice losses
    dice_stride, N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, END: tl.constexpr, STEP: tl.constexpr,
    C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    VALID: tl.constexpr, WEIGHTED: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, G_FAST: tl.constexpr, D_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = g * sum_t weight * mask + sum_t dl * token + the path through the mask weights."""
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    own = pick_int(aligns, level, LEVELS)
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
    for align in tl.static_range(ALIGN, END, STEP):
        if align == own:
            C = pick_int(Cs, level, LEVELS) * (align if C_UNIT else 1)
            P = pick_int(Ps, level, LEVELS) * (align if P_UNIT else 1)
            n, c, p = tile_of(program, C, P, BLOCK_C, BLOCK_P)
            inside = p < P
            mask = (c < C)[:, None] & inside[None, :]
            g_at = g_ptr + n * pick_int(g_ns, level, LEVELS) * align + tile_offsets(c, p, g_row, G_FAST, align, WIDE)
            d_at = d_ptr + n * pick_int(d_ns, level, LEVELS) * align + tile_offsets(c, p, d_row, D_FAST, align, WIDE)
            g = tl.load(g_at, mask=mask, other=0.0)
            gx = tl.load(gx_ptr + n * P + p, mask=inside, other=0.0)
            m = load_masks(mask_ptr, n, p, P, T, TP)
            image = index * N + n
            gate = sum_rows(m * tl.load(weight_ptr + image * T + token, mask=real, other=0.0)[:, None], P_UNIT)
            dl = mask_gradient(m, gx, dice, weight_ptr + image * T, pair_ptr + image * T * T, T, TP, P_UNIT)
            d = g.to(gate.dtype) * gate[None, :]
            for j in range(T):
                row = tl.load(token_ptr + j * C + c, mask=c < C, other=0.0).to(gate.dtype)
                d += row[:, None] * pick_row(dl, j, TP, P_UNIT)[None, :]
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


def forward(features: Sequence[Tensor], options: LearnOptions, dice: Tensor, kept: LearnKept) -> list[Tensor]:
    """Masked features in the dtype and, where they are dense, the strides of ``features``; fills ``dice [levels, N]``
    and ``kept``."""
    (weights, pairs, masks, sums), valid = kept, options.valid
    launch.check_device(dice)
    n, t = weights.shape[1:]
    masked = [torch.empty_like(x) for x in features]
    if n == 0:
        return masked
    for used, given in zip(weights, options.weights, strict=False):
        used.copy_(given)
    features, written = [launch.addressable(x) for x in features], [launch.writable(y) for y in masked]
    tokens, token_bias, pool_rows, pool_bias = ([x.contiguous() for x in field] for field in options.tables)
    weighted = len(pool_rows) > 0
    sizes = [(height, x.shape[2] // height) for x, height in zip(features, options.heights, strict=True)]
    border = BORDER if weighted else 0
    common = {
        "WEIGHTED": weighted, "WEIGHTS": len(options.weights) > 0, "ACC": launch.acc_type(masks[0]), "T": t, "BORDER": border,
    }  # fmt: skip
    with launch.device_of(dice):
        for group in launch.groups(features, written, parameters=[tokens, token_bias, pool_rows, pool_bias]):
            x = group.own(features)
            hs, ws = zip(*group.own(sizes), strict=True)
            config = group.config("mask_kernel", t, features)
            tiles = [tuning.ceil_div(h * w, config.block_p) for h, w in zip(hs, ws, strict=True)]
            totals = [weights.new_empty((n, k, level.shape[1]) if weighted else 0) for k, level in zip(tiles, x, strict=True)]
            first, programs = launch.first_programs([n * (k + border) for k in tiles])
            grams = weights.new_empty((programs, t, t))
            launch.run(
                mask_kernel, programs,
                *group.addresses(features, tokens, token_bias, valid, masks), launch.per_level(totals),
                *group.addresses(sums or masks, written),
                *launch.tables(first, group.aligns, group.levels), *group.lengths(features), launch.table(ws),
                *group.strides(features, written), weights, grams, n,
                VALID=len(valid) > 0, BIASED=len(token_bias) > 0, TP=tuning.token_rows(t), SPLIT=launch.split(x[0]),
                FAST=group.fast[0], Y_FAST=group.fast[1], UPCAST=launch.INTERPRETED,
                BLOCK_C=config.block_c, BLOCK_P=config.block_p, STAGES=config.num_stages, **config.program,
                **group.constants, **common,
            )  # fmt: skip
            launch.run(
                finish_kernel, len(x) * n,
                launch.per_level(totals), *group.addresses(sums or masks, pool_rows, pool_bias),
                *launch.tables(first, (level.shape[1] for level in x), hs, ws, group.levels),
                grams, weights, pairs, dice, n, EPS=DICE_EPS,
                LEVELS=len(x), STANDARD=weighted and pool_bias[0].dim() == 2, TP=tuning.power_of_2(t),
                TILE=config.block_p, **tuning.add_blocks(tuning.power_of_2(t), dice.dtype.itemsize), **common,
            )  # fmt: skip
        if weighted:
            launch_gate(features, masks, weights, written)
    return launch.written_to(masked, written)


def launch_gate(features: Sequence[Tensor], masks: Sequence[Tensor], weights: Tensor, written: Sequence[Tensor]) -> None:
    """Writes the masked features of levels with mask weights."""
    n, t = weights.shape[1:]
    for group in launch.groups(features, written):
        x = group.own(features)
        config = group.config("gate_kernel", t, features)
        first, programs = launch.first_programs([n * launch.tiles(level, config) for level in x])
        launch.run(
            gate_kernel, programs,
            *group.addresses(features, masks, written),
            *launch.tables(first, group.aligns, group.levels), *group.lengths(features),
            *group.strides(features, written), weights, n,
            T=t, TP=tuning.power_of_2(t), FAST=group.fast[0], Y_FAST=group.fast[1],
            BLOCK_C=config.block_c, BLOCK_P=config.block_p, **config.program, **group.constants,
        )  # fmt: skip


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
    n, t = weights.shape[1:]
    result = [torch.empty_like(x) for x in features] if need_features else []
    if n == 0:
        for each in (*to_tables, to_weights):
            for gradient in each:
                gradient.zero_()
        return result
    tokens, _, pool_rows, _ = options.tables
    to_tokens, to_token_bias, to_rows, to_bias = to_tables
    weighted = len(pool_rows) > 0
    grads, features = [launch.addressable(g) for g in grads], [launch.addressable(x) for x in features]
    tokens, pool_rows = [x.contiguous() for x in tokens], [x.contiguous() for x in pool_rows]
    sizes = [(height, x.shape[2] // height) for x, height in zip(features, options.heights, strict=True)]
    gx = [weights.new_empty((n, x.shape[2])) for x in features if need_features]
    to_sums = [torch.empty_like(s) for s in sums if need_features]
    common = {"X_GRAD": need_features, "ACC": launch.acc_type(weights), "T": t, "TP": tuning.token_rows(t)}
    with launch.device_of(weights):
        for group in launch.groups(features, grads, parameters=[to_tokens, to_token_bias, to_rows, to_bias]):
            x = group.own(features)
            hs, ws = zip(*group.own(sizes), strict=True)
            config = group.config("token_gradient_kernel", t, features, grads)
            tiles = [tuning.ceil_div(level.shape[2], config.block_p) for level in x]
            token_shares = [weights.new_empty((n, k, t, level.shape[1])) for k, level in zip(tiles, x, strict=True)]
            first, programs = launch.first_programs([n * k for k in tiles])
            shares = weights.new_empty((programs, 2, t))
            launch.run(
                token_gradient_kernel, programs,
                *group.addresses(features, grads, masks, options.valid, gx), launch.per_level(token_shares),
                *launch.tables(first, group.aligns, group.levels), *group.lengths(features),
                *group.strides(features, grads), weights, pairs, grad_dice, shares, grad_dice.stride(0), n,
                VALID=len(options.valid) > 0, SPLIT=launch.split(x[0]),
                FAST=group.fast[0], G_FAST=group.fast[1], UPCAST=launch.INTERPRETED,
                BLOCK_C=config.block_c, BLOCK_P=config.block_p, STAGES=config.num_stages, **config.program,
                **group.constants, **common,
            )  # fmt: skip
            for i, start, k in zip(group.levels, first, tiles, strict=True) if to_weights else ():
                of_masks = shares[start : start + n * k, 0].unflatten(0, (n, k))
                torch.sum(of_masks, 1, out=to_weights[i])
            blocks = tuning.share_blocks(common["TP"], weights.dtype.itemsize)
            roles = t + weighted
            adding, programs = launch.first_programs(
                [roles * tuning.ceil_div(level.shape[1], blocks["BLOCK_C"]) for level in x]
            )
            launch.run(
                add_shares_kernel, programs,
                launch.per_level(token_shares),
                *group.addresses(sums or masks, pool_rows, to_tokens, to_token_bias, to_rows, to_bias, to_sums),
                *launch.tables(first, adding, group.levels, (level.shape[1] for level in x), hs, ws), shares, weights, n,
                LEVELS=len(x), WEIGHTED=weighted, BIASED=len(to_token_bias) > 0,
                STANDARD=weighted and to_bias[0].dim() == 2, TILE=config.block_p, **blocks, **common,
            )  # fmt: skip
        if need_features:
            _feature_gradient(grads, grad_dice, gx, masks, options.valid, weights, pairs, tokens, to_sums, sizes, result)
    return result


def _feature_gradient(
    grads: Sequence[Tensor],
    grad_dice: Tensor,
    gx: Sequence[Tensor],
    masks: Sequence[Tensor],
    valid: Sequence[Tensor],
    weights: Tensor,
    pairs: Tensor,
    tokens: Sequence[Tensor],
    to_sums: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    result: Sequence[Tensor],
) -> None:
    n, t = weights.shape[1:]
    written = [launch.writable(d) for d in result]
    for group in launch.groups(grads, written, parameters=[tokens]):
        g = group.own(grads)
        config = group.config("feature_gradient_kernel", t, written, grads, axis=group.fast[1])
        first, programs = launch.first_programs([n * launch.tiles(level, config) for level in g])
        launch.run(
            feature_gradient_kernel, programs,
            *group.addresses(grads, gx, masks, valid, tokens, to_sums, written),
            *launch.tables(first, group.aligns, group.levels), *group.lengths(grads),
            launch.table(w for _, w in group.own(sizes)), *group.strides(grads, written),
            weights, pairs, grad_dice, grad_dice.stride(0), n,
            VALID=len(valid) > 0, WEIGHTED=len(to_sums) > 0, T=t, TP=tuning.power_of_2(t),
            G_FAST=group.fast[0], D_FAST=group.fast[1],
            BLOCK_C=config.block_c, BLOCK_P=config.block_p, **config.program, **group.constants,
        )  # fmt: skip
    launch.written_to(result, written)
