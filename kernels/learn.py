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
    join_split,
    load_masks,
    load_rows,
    load_valid,
    mask_gradient,
    mask_of,
    pick,
    pick_int,
    pick_row,
    place,
    tile_of,
    tile_offsets,
)


@triton.jit(do_not_specialize=["first", "Cs", "Ps", "x_ns", "x_rows", "y_ns", "y_rows", "indices", "weight_ptr", "N"])
def mask_kernel(
    # of every level
    x_ptrs,  # [N, C, P] by strides
    token_ptrs,  # [T, C]
    bias_ptrs,  # [T]
    valid_ptrs,  # [N, P] of bytes: pixels that count, where VALID
    mask_ptrs,  # [N, T, P], written
    total_ptrs,  # [N, tiles, C], written where WEIGHTED
    gram_ptrs,  # [N, tiles, T, T], written
    y_ptrs,  # [N, C, P] by strides, written where not WEIGHTED
    first, Cs, Ps, x_ns, x_rows, y_ns, y_rows, indices,
    # of all
    weight_ptr,  # [levels, N, T] where WEIGHTS
    N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr, WEIGHTS: tl.constexpr, VALID: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Masks and sums of BLOCK_P pixels, and y where not WEIGHTED."""
    program, level, C, P = place(first, Cs, Ps, LEVELS, C_UNIT, P_UNIT)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    n = (program // tl.cdiv(P, BLOCK_P)).to(tl.int64)
    p = program % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    x_ptr = pick(x_ptrs, level, LEVELS) + n * pick_int(x_ns, level, LEVELS) * ALIGN
    x_row = pick_int(x_rows, level, LEVELS)
    token_ptr = pick(token_ptrs, level, LEVELS)
    total_ptr = pick(total_ptrs, level, LEVELS) + program.to(tl.int64) * C
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
        scores += tl.load(pick(bias_ptrs, level, LEVELS) + token, mask=real, other=0.0).to(ACC)[:, None]
    counted = inside
    if VALID:
        counted = load_valid(pick(valid_ptrs, level, LEVELS), n, p, P)
    m = tl.where(counted[None, :], mask_of(scores), 0.0)
    mask_at = pick(mask_ptrs, level, LEVELS) + n * T * P + token[:, None].to(tl.int64) * P + p[None, :]
    tl.store(mask_at, m, mask=real[:, None] & inside[None, :])
    gram_ptr = pick(gram_ptrs, level, LEVELS) + program.to(tl.int64) * T * T
    for j in range(T):
        tl.store(gram_ptr + j * T + token, tl.sum(m * pick_row(m, j, TP)[None, :], axis=1), mask=real)
    if not WEIGHTED:
        if WEIGHTS:
            weighed = m * tl.load(weight_ptr + (index * N + n) * T + token, mask=real, other=0.0)[:, None]
        else:
            weighed = tl.where(real[:, None], m, 0.0)
        gate = tl.sum(weighed, axis=0)
        y_ptr = pick(y_ptrs, level, LEVELS) + n * pick_int(y_ns, level, LEVELS) * ALIGN
        y_row = pick_int(y_rows, level, LEVELS)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c < C)[:, None] & inside[None, :]
            x = tl.load(x_ptr + tile_offsets(c, p, x_row, FAST, ALIGN, WIDE), mask=mask, other=0.0)
            y = x.to(ACC) * gate[None, :]
            if VALID:
                y = tl.where(counted[None, :], y, 0.0)
            y_at = y_ptr + tile_offsets(c, p, y_row, Y_FAST, ALIGN, WIDE)
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    program, level, C, P = place(first, Cs, Ps, LEVELS, C_UNIT, P_UNIT)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    n, c, p = tile_of(program, C, P, BLOCK_C, BLOCK_P)
    mask = (c < C)[:, None] & (p < P)[None, :]
    x_ptr = pick(x_ptrs, level, LEVELS) + n * pick_int(x_ns, level, LEVELS) * ALIGN
    y_ptr = pick(y_ptrs, level, LEVELS) + n * pick_int(y_ns, level, LEVELS) * ALIGN
    x = tl.load(x_ptr + tile_offsets(c, p, pick_int(x_rows, level, LEVELS), FAST, ALIGN, WIDE), mask=mask, other=0.0)
    m = load_masks(pick(mask_ptrs, level, LEVELS), n, p, P, T, TP)
    token = tl.arange(0, TP)
    weight = tl.load(weight_ptr + (index * N + n) * T + token, mask=token < T, other=0.0)
    gate = tl.sum(m * weight[:, None], axis=0)
    y = x.to(gate.dtype) * gate[None, :]
    y_at = y_ptr + tile_offsets(c, p, pick_int(y_rows, level, LEVELS), Y_FAST, ALIGN, WIDE)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    program, level, C, P = place(first, Cs, Ps, LEVELS, C_UNIT, P_UNIT)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    n = (program // tl.cdiv(P, BLOCK_P)).to(tl.int64)
    p = program % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    x_ptr = pick(x_ptrs, level, LEVELS) + n * pick_int(x_ns, level, LEVELS) * ALIGN
    g_ptr = pick(g_ptrs, level, LEVELS) + n * pick_int(g_ns, level, LEVELS) * ALIGN
    x_row, g_row = pick_int(x_rows, level, LEVELS), pick_int(g_rows, level, LEVELS)
    share_ptr = pick(share_ptrs, level, LEVELS) + program.to(tl.int64) * 2 * T
    token_ptr = pick(token_ptrs, level, LEVELS) + program.to(tl.int64) * T * C
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
        counted = load_valid(pick(valid_ptrs, level, LEVELS), n, p, P)
        gx = tl.where(counted, gx, 0.0)
    if X_GRAD:
        tl.store(pick(gx_ptrs, level, LEVELS) + n * P + p, gx, mask=inside)
    token = tl.arange(0, TP)
    real = token < T
    m = load_masks(pick(mask_ptrs, level, LEVELS), n, p, P, T, TP)
    tl.store(share_ptr + token, tl.sum(m * gx[None, :], axis=1), mask=real)
    image = index * N + n
    dice = tl.load(dice_ptr + index * dice_stride)
    dl = mask_gradient(m, gx, dice, weight_ptr + image * T, pair_ptr + image * T * T, T, TP)
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
    program, level, C, P = place(first, Cs, Ps, LEVELS, C_UNIT, P_UNIT)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    n, c, p = tile_of(program, C, P, BLOCK_C, BLOCK_P)
    mask = (c < C)[:, None] & (p < P)[None, :]
    g_ptr = pick(g_ptrs, level, LEVELS) + n * pick_int(g_ns, level, LEVELS) * ALIGN
    d_ptr = pick(d_ptrs, level, LEVELS) + n * pick_int(d_ns, level, LEVELS) * ALIGN
    g = tl.load(g_ptr + tile_offsets(c, p, pick_int(g_rows, level, LEVELS), G_FAST, ALIGN, WIDE), mask=mask, other=0.0)
    gx = tl.load(pick(gx_ptrs, level, LEVELS) + n * P + p, mask=p < P, other=0.0)
    m = load_masks(pick(mask_ptrs, level, LEVELS), n, p, P, T, TP)
    token = tl.arange(0, TP)
    image = index * N + n
    weight = tl.load(weight_ptr + image * T + token, mask=token < T, other=0.0)
    gate = tl.sum(m * weight[:, None], axis=0)
    dice = tl.load(dice_ptr + index * dice_stride)
    dl = mask_gradient(m, gx, dice, weight_ptr + image * T, pair_ptr + image * T * T, T, TP)
    d = g.to(gate.dtype) * gate[None, :]
    token_ptr = pick(token_ptrs, level, LEVELS)
    for j in range(T):
        row = tl.load(token_ptr + j * C + c, mask=c < C, other=0.0).to(gate.dtype)
        d += row[:, None] * pick_row(dl, j, TP)[None, :]
    if WEIGHTED:
        strip_ptr = pick(to_sum_ptrs, level, LEVELS) + n * 9 * C
        W = pick_int(Ws, level, LEVELS)
        H = P // W
        h = p // W
        w = p % W
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
        d = tl.where(load_valid(pick(valid_ptrs, level, LEVELS), n, p, P)[None, :], d, 0.0)
    d_at = d_ptr + tile_offsets(c, p, pick_int(d_rows, level, LEVELS), D_FAST, ALIGN, WIDE)
    tl.store(d_at, d.to(d_ptr.dtype.element_ty), mask=mask)


class _Variant(NamedTuple):
    """Everything that a pass depends on, except the form of its tensors."""

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


# Groups, tiles of an image of each level, and numbers of the first and the last kernel
_Launches = list[tuple[launch.Group, list[int], launch.Numbers, launch.Numbers | None]]  # the last where it is needed


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
    maps, launches = _plan_forward(*looks, launch.dtypes(*parameters), variant, dice.device, tuning.generation())
    features, written = launch.readable(features, maps[0]), launch.writable(masked, maps[1])
    with launch.device_of(dice):
        for group, counts, tiles, gate in launches:
            totals = [weights.new_empty((n, k, m.c)) for k, m in zip(counts, group.maps[0], strict=True)]
            products = [weights.new_empty((n, k, t, t)) for k in counts]
            addresses = [
                *group.addresses(features, tokens, token_bias, options.valid, masks),
                *map(launch.per_level, (totals, products)),
                *group.addresses(written),
            ]
            launch.run(mask_kernel, tiles, addresses, weights, n)
            for i, total, product in zip(group.levels, totals, products, strict=True):
                torch.sum(product, 1, out=grams[i])
                dice[i] = _eager.dice_of_gram(grams[i])
                if variant.weighted:
                    size = variant.heights[i], maps[0][i].p // variant.heights[i]
                    sums[i].copy_(_eager.strip_sums(features[i], *size, total.sum(1)))
                    weights[i] = _eager.weights_of_sums(sums[i], pool_rows[i], pool_bias[i], *size)
                elif not variant.given_weights:
                    weights[i] = 1.0
            if variant.weighted:
                launch.run(gate_kernel, gate, group.addresses(features, masks, written), weights, n)
    return launch.copied_back(masked, written)


@functools.lru_cache(launch.PLANS)
def _plan_forward(
    features: launch.Looks,
    masked: launch.Looks,
    parameters: Sequence[Sequence[torch.dtype]],
    variant: _Variant,
    device: torch.device,
    _generation: int,
) -> tuple[list[list[launch.Map]], _Launches]:
    """Features and masked features as kernels address them, and the launches of the mask and the gate kernel."""
    maps, t = launch.maps_of(features, masked), variant.num_tokens
    launches = []
    for group in launch.groups(*maps, parameters=parameters):
        x, dtype = group.maps[0], group.maps[0][0].dtype
        axes = {"T": t, "FAST": group.axes[0], "Y_FAST": group.axes[1]}
        config, rows, split = group.config("mask_kernel", t, device), tuning.token_rows(t), launch.split(dtype)
        counts = launch.runs(x, config)
        tiles = launch.numbers(
            group, counts, (0, 1), group.levels, WEIGHTED=variant.weighted, WEIGHTS=variant.given_weights,
            VALID=variant.valid, BIASED=variant.biased, ACC=launch.acc_type(dtype), TP=rows, SPLIT=split,
            UPCAST=launch.INTERPRETED, STAGES=launch.stages(config, split * rows), **axes, **config.tile,
        )  # fmt: skip
        config = group.config("gate_kernel", t, device)
        gate = launch.numbers(
            group, launch.tiles(x, config), (0, 1), group.levels, TP=tuning.power_of_2(t), **axes, **config.tile
        )  # fmt: skip
        launches.append((group, counts, tiles, gate))
    return maps, launches


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
    looks = launch.looks(features), launch.looks(grads), launch.looks(result or features)
    maps, launches = _plan_backward(*looks, launch.dtypes(tokens), variant, need_features, weights.device, tuning.generation())
    features, grads = launch.readable(features, maps[0]), launch.readable(grads, maps[1])
    written = launch.writable(result, maps[2]) if need_features else []
    gx = [weights.new_empty((n, m.p)) for m in maps[0]] if need_features else []
    to_sums, of_all = list(sums), (weights, torch.stack([_pairs(gram) for gram in grams]), grad_dice, grad_dice.stride(0))
    with launch.device_of(weights):
        for group, counts, of_tokens, of_features in launches:
            token_shares = [weights.new_empty((n, k, t, m.c)) for k, m in zip(counts, group.maps[0], strict=True)]
            shares = [weights.new_empty((n, k, 2, t)) for k in counts]
            addresses = group.addresses(features, grads, masks, options.valid, gx)
            addresses += map(launch.per_level, (token_shares, shares))
            launch.run(token_gradient_kernel, of_tokens, addresses, *of_all, n)
            for i, token_share, share in zip(group.levels, token_shares, shares, strict=True):
                of_weights, of_bias = share.sum(1).unbind(1)
                to_tables.tokens[i].copy_(token_share.sum((0, 1)))
                if variant.biased:
                    to_tables.token_bias[i].copy_(of_bias.sum(0))
                if to_weights:
                    to_weights[i].copy_(of_weights)
                if variant.weighted:
                    to_sums[i] = _sums_gradient(i, of_weights, options, kept, to_tables)
            if need_features:
                addresses = group.addresses(grads, gx, masks, options.valid, tokens, to_sums, written)
                launch.run(feature_gradient_kernel, of_features, addresses, *of_all, n)
    return launch.copied_back(result, written)


def _pairs(gram: Tensor) -> Tensor:
    """``pairs [N, T, T]``: the gradient of the Dice loss for the masks m is ``pairs @ m``; ``gram [N, T, T]``: their products.
    In closed form: inside of an operator there is no autograd."""
    n, t, _ = gram.shape
    area = torch.diagonal(gram, dim1=1, dim2=2)
    areas = area[:, :, None] + area[:, None, :] + _eager.DICE_EPS
    share = (1 - torch.eye(t, dtype=gram.dtype, device=gram.device)) / areas / max(n * t * (t - 1), 1)
    # every pair counts twice; the area of a mask is its product with itself, and falls in T - 1 pairs
    return 4 * share - 8 * torch.diag_embed((share * gram / areas).sum(2))


def _sums_gradient(i: int, of_weights: Tensor, options: LearnOptions, kept: LearnKept, to_tables: LearnTables) -> Tensor:
    """The gradient ``[N, 9, C]`` of the strip sums of level ``i``, from that of its mask weights; fills its weighting's."""
    w, height, pixels = kept.weights[i], options.heights[i], kept.masks[i].shape[2]
    to_scores = w * (of_weights - (w * of_weights).sum(1, keepdim=True))
    to_tables.pool_rows[i].copy_(torch.einsum("nt,nsc->stc", to_scores / pixels, kept.sums[i]))
    to_bias = to_scores.sum(0)
    if to_tables.pool_bias[i].dim() == 2:
        corners = to_bias / pixels
        to_bias = torch.stack([to_bias, to_bias / height, to_bias / (pixels // height), corners, corners])
    to_tables.pool_bias[i].copy_(to_bias)
    return ((to_scores / pixels)[:, None, :, None] * options.tables.pool_rows[i].to(to_scores.dtype)).sum(2)


@functools.lru_cache(launch.PLANS)
def _plan_backward(
    features: launch.Looks,
    grads: launch.Looks,
    to_features: launch.Looks,
    parameters: Sequence[Sequence[torch.dtype]],
    variant: _Variant,
    need_features: bool,
    device: torch.device,
    _generation: int,
) -> tuple[list[list[launch.Map]], _Launches]:
    """Features, upstream gradients and the features' gradients as kernels address them, and the launches of both gradients."""
    maps, t = launch.maps_of(features, grads, to_features), variant.num_tokens
    launches = []
    for group in launch.groups(*maps, parameters=parameters):
        x, dtype = group.maps[0], group.maps[0][0].dtype
        common = {"VALID": variant.valid, "T": t, "G_FAST": group.axes[1]}
        config = group.config("token_gradient_kernel", t, device)
        counts = launch.runs(x, config)
        of_tokens = launch.numbers(
            group, counts, (0, 1), group.levels, X_GRAD=need_features, ACC=launch.acc_type(dtype), TP=tuning.token_rows(t),
            SPLIT=launch.split(dtype), FAST=group.axes[0], UPCAST=launch.INTERPRETED, STAGES=config.num_stages,
            **common, **config.tile,
        )  # fmt: skip
        of_features = _of_features(group, variant, common, device) if need_features else None
        launches.append((group, counts, of_tokens, of_features))
    return maps, launches


def _of_features(group: launch.Group, variant: _Variant, common: dict[str, Any], device: torch.device) -> launch.Numbers:
    x, t = group.maps[0], variant.num_tokens
    widths = [m.p // height for m, height in zip(x, group.own(variant.heights), strict=True)]
    config = group.config("feature_gradient_kernel", t, device, of=2)
    return launch.numbers(
        group, launch.tiles(x, config), (1, 2), group.levels, widths, WEIGHTED=variant.weighted,
        TP=tuning.power_of_2(t), D_FAST=group.axes[2], **common, **config.tile,
    )  # fmt: skip
