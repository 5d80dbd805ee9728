"""Stage 1 on Triton: masked features and Dice sums of a frozen teacher's features, and the gradients of the tokens.

Forward: one read of x gives the masks, the sums of every channel and the Gram sums of every pair of masks. Without mask weights
the same kernel writes y = x * sum_t m (x comes from L2 the second time: 2 passes over a feature tensor). Mask weights need sums
of the whole image before a pixel can be weighed, so with them a second kernel writes y and reads x again: 3 passes. Backward:
one kernel takes a tile of all channels, forms g.x per pixel, then the gradient of the masks, then the tile's share of the token
gradient (x comes from L2 the second time): 2 passes. A third kernel writes the gradient of x where it is wanted. All reductions
have a fixed order, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._eager import acc_dtype
from . import launch, tuning
from .tiles import add_projection, join_split, load_rows, mask_gradient, pick_row, sigmoid, tile_offsets

_STRIDES = ["x_n", "x_c", "x_p"]


@triton.jit(do_not_specialize=["C_Q", "P_Q", "tiles", *_STRIDES, "y_n", "y_c", "y_p"])
def mask_kernel(
    x_ptr,  # [N, C, P] by strides
    token_ptr,  # [T, C]
    bias_ptr,  # [T]
    mask_ptr,  # [N, T, P], written
    sum_ptr,  # [N, tiles, C], written
    gram_ptr,  # [N, tiles, T, T], written
    y_ptr,  # [N, C, P] by strides, written where not WEIGHTED
    C_Q, P_Q, tiles, x_n, x_c, x_p, y_n, y_c, y_p,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr,
    C_ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = C_Q * C_ALIGN
    P = P_Q * P_ALIGN
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    x_ptr += n * x_n * ALIGN
    sum_ptr += (n * tiles + tile) * C
    logits = tl.zeros((SPLIT * TP, BLOCK_P), ACC)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_offsets(c, p, x_c, x_p, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        logits = add_projection(logits, load_rows(token_ptr, c, C, x.dtype, T, TP, SPLIT), x, ACC, UPCAST)
        if WEIGHTED:
            tl.store(sum_ptr + c, tl.sum(x.to(ACC), axis=1), mask=c < C)
    token = tl.arange(0, TP)
    real = token < T
    scores = join_split(logits, TP, SPLIT, BLOCK_P)
    if BIASED:
        scores += tl.load(bias_ptr + token, mask=real, other=0.0).to(ACC)[:, None]
    m = tl.where(inside[None, :], sigmoid(scores), 0.0)
    tl.store(mask_ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :], m, mask=real[:, None] & inside[None, :])
    gram_ptr += (n * tiles + tile) * T * T
    for i in range(T):
        tl.store(gram_ptr + i * T + token, tl.sum(m * pick_row(m, i, TP)[None, :], axis=1), mask=real)
    if not WEIGHTED:
        gate = tl.sum(tl.where(real[:, None], m, 0.0), axis=0)
        y_ptr += n * y_n * ALIGN
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (c < C)[:, None] & inside[None, :]
            x = tl.load(x_ptr + tile_offsets(c, p, x_c, x_p, FAST, ALIGN, WIDE), mask=mask, other=0.0)
            y = (x.to(ACC) * gate[None, :]).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + tile_offsets(c, p, y_c, y_p, Y_FAST, ALIGN, WIDE), y, mask=mask)


@triton.jit(do_not_specialize=["H", "W", "C", *_STRIDES])
def border_sum_kernel(
    x_ptr,  # [N, C, P] by strides
    sum_ptr,  # [N, 9, C], strips 1 to 8 are written; their order is that of ``_eager.STRIPS``
    H, W, C, x_n, x_c, x_p,
    ACC: tl.constexpr, FAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // 8).to(tl.int64)
    strip = tl.program_id(0) % 8 + 1
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += n * x_n * ALIGN
    length = tl.where(strip < 3, W, tl.where(strip < 5, H, 1))
    step = tl.where(strip < 3, 1, W)
    bottom = (strip == 2) | (strip == 7) | (strip == 8)
    right = (strip == 4) | (strip == 6) | (strip == 8)
    first = tl.where(bottom, (H - 1) * W, 0) + tl.where(right, W - 1, 0)
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for start in range(0, length, BLOCK_P):
        along = start + tl.arange(0, BLOCK_P)
        mask = (c < C)[:, None] & (along < length)[None, :]
        at = x_ptr + tile_offsets(c, first + along * step, x_c, x_p, FAST, ALIGN, WIDE)
        total += tl.load(at, mask=mask, other=0.0).to(ACC)
    tl.store(sum_ptr + (n * 9 + strip) * C + c, tl.sum(total, axis=1), mask=c < C)


@triton.jit(do_not_specialize=["C_Q", "P_Q", "tiles", *_STRIDES, "y_n", "y_c", "y_p", "weight_ptr"])
def gate_kernel(
    x_ptr,  # [N, C, P] by strides
    mask_ptr,  # [N, T, P]
    weight_ptr,  # [N, T]
    y_ptr,  # [N, C, P] by strides, written
    C_Q, P_Q, tiles, x_n, x_c, x_p, y_n, y_c, y_p,
    T: tl.constexpr, TP: tl.constexpr, FAST: tl.constexpr, Y_FAST: tl.constexpr,
    C_ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = x * sum_t weight * mask."""
    C = C_Q * C_ALIGN
    P = P_Q * P_ALIGN
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = p < P
    mask = (c < C)[:, None] & inside[None, :]
    x = tl.load(x_ptr + n * x_n * ALIGN + tile_offsets(c, p, x_c, x_p, FAST, ALIGN, WIDE), mask=mask, other=0.0)
    token = tl.arange(0, TP)
    real = token < T
    at = mask_ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :]
    m = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
    gate = tl.sum(m * tl.load(weight_ptr + n * T + token, mask=real, other=0.0)[:, None], axis=0)
    y = x.to(gate.dtype) * gate[None, :]
    y_at = y_ptr + n * y_n * ALIGN + tile_offsets(c, p, y_c, y_p, Y_FAST, ALIGN, WIDE)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["C_Q", "P_Q", "tiles", *_STRIDES, "g_n", "g_c", "g_p", "weight_ptr", "pair_ptr"])
def token_gradient_kernel(
    g_ptr,  # [N, C, P] by strides: the gradient of y
    x_ptr,  # [N, C, P] by strides
    mask_ptr,  # [N, T, P]
    weight_ptr,  # [N, T]
    pair_ptr,  # [N, T, T]
    gx_ptr,  # [N, P], written where X_GRAD
    share_ptr,  # [N, tiles, 2, T], written: each tile's share of the gradients of mask weights and token biases
    token_ptr,  # [N, tiles, T, C], written: each tile's share of the token gradient
    C_Q, P_Q, tiles, x_n, x_c, x_p, g_n, g_c, g_p,
    X_GRAD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, G_FAST: tl.constexpr,
    C_ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = C_Q * C_ALIGN
    P = P_Q * P_ALIGN
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    x_ptr += n * x_n * ALIGN
    g_ptr += n * g_n * ALIGN
    products = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_offsets(c, p, x_c, x_p, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        g = tl.load(g_ptr + tile_offsets(c, p, g_c, g_p, G_FAST, ALIGN, WIDE), mask=mask, other=0.0)
        products += g.to(ACC) * x.to(ACC)
    gx = tl.sum(products, axis=0)
    if X_GRAD:
        tl.store(gx_ptr + n * P + p, gx, mask=inside)
    token = tl.arange(0, TP)
    real = token < T
    at = mask_ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :]
    m = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
    share_ptr += (n * tiles + tile) * 2 * T
    tl.store(share_ptr + token, tl.sum(m * gx[None, :], axis=1), mask=real)
    dl = mask_gradient(m, gx, weight_ptr + n * T, pair_ptr + n * T * T, T, TP)
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
        x = tl.load(x_ptr + tile_offsets(c, p, x_c, x_p, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        across = tl.trans(x)
        share = add_projection(tl.zeros((TP, BLOCK_C), ACC), high, across, ACC, UPCAST)
        if SPLIT == 2:
            share = add_projection(share, low, across, ACC, UPCAST)
        tl.store(token_ptr + token[:, None] * C + c[None, :], share * largest[:, None], mask=real[:, None] & (c < C)[None, :])


@triton.jit(
    do_not_specialize=["W", "H", "C_Q", "P_Q", "tiles", "g_n", "g_c", "g_p", "d_n", "d_c", "d_p", "weight_ptr", "pair_ptr"]
)
def feature_gradient_kernel(
    g_ptr,  # [N, C, P] by strides: the gradient of y
    gx_ptr,  # [N, P]
    mask_ptr,  # [N, T, P]
    weight_ptr,  # [N, T]
    pair_ptr,  # [N, T, T]
    token_ptr,  # [T, C]
    strip_ptr,  # [N, 9, C]: the gradients of the strip sums
    d_ptr,  # [N, C, P] by strides, written
    H, W, C_Q, P_Q, tiles, g_n, g_c, g_p, d_n, d_c, d_p,
    WEIGHTED: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, G_FAST: tl.constexpr, D_FAST: tl.constexpr,
    C_ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = g * sum_t weight * mask + sum_t dl * token + the path through the mask weights."""
    C = C_Q * C_ALIGN
    P = P_Q * P_ALIGN
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = p < P
    mask = (c < C)[:, None] & inside[None, :]
    g = tl.load(g_ptr + n * g_n * ALIGN + tile_offsets(c, p, g_c, g_p, G_FAST, ALIGN, WIDE), mask=mask, other=0.0)
    gx = tl.load(gx_ptr + n * P + p, mask=inside, other=0.0)
    token = tl.arange(0, TP)
    real = token < T
    at = mask_ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :]
    m = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0)
    gate = tl.sum(m * tl.load(weight_ptr + n * T + token, mask=real, other=0.0)[:, None], axis=0)
    dl = mask_gradient(m, gx, weight_ptr + n * T, pair_ptr + n * T * T, T, TP)
    d = g.to(gate.dtype) * gate[None, :]
    for i in range(T):
        row = tl.load(token_ptr + i * C + c, mask=c < C, other=0.0).to(gate.dtype)
        d += row[:, None] * pick_row(dl, i, TP)[None, :]
    if WEIGHTED:
        strip_ptr += n * 9 * C
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
    d_at = d_ptr + n * d_n * ALIGN + tile_offsets(c, p, d_c, d_p, D_FAST, ALIGN, WIDE)
    tl.store(d_at, d.to(d_ptr.dtype.element_ty), mask=mask)


def mask_pass(
    x: Tensor, tokens: Tensor, token_bias: Tensor | None, height: int, weighted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``x [N, C, P]`` -> masks ``[N, T, P]``, strip sums ``[N, 9, C]`` (empty without weighting), Gram sums ``[N, T, T]``, and
    without weighting the masked features in the dtype and, where it is dense, the strides of ``x``."""
    launch.check_device(x)
    masked = None if weighted else torch.empty_like(x)
    x = launch.addressable(x)
    y = x if masked is None else launch.writable(masked)
    (n, c, p), t = x.shape, tokens.shape[0]
    acc = acc_dtype(x.dtype)
    config = tuning.forward_config(x.dtype.itemsize, t, launch.fast(x))
    tiles = triton.cdiv(p, config.block_p)
    masks = x.new_empty((n, t, p), dtype=acc)
    grams = x.new_empty((n, tiles, t, t), dtype=acc)
    totals = x.new_empty((n, tiles, c) if weighted else 0, dtype=acc)
    sums = x.new_empty((n, 9, c) if weighted else 0, dtype=acc)
    if n == 0:
        return masks, sums, grams.sum(1), masked
    layout = launch.layout(x, y)
    strides = launch.quotients(x, layout["ALIGN"])
    common = {"ACC": launch.TL_DTYPE[acc], "FAST": launch.fast(x), "ALIGN": layout["ALIGN"], "WIDE": layout["WIDE"]}
    with launch.device_of(x):
        mask_kernel[(n * tiles,)](
            x, tokens.contiguous(), masks if token_bias is None else token_bias.contiguous(), masks, totals, grams, y,
            c // layout["C_ALIGN"], p // layout["P_ALIGN"], tiles, *strides, *launch.quotients(y, layout["ALIGN"]),
            WEIGHTED=weighted, BIASED=token_bias is not None, Y_FAST=launch.fast(y),
            T=t, TP=tuning.token_rows(t), SPLIT=launch.split(x), C_ALIGN=layout["C_ALIGN"], P_ALIGN=layout["P_ALIGN"],
            UPCAST=launch.INTERPRETED, BLOCK_C=config.block_c, BLOCK_P=config.block_p, STAGES=config.num_stages,
            num_warps=config.num_warps, **common,
        )  # fmt: skip
        if weighted:
            block = tuning.backward_config(x.dtype.itemsize, t, launch.fast(x))
            border_sum_kernel[(n * 8, triton.cdiv(c, block.block_c))](
                x, sums, height, p // height, c, *strides,
                BLOCK_C=block.block_c, BLOCK_P=block.block_p, num_warps=block.num_warps, **common,
            )  # fmt: skip
            torch.sum(totals, 1, out=sums[:, 0])
        if masked is not None and y is not masked:
            masked.copy_(y)
        return masks, sums, grams.sum(1), masked


def gate(x: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """``x * sum_t weights[n, t] masks[n, t]``, in the dtype and, where it is dense, the strides of ``x [N, C, P]``."""
    (n, c, p), t = x.shape, masks.shape[1]
    masked = torch.empty_like(x)
    if n == 0:
        return masked
    x, y = launch.addressable(x), launch.writable(masked)
    config = tuning.backward_config(x.dtype.itemsize, t, launch.fast(x))
    tiles = triton.cdiv(p, config.block_p)
    layout = launch.layout(x, y)
    with launch.device_of(x):
        gate_kernel[(n * tiles, triton.cdiv(c, config.block_c))](
            x, masks, weights, y, c // layout["C_ALIGN"], p // layout["P_ALIGN"], tiles,
            *launch.quotients(x, layout["ALIGN"]), *launch.quotients(y, layout["ALIGN"]),
            T=t, TP=triton.next_power_of_2(t), FAST=launch.fast(x), Y_FAST=launch.fast(y), **layout,
            BLOCK_C=config.block_c, BLOCK_P=config.block_p, num_warps=config.num_warps,
        )  # fmt: skip
    return masked if y is masked else masked.copy_(y)


def token_gradient(
    grad: Tensor, x: Tensor, masks: Tensor, weights: Tensor, pairs: Tensor, need_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens ``[T, C]``, token biases ``[T]`` and mask weights ``[N, T]``; ``grad . x`` if ``need_x``."""
    x, grad = launch.addressable(x), launch.addressable(grad)
    (n, c, p), t = x.shape, masks.shape[1]
    config = tuning.forward_config(max(x.dtype.itemsize, grad.dtype.itemsize), t, launch.fast(x))
    tiles = triton.cdiv(p, config.block_p)
    gx = masks.new_empty((n, p) if need_x else 0)
    shares = masks.new_empty((n, tiles, 2, t))
    token_shares = masks.new_empty((n, tiles, t, c))
    if n > 0:
        layout = launch.layout(x, grad)
        with launch.device_of(x):
            token_gradient_kernel[(n * tiles,)](
                grad, x, masks, weights, pairs, gx, shares, token_shares,
                c // layout["C_ALIGN"], p // layout["P_ALIGN"], tiles,
                *launch.quotients(x, layout["ALIGN"]), *launch.quotients(grad, layout["ALIGN"]),
                X_GRAD=need_x, ACC=launch.TL_DTYPE[masks.dtype], T=t, TP=tuning.token_rows(t), SPLIT=launch.split(x),
                FAST=launch.fast(x), G_FAST=launch.fast(grad), **layout, UPCAST=launch.INTERPRETED,
                BLOCK_C=config.block_c, BLOCK_P=config.block_p, STAGES=config.num_stages, num_warps=config.num_warps,
            )  # fmt: skip
    weight_grad, bias_grad = shares.sum(1).unbind(1)
    return token_shares.sum((0, 1)), bias_grad.sum(0), weight_grad, gx


def feature_gradient(
    grad: Tensor,
    x: Tensor,
    gx: Tensor,
    masks: Tensor,
    weights: Tensor,
    pairs: Tensor,
    tokens: Tensor,
    strips: Tensor,
    height: int,
) -> Tensor:
    """Gradient of ``x [N, C, P]``; ``strips [N, 9, C]`` is that of its strip sums (empty without weighting)."""
    (n, c, p), t = x.shape, masks.shape[1]
    result = torch.empty_like(x)
    if n == 0:
        return result
    grad, out = launch.addressable(grad), launch.writable(result)
    config = tuning.backward_config(x.dtype.itemsize, t, launch.fast(out))
    tiles = triton.cdiv(p, config.block_p)
    layout = launch.layout(grad, out)
    with launch.device_of(x):
        feature_gradient_kernel[(n * tiles, triton.cdiv(c, config.block_c))](
            grad, gx, masks, weights, pairs, tokens.contiguous(), strips, out,
            height, p // height, c // layout["C_ALIGN"], p // layout["P_ALIGN"], tiles,
            *launch.quotients(grad, layout["ALIGN"]), *launch.quotients(out, layout["ALIGN"]),
            WEIGHTED=strips.numel() > 0, T=t, TP=triton.next_power_of_2(t),
            G_FAST=launch.fast(grad), D_FAST=launch.fast(out), **layout,
            BLOCK_C=config.block_c, BLOCK_P=config.block_p, num_warps=config.num_warps,
        )  # fmt: skip
    return result if out is result else result.copy_(out)
