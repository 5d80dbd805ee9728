"""Stage 2 on Triton: loss and gradient of masked feature reconstruction.

Forward reads student and teacher once: a program takes all channels of BLOCK_P pixels of an image and writes their masks and
three partial sums per token, A = sum m^2 d, B = sum m and Z = sum_p (pool_rows[0] @ t). Programs over the image's border add
what the 3x3 windows of the mask weighting module miss there (method.md, identity 2). One program per image then adds the
partial sums in a fixed order (no atomics) and writes the loss and the gradient's coefficients. Backward reads student,
teacher and masks and writes the gradient: 5 passes over a feature tensor in all.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tuning
from .tiles import add_projection, join_split, load_rows, reconstructed, sigmoid, tile_offsets

_SIZES = ["C_Q", "P_Q", "tiles", "partials"]
_STRIDES = ["s_n", "s_c", "s_p", "t_n", "t_c", "t_p"]


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, "warmup", "step_ptr"])
def forward_kernel(
    s_ptr,  # [N, C, P] by strides
    t_ptr,  # [N, C, P] by strides
    token_ptr,  # [T, C]
    raw_token_ptr,  # [T, C]: the tokens for t, which is not standardised
    raw_bias_ptr,  # [T]
    affine_ptr,  # [2, C]: mean and 1 / std of t
    pool_ptr,  # [9, T, C], strip 0 is used here
    step_ptr,  # int64 scalar
    mask_ptr,  # [N, T, P]
    part_ptr,  # [N, partials, 3, T]
    warmup, C_Q, P_Q, tiles, partials, s_n, s_c, s_p, t_n, t_c, t_p,
    CUSTOM: tl.constexpr, WARMUP: tl.constexpr, WEIGHTED: tl.constexpr, STANDARD: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, S_SPLIT: tl.constexpr, T_SPLIT: tl.constexpr,
    S_FAST: tl.constexpr, T_FAST: tl.constexpr, C_ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    C = C_Q * C_ALIGN
    P = P_Q * P_ALIGN
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    s_ptr += n * s_n * ALIGN
    t_ptr += n * t_n * ALIGN
    logits = tl.zeros((T_SPLIT * TP, BLOCK_P), ACC)
    pooled = tl.zeros((T_SPLIT * TP, BLOCK_P), ACC)
    own = tl.zeros((S_SPLIT * TP, BLOCK_P), ACC)
    squares = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        t = tl.load(t_ptr + tile_offsets(c, p, t_c, t_p, T_FAST, ALIGN, WIDE), mask=mask, other=0.0)
        s = tl.load(s_ptr + tile_offsets(c, p, s_c, s_p, S_FAST, ALIGN, WIDE), mask=mask, other=0.0)
        logits = add_projection(logits, load_rows(raw_token_ptr, c, C, t.dtype, T, TP, T_SPLIT), t, ACC, UPCAST)
        if WEIGHTED:
            pooled = add_projection(pooled, load_rows(pool_ptr, c, C, t.dtype, T, TP, T_SPLIT), t, ACC, UPCAST)
        if CUSTOM:
            own = add_projection(own, load_rows(token_ptr, c, C, s.dtype, T, TP, S_SPLIT), s, ACC, UPCAST)
        difference = s.to(ACC) - reconstructed(t, affine_ptr, c, C, STANDARD, ACC)
        squares += difference * difference
    token = tl.arange(0, TP)
    real = token < T
    scores = join_split(logits, TP, T_SPLIT, BLOCK_P)
    if STANDARD:
        scores += tl.load(raw_bias_ptr + token, mask=real, other=0.0).to(ACC)[:, None]
    m = sigmoid(scores)
    if CUSTOM:
        followed = m * sigmoid(join_split(own, TP, S_SPLIT, BLOCK_P))
        if WARMUP:
            m = tl.where(tl.load(step_ptr) >= warmup, followed, m)
        else:
            m = followed
    m = tl.where(inside[None, :], m, 0.0)
    d = tl.sum(squares, axis=0)
    tl.store(mask_ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :], m, mask=real[:, None] & inside[None, :])
    part_ptr += (n * partials + tile) * 3 * T
    tl.store(part_ptr + token, tl.sum(m * m * d[None, :], axis=1), mask=real)
    tl.store(part_ptr + T + token, tl.sum(m, axis=1), mask=real)
    if WEIGHTED:
        z = tl.sum(join_split(pooled, TP, T_SPLIT, BLOCK_P), axis=1)
        tl.store(part_ptr + 2 * T + token, z, mask=real)


@triton.jit(do_not_specialize=["H", "W", "C_Q", "tiles", "partials", "t_n", "t_c", "t_p"])
def border_kernel(
    t_ptr,  # [N, C, P] by strides
    pool_ptr,  # [9, T, C], strips 1 to 8 are used here
    part_ptr,  # [N, partials, 3, T], rows from `tiles` on
    H, W, C_Q, tiles, partials, t_n, t_c, t_p,
    ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, C_ALIGN: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One run of border pixels: Z += pool_rows[strip] @ t; the order of the strips is that of ``_eager.STRIPS``."""
    C = C_Q * C_ALIGN
    blocks = partials - tiles
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    across = tl.cdiv(W, BLOCK_P)
    down = tl.cdiv(H, BLOCK_P)
    corner = block - 2 * across - 2 * down
    horizontal = block < 2 * across
    index = tl.where(horizontal, block, block - 2 * across)
    run = tl.where(horizontal, across, down)
    second = index >= run  # bottom rather than top, right rather than left
    start = (index % run) * BLOCK_P
    length = tl.where(horizontal, W, H)
    step = tl.where(horizontal, 1, W)
    first = tl.where(second, tl.where(horizontal, (H - 1) * W, W - 1), 0)
    strip = tl.where(horizontal, 1, 3) + second.to(tl.int32)
    if corner >= 0:
        start = 0
        length = 1
        first = (corner // 2) * (H - 1) * W + (corner % 2) * (W - 1)
        strip = 5 + corner
    along = start + tl.arange(0, BLOCK_P)
    inside = along < length
    p = first + along * step
    t_ptr += n * t_n * ALIGN
    pool_ptr += strip * T * C
    z = tl.zeros((SPLIT * TP, BLOCK_P), ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        t = tl.load(t_ptr + tile_offsets(c, p, t_c, t_p, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        z = add_projection(z, load_rows(pool_ptr, c, C, t.dtype, T, TP, SPLIT), t, ACC, UPCAST)
    token = tl.arange(0, TP)
    real = token < T
    part_ptr += (n * partials + tiles + block) * 3 * T
    nothing = tl.zeros((TP,), ACC)
    tl.store(part_ptr + token, nothing, mask=real)
    tl.store(part_ptr + T + token, nothing, mask=real)
    tl.store(part_ptr + 2 * T + token, tl.sum(join_split(z, TP, SPLIT, BLOCK_P), axis=1), mask=real)


@triton.jit(do_not_specialize=["N", "C", "H", "W", "partials", "loss_ptr", "coefficient_ptr"])
def finish_kernel(
    part_ptr,  # [N, partials, 3, T]
    bias_ptr,  # [T], [4, T] where STANDARD
    loss_ptr,  # [N]
    coefficient_ptr,  # [N, T]
    N, C, H, W, partials, weight_high, weight_low, eps_high, eps_low,
    WEIGHTED: tl.constexpr, STANDARD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, TP)
    real = token < T
    row = tl.arange(0, BLOCK)
    part_ptr += n * partials * 3 * T
    a = tl.zeros((BLOCK, TP), ACC)
    b = tl.zeros((BLOCK, TP), ACC)
    z = tl.zeros((BLOCK, TP), ACC)
    for first in range(0, partials, BLOCK):
        mask = (first + row < partials)[:, None] & real[None, :]
        at = part_ptr + (first + row)[:, None] * (3 * T) + token[None, :]
        a += tl.load(at, mask=mask, other=0.0)
        b += tl.load(at + T, mask=mask, other=0.0)
        if WEIGHTED:
            z += tl.load(at + 2 * T, mask=mask, other=0.0)
    if WEIGHTED:
        score = tl.sum(z, axis=0) / (H * W) + tl.load(bias_ptr + token, mask=real, other=0.0).to(ACC)
        if STANDARD:  # what the mean adds to the sums of the border
            score += tl.load(bias_ptr + T + token, mask=real, other=0.0).to(ACC) / H
            score += tl.load(bias_ptr + 2 * T + token, mask=real, other=0.0).to(ACC) / W
            score += tl.load(bias_ptr + 3 * T + token, mask=real, other=0.0).to(ACC) / (H * W)
        score = tl.where(real, score, float("-inf"))
        weight = tl.exp(score - tl.max(score, axis=0))
        weight = weight / tl.sum(weight, axis=0)
    else:
        weight = tl.full((TP,), 1.0, ACC) / T
    # a float argument arrives as float32: float64 takes it in two parts
    factor = (weight * weight_high + weight * weight_low) / N / C
    share = factor / (tl.sum(b, axis=0) + eps_high + eps_low)
    share = tl.where(real, share, 0.0)
    tl.store(loss_ptr + n, tl.sum(share * tl.sum(a, axis=0), axis=0))
    tl.store(coefficient_ptr + n * T + token, 2.0 * share, mask=real)


@triton.jit(do_not_specialize=["C_Q", "P_Q", "tiles", *_STRIDES, "g_n", "g_c", "g_p", "up_n", "up_ptr", "coefficient_ptr"])
def backward_kernel(
    up_ptr,  # [N] by stride
    s_ptr,  # [N, C, P] by strides
    t_ptr,  # [N, C, P] by strides
    mask_ptr,  # [N, T, P]
    coefficient_ptr,  # [N, T]
    affine_ptr,  # [2, C]: mean and 1 / std of t
    g_ptr,  # [N, C, P] by strides, written
    up_n, C_Q, P_Q, tiles, s_n, s_c, s_p, t_n, t_c, t_p, g_n, g_c, g_p,
    STANDARD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr,
    S_FAST: tl.constexpr, T_FAST: tl.constexpr, G_FAST: tl.constexpr,
    C_ALIGN: tl.constexpr, P_ALIGN: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_student = upstream * (s - t) * sum_t coefficient * m^2."""
    C = C_Q * C_ALIGN
    P = P_Q * P_ALIGN
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = p < P
    mask = (c < C)[:, None] & inside[None, :]
    s = tl.load(s_ptr + n * s_n * ALIGN + tile_offsets(c, p, s_c, s_p, S_FAST, ALIGN, WIDE), mask=mask, other=0.0)
    t = tl.load(t_ptr + n * t_n * ALIGN + tile_offsets(c, p, t_c, t_p, T_FAST, ALIGN, WIDE), mask=mask, other=0.0)
    token = tl.arange(0, TP)
    real = token < T
    m = tl.load(
        mask_ptr + n * T * P + token[:, None].to(tl.int64) * P + p[None, :],
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )
    coefficient = tl.load(coefficient_ptr + n * T + token, mask=real, other=0.0) * tl.load(up_ptr + n * up_n)
    scale = tl.sum(m * m * coefficient[:, None], axis=0)
    g = (s.to(ACC) - reconstructed(t, affine_ptr, c, C, STANDARD, ACC)) * scale[None, :]
    g_at = g_ptr + n * g_n * ALIGN + tile_offsets(c, p, g_c, g_p, G_FAST, ALIGN, WIDE)
    tl.store(g_at, g.to(g_ptr.dtype.element_ty), mask=mask)


def forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    pool_rows: Sequence[Tensor],
    pool_bias: Sequence[Tensor],
    raw_tokens: Sequence[Tensor],
    raw_bias: Sequence[Tensor],
    affine: Sequence[Tensor],
    heights: Sequence[int],
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    loss_weight: float,
    eps: float,
    loss: Tensor,
    masks: Sequence[Tensor],
    coefficients: Tensor,
) -> None:
    """Fill ``loss [levels, N]``, ``masks`` (one ``[N, T, P]`` per level) and ``coefficients [levels, N, T]``."""
    launch.check_device(loss)
    n, num_tokens = coefficients.shape[1:]
    if n == 0:
        return
    acc = launch.TL_DTYPE[loss.dtype]
    weighted, standard = len(pool_rows) > 0, len(affine) > 0
    with launch.device_of(loss):
        for i, (s, t) in enumerate(zip(map(launch.addressable, student), map(launch.addressable, teacher), strict=True)):
            _, c, p = s.shape
            height, width = heights[i], p // heights[i]
            config = tuning.forward_config(max(s.dtype.itemsize, t.dtype.itemsize), num_tokens, launch.fast(s))
            rows = tuning.token_rows(num_tokens)
            tiles = triton.cdiv(p, config.block_p)
            borders = 2 * (triton.cdiv(width, config.block_p) + triton.cdiv(height, config.block_p)) + 4
            partials = tiles + (borders if weighted else 0)
            part = loss.new_empty((n, partials, 3, num_tokens))
            layout = launch.layout(s, t)
            token = tokens[i].contiguous()
            pool = pool_rows[i].contiguous() if weighted else token
            raw = [x[i].contiguous() for x in (raw_tokens, raw_bias, affine)] if standard else [token] * 3
            step = warmup_step if warmup_step is not None else token
            t_strides = launch.quotients(t, layout["ALIGN"])
            forward_kernel[(n * tiles,)](
                s, t, token, *raw, pool, step, masks[i], part,
                custom_mask_warmup, c // layout["C_ALIGN"], p // layout["P_ALIGN"], tiles, partials,
                *launch.quotients(s, layout["ALIGN"]), *t_strides,
                CUSTOM=custom_mask, WARMUP=warmup_step is not None, WEIGHTED=weighted, STANDARD=standard, ACC=acc,
                T=num_tokens, TP=rows, S_SPLIT=launch.split(s), T_SPLIT=launch.split(t),
                S_FAST=launch.fast(s), T_FAST=launch.fast(t), **layout,
                UPCAST=launch.INTERPRETED, BLOCK_C=config.block_c, BLOCK_P=config.block_p, STAGES=config.num_stages,
                num_warps=config.num_warps,
            )  # fmt: skip
            if weighted:
                border_kernel[(n * borders,)](
                    t, pool, part, height, width, c // layout["C_ALIGN"], tiles, partials, *t_strides,
                    ACC=acc, T=num_tokens, TP=rows, SPLIT=launch.split(t), FAST=launch.fast(t),
                    C_ALIGN=layout["C_ALIGN"], ALIGN=layout["ALIGN"], WIDE=layout["WIDE"], UPCAST=launch.INTERPRETED,
                    BLOCK_C=config.block_c, BLOCK_P=config.block_p, num_warps=config.num_warps,
                )  # fmt: skip
            finish_kernel[(n,)](
                part, pool_bias[i].contiguous() if weighted else token, loss[i], coefficients[i],
                n, c, height, width, partials, *launch.two_parts(loss_weight), *launch.two_parts(eps),
                WEIGHTED=weighted, STANDARD=weighted and pool_bias[i].dim() == 2, ACC=acc,
                T=num_tokens, TP=rows, BLOCK=tuning.finish_block(rows), num_warps=4,
            )  # fmt: skip


def backward(
    grad: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[Tensor],
    coefficients: Tensor,
    affine: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of every level for the student, in its dtype and, where it is dense, its strides."""
    launch.check_device(coefficients)
    n, num_tokens = coefficients.shape[1:]
    grads = [torch.empty_like(s) for s in student]
    if n == 0:
        return grads
    with launch.device_of(coefficients):
        for i, (s, t) in enumerate(zip(map(launch.addressable, student), map(launch.addressable, teacher), strict=True)):
            _, c, p = s.shape
            g = launch.writable(grads[i])
            config = tuning.backward_config(s.dtype.itemsize, num_tokens, launch.fast(s))
            tiles = triton.cdiv(p, config.block_p)
            layout = launch.layout(s, t, g)
            backward_kernel[(n * tiles, triton.cdiv(c, config.block_c))](
                grad[i], s, t, masks[i], coefficients[i], affine[i].contiguous() if affine else coefficients, g,
                grad.stride(1), c // layout["C_ALIGN"], p // layout["P_ALIGN"], tiles,
                *(q for x in (s, t, g) for q in launch.quotients(x, layout["ALIGN"])),
                STANDARD=len(affine) > 0, ACC=launch.TL_DTYPE[coefficients.dtype],
                T=num_tokens, TP=triton.next_power_of_2(num_tokens),
                S_FAST=launch.fast(s), T_FAST=launch.fast(t), G_FAST=launch.fast(g), **layout,
                BLOCK_C=config.block_c, BLOCK_P=config.block_p, num_warps=config.num_warps,
            )  # fmt: skip
            if g is not grads[i]:
                grads[i].copy_(g)
    return grads
