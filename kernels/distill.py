"""Stage 2 on Triton: loss and gradient of masked feature reconstruction, one launch for all levels that are aligned alike.

Forward reads student and teacher once: a program takes all channels of BLOCK_P pixels of an image and writes their masks and
three partial sums per token, A = sum m^2 d (or sum m d) of the distances d, B = sum m and Z = sum_p (pool_rows[0] @ t). For the
cosine it also writes two numbers per pixel that the gradient needs. Programs over an image's border add what the 3x3 windows of
the mask weighting module miss there (method.md, identity 2); they follow those of the image, which is then in L2. Masks and
weights may also be given; pixels that do not count get masks of 0. A second launch with one program per level and image adds
the partial sums in a fixed order (no atomics) and writes the loss and the gradient's coefficients. Backward reads student,
teacher and masks and writes the gradient: 5 passes over a feature tensor in all.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._records import Distilled, DistillKept, DistillOptions
from . import launch, tuning
from .tiles import (
    add_projection,
    join_split,
    load_masks,
    load_rows,
    load_valid,
    mask_of,
    pick,
    pick_int,
    place,
    reconstructed,
    smooth_l1,
    tile_of,
    tile_offsets,
)


@triton.jit
def _forward_tile(
    n, tile, s_ptr, t_ptr, token_ptr, raw_token_ptr, raw_bias_ptr, affine_ptr, pool_ptr, given_ptr, valid_ptr, customised_ptr,
    mask_ptr, cosine_ptr, part_ptr, C, P, s_row, t_row,
    GIVEN: tl.constexpr, VALID: tl.constexpr, POWER: tl.constexpr, DISTANCE: tl.constexpr, BETA: tl.constexpr,
    CUSTOM: tl.constexpr, CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, STANDARD: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, S_SPLIT: tl.constexpr, T_SPLIT: tl.constexpr,
    S_FAST: tl.constexpr, T_FAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Masks and partial sums of BLOCK_P pixels; ``s_ptr`` and ``t_ptr`` are those of the image."""
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    logits = tl.zeros((T_SPLIT * TP, BLOCK_P), ACC)
    pooled = tl.zeros((T_SPLIT * TP, BLOCK_P), ACC)
    own = tl.zeros((S_SPLIT * TP, BLOCK_P), ACC)
    sums = tl.zeros((BLOCK_C, BLOCK_P), ACC)  # of the distance, or of the products for the cosine
    own_squares = sums
    other_squares = sums
    for c0 in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        t_at = t_ptr + tile_offsets(c, p, t_row, T_FAST, ALIGN, WIDE)
        s_at = s_ptr + tile_offsets(c, p, s_row, S_FAST, ALIGN, WIDE)
        t = tl.load(t_at, mask=mask, other=0.0)
        s = tl.load(s_at, mask=mask, other=0.0)
        if not GIVEN:
            logits = add_projection(logits, load_rows(raw_token_ptr, c, C, t.dtype, T, TP, T_SPLIT), t, ACC, UPCAST)
        if WEIGHTED:
            pooled = add_projection(pooled, load_rows(pool_ptr, c, C, t.dtype, T, TP, T_SPLIT), t, ACC, UPCAST)
        if CUSTOM:
            own = add_projection(own, load_rows(token_ptr, c, C, s.dtype, T, TP, S_SPLIT), s, ACC, UPCAST)
        value = s.to(ACC)
        target = reconstructed(t, affine_ptr, c, C, STANDARD, ACC)
        if DISTANCE == "cosine":
            sums += value * target
            own_squares += value * value
            other_squares += target * target
        elif DISTANCE == "smooth_l1":
            sums += smooth_l1(value - target, BETA)
        else:
            tl.static_assert(DISTANCE == "squared", "no branch for the distance " + DISTANCE)
            sums += (value - target) * (value - target)
    token = tl.arange(0, TP)
    real = token < T
    at = n * T * P + token[:, None].to(tl.int64) * P + p[None, :]
    there = real[:, None] & inside[None, :]
    if GIVEN:
        m = tl.load(given_ptr + at, mask=there, other=0.0).to(ACC)
    else:
        scores = join_split(logits, TP, T_SPLIT, BLOCK_P)
        if STANDARD:
            scores += tl.load(raw_bias_ptr + token, mask=real, other=0.0).to(ACC)[:, None]
        m = mask_of(scores)
    if CUSTOM:
        followed = m * mask_of(join_split(own, TP, S_SPLIT, BLOCK_P))
        if CHOSEN:
            m = tl.where(tl.load(customised_ptr) != 0, followed, m)
        else:
            m = followed
    d = tl.sum(sums, axis=0)
    if DISTANCE == "cosine":
        least = tl.full((BLOCK_P,), 1e-8, ACC)
        length = tl.sqrt(tl.sum(own_squares, axis=0))
        other = tl.sqrt(tl.sum(other_squares, axis=0))
        clamped = length <= least
        length = tl.where(clamped, least, length)
        reciprocal = 1.0 / length / tl.where(other <= least, least, other)
        cosine = d * reciprocal
        d = 1.0 - cosine
        cosine_ptr += n * 2 * P + p
        tl.store(cosine_ptr, tl.where(clamped, 0.0, cosine / length / length), mask=inside)
        tl.store(cosine_ptr + P, reciprocal, mask=inside)
    counted = inside
    if VALID:
        counted = load_valid(valid_ptr, n, p, P)
        d = tl.where(counted, d, 0.0)
    m = tl.where(counted[None, :], m, 0.0)
    tl.store(mask_ptr + at, m, mask=there)
    tl.static_assert((POWER == 1) | (POWER == 2), "no branch for the power of the mask")
    tl.store(part_ptr + token, tl.sum((m * m if POWER == 2 else m) * d[None, :], axis=1), mask=real)
    tl.store(part_ptr + T + token, tl.sum(m, axis=1), mask=real)
    if WEIGHTED:
        z = tl.sum(join_split(pooled, TP, T_SPLIT, BLOCK_P), axis=1)
        tl.store(part_ptr + 2 * T + token, z, mask=real)


@triton.jit
def _border_run(
    block, t_ptr, pool_ptr, part_ptr, H, W, C, t_row,
    ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One run of border pixels: Z += pool_rows[strip] @ t; the order of the strips is that of ``_eager.STRIPS``."""
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
    pool_ptr += strip * T * C
    z = tl.zeros((SPLIT * TP, BLOCK_P), ACC)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=1):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & inside[None, :]
        t = tl.load(t_ptr + tile_offsets(c, p, t_row, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        z = add_projection(z, load_rows(pool_ptr, c, C, t.dtype, T, TP, SPLIT), t, ACC, UPCAST)
    token = tl.arange(0, TP)
    real = token < T
    nothing = tl.zeros((TP,), ACC)
    tl.store(part_ptr + token, nothing, mask=real)
    tl.store(part_ptr + T + token, nothing, mask=real)
    tl.store(part_ptr + 2 * T + token, tl.sum(join_split(z, TP, SPLIT, BLOCK_P), axis=1), mask=real)


@triton.jit
def _partials(H, W, WEIGHTED: tl.constexpr, BLOCK_P: tl.constexpr):
    """Programs of an image: its tiles and, with mask weights, the runs of its border."""
    count = tl.cdiv(H * W, BLOCK_P)
    if WEIGHTED:
        count += 2 * (tl.cdiv(W, BLOCK_P) + tl.cdiv(H, BLOCK_P)) + 4
    return count


@triton.jit(do_not_specialize=["first", "Cs", "Ps", "Ws", "s_ns", "s_rows", "t_ns", "t_rows", "customised_ptr"])
def forward_kernel(
    # of every level
    s_ptrs,  # [N, C, P] by strides
    t_ptrs,  # [N, C, P] by strides
    token_ptrs,  # [T, C]
    raw_token_ptrs,  # [T, C]: the tokens for t, which is not standardised
    raw_bias_ptrs,  # [T]
    affine_ptrs,  # [2, C]: mean and 1 / std of t
    pool_ptrs,  # [9, T, C]
    given_ptrs,  # [N, T, P]: masks where GIVEN
    valid_ptrs,  # [N, P] of bytes: pixels that count, where VALID
    mask_ptrs,  # [N, T, P], written
    cosine_ptrs,  # [N, 2, P], written for the cosine
    first, Cs, Ps, s_ns, s_rows, t_ns, t_rows, Ws,
    # of all
    customised_ptr,  # bool scalar where CHOSEN: whether masks follow the student
    part_ptr,  # [programs, 3, T], written
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    GIVEN: tl.constexpr, VALID: tl.constexpr, POWER: tl.constexpr, DISTANCE: tl.constexpr, BETA: tl.constexpr,
    CUSTOM: tl.constexpr, CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, STANDARD: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, S_SPLIT: tl.constexpr, T_SPLIT: tl.constexpr,
    S_FAST: tl.constexpr, T_FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part_ptr += tl.program_id(0).to(tl.int64) * 3 * T
    program, level, C, P = place(first, Cs, Ps, LEVELS, C_UNIT, P_UNIT)
    W = pick_int(Ws, level, LEVELS)
    pool_ptr = pick(pool_ptrs, level, LEVELS)
    t_row = pick_int(t_rows, level, LEVELS)
    tiles = tl.cdiv(P, BLOCK_P)
    blocks = _partials(P // W, W, WEIGHTED, BLOCK_P)
    n = (program // blocks).to(tl.int64)
    block = program % blocks
    target = pick(t_ptrs, level, LEVELS) + n * pick_int(t_ns, level, LEVELS) * ALIGN
    if block < tiles:
        _forward_tile(
            n, block, pick(s_ptrs, level, LEVELS) + n * pick_int(s_ns, level, LEVELS) * ALIGN, target,
            pick(token_ptrs, level, LEVELS), pick(raw_token_ptrs, level, LEVELS), pick(raw_bias_ptrs, level, LEVELS),
            pick(affine_ptrs, level, LEVELS), pool_ptr, pick(given_ptrs, level, LEVELS), pick(valid_ptrs, level, LEVELS),
            customised_ptr, pick(mask_ptrs, level, LEVELS), pick(cosine_ptrs, level, LEVELS), part_ptr,
            C, P, pick_int(s_rows, level, LEVELS), t_row, GIVEN, VALID, POWER, DISTANCE, BETA,
            CUSTOM, CHOSEN, WEIGHTED, STANDARD, ACC,
            T, TP, S_SPLIT, T_SPLIT, S_FAST, T_FAST, ALIGN, WIDE, UPCAST, BLOCK_C, BLOCK_P, STAGES,
        )  # fmt: skip
    elif WEIGHTED:
        _border_run(
            block - tiles, target, pool_ptr, part_ptr, P // W, W, C, t_row,
            ACC, T, TP, T_SPLIT, T_FAST, ALIGN, WIDE, UPCAST, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("first", "Cs", "Hs", "Ws", "indices", "N", "weight_ptr", "loss_ptr", "coefficient_ptr"),
    ]
)
def finish_kernel(
    # of every level
    bias_ptrs,  # [T], [5, T] where STANDARD
    first, Cs, Hs, Ws, indices,
    # of all
    part_ptr,  # [programs, 3, T]
    weight_ptr,  # [levels, N, T], written unless WEIGHTS
    loss_ptr,  # [levels, N], written
    coefficient_ptr,  # [levels, N, T], written
    N,
    LEVELS: tl.constexpr, WEIGHTS: tl.constexpr, EMPTY: tl.constexpr, DISTANCE: tl.constexpr, EPS: tl.constexpr,
    WEIGHTED: tl.constexpr, STANDARD: tl.constexpr, ACC: tl.constexpr,
    T: tl.constexpr, TP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    level = tl.program_id(0) // N
    n = (tl.program_id(0) % N).to(tl.int64)
    C = pick_int(Cs, level, LEVELS)
    H = pick_int(Hs, level, LEVELS)
    W = pick_int(Ws, level, LEVELS)
    bias_ptr = pick(bias_ptrs, level, LEVELS)
    partials = _partials(H, W, WEIGHTED, BLOCK_P)
    part_ptr += (pick_int(first, level, LEVELS) + n * partials) * 3 * T
    out = pick_int(indices, level, LEVELS) * N + n  # a launch need not have all levels
    token = tl.arange(0, TP)
    real = token < T
    row = tl.arange(0, BLOCK)
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
            score += tl.load(bias_ptr + 4 * T + token, mask=real, other=0.0).to(ACC) / (H * W)
        score = tl.where(real, score, float("-inf"))
        weight = tl.exp(score - tl.max(score, axis=0))
        weight = weight / tl.sum(weight, axis=0)
    elif WEIGHTS:
        weight = tl.load(weight_ptr + out * T + token, mask=real, other=0.0).to(ACC)
    else:
        weight = tl.full((TP,), 1.0, ACC) / T
    if not WEIGHTS:
        tl.store(weight_ptr + out * T + token, weight, mask=real)
    area = tl.sum(b, axis=0) + EPS
    share = weight / N
    if DISTANCE != "cosine":
        tl.static_assert((DISTANCE == "squared") | (DISTANCE == "smooth_l1"), "no branch for the distance " + DISTANCE)
        share = share / C
    share = tl.where(real, share / area, 0.0)
    if EMPTY:  # an image without valid pixels, or a box that is on no pixel, counts nothing also without eps
        share = tl.where(area == 0, 0.0, share)
    tl.store(loss_ptr + out, tl.sum(share * tl.sum(a, axis=0), axis=0))
    tl.store(coefficient_ptr + out * T + token, 2.0 * share if DISTANCE == "squared" else share, mask=real)


@triton.jit(
    do_not_specialize=[
        *("first", "Cs", "Ps", "s_ns", "s_rows", "t_ns", "t_rows", "g_ns", "g_rows", "indices"),
        *("up_level", "up_n", "N", "up_ptr", "coefficient_ptr"),
    ]
)
def backward_kernel(
    # of every level
    s_ptrs,  # [N, C, P] by strides
    t_ptrs,  # [N, C, P] by strides
    mask_ptrs,  # [N, T, P]
    affine_ptrs,  # [2, C]: mean and 1 / std of t
    valid_ptrs,  # [N, P] of bytes: pixels that count, where VALID
    cosine_ptrs,  # [N, 2, P] for the cosine
    g_ptrs,  # [N, C, P] by strides, written
    first, Cs, Ps, s_ns, s_rows, t_ns, t_rows, g_ns, g_rows, indices,
    # of all
    up_ptr,  # [levels, N] by strides
    coefficient_ptr,  # [levels, N, T]
    up_level, up_n, N,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    VALID: tl.constexpr, POWER: tl.constexpr, DISTANCE: tl.constexpr, BETA: tl.constexpr,
    STANDARD: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr, TP: tl.constexpr,
    S_FAST: tl.constexpr, T_FAST: tl.constexpr, G_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_student = upstream * slope * sum_t coefficient * m^POWER; the slopes are those of `_records.Distilled`."""
    program, level, C, P = place(first, Cs, Ps, LEVELS, C_UNIT, P_UNIT)
    index = pick_int(indices, level, LEVELS).to(tl.int64)
    s_row, t_row, g_row = pick_int(s_rows, level, LEVELS), pick_int(t_rows, level, LEVELS), pick_int(g_rows, level, LEVELS)
    n, c, p = tile_of(program, C, P, BLOCK_C, BLOCK_P)
    mask = (c < C)[:, None] & (p < P)[None, :]
    s_ptr = pick(s_ptrs, level, LEVELS) + n * pick_int(s_ns, level, LEVELS) * ALIGN
    t_ptr = pick(t_ptrs, level, LEVELS) + n * pick_int(t_ns, level, LEVELS) * ALIGN
    g_ptr = pick(g_ptrs, level, LEVELS) + n * pick_int(g_ns, level, LEVELS) * ALIGN
    s = tl.load(s_ptr + tile_offsets(c, p, s_row, S_FAST, ALIGN, WIDE), mask=mask, other=0.0)
    t = tl.load(t_ptr + tile_offsets(c, p, t_row, T_FAST, ALIGN, WIDE), mask=mask, other=0.0)
    m = load_masks(pick(mask_ptrs, level, LEVELS), n, p, P, T, TP)
    token = tl.arange(0, TP)
    coefficient = tl.load(coefficient_ptr + (index * N + n) * T + token, mask=token < T, other=0.0)
    coefficient *= tl.load(up_ptr + index * up_level + n * up_n)
    tl.static_assert((POWER == 1) | (POWER == 2), "no branch for the power of the mask")
    scale = tl.sum((m * m if POWER == 2 else m) * coefficient[:, None], axis=0)
    value = s.to(ACC)
    target = reconstructed(t, pick(affine_ptrs, level, LEVELS), c, C, STANDARD, ACC)
    if DISTANCE == "cosine":
        cosine_ptr = pick(cosine_ptrs, level, LEVELS) + n * 2 * P + p
        u = tl.load(cosine_ptr, mask=p < P, other=0.0)
        v = tl.load(cosine_ptr + P, mask=p < P, other=0.0)
        slope = u[None, :] * value - v[None, :] * target
    elif DISTANCE == "smooth_l1":
        slope = (value - target) / BETA
        slope = tl.where(slope > 1.0, 1.0, tl.where(slope < -1.0, -1.0, slope))
    else:
        tl.static_assert(DISTANCE == "squared", "no branch for the distance " + DISTANCE)
        slope = value - target
    g = slope * scale[None, :]
    if DISTANCE == "cosine" and g_ptr.dtype.element_ty == tl.float16:
        g = tl.where(g > 65504.0, 65504.0, tl.where(g < -65504.0, -65504.0, g))
    if VALID:
        g = tl.where(load_valid(pick(valid_ptrs, level, LEVELS), n, p, P)[None, :], g, 0.0)
    tl.store(g_ptr + tile_offsets(c, p, g_row, G_FAST, ALIGN, WIDE), g.to(g_ptr.dtype.element_ty), mask=mask)


def forward(student: Sequence[Tensor], teacher: Sequence[Tensor], options: DistillOptions, outputs: Distilled) -> None:
    """Stage 2 of all levels ``[N, C, H, W]``; fills ``outputs``."""
    loss, weights, coefficients, masks, cosines = outputs
    launch.check_device(loss)
    if not len(student[0]):
        return
    if options.weights is not None:
        weights.copy_(options.weights)
    tokens, rows, bias, teacher_tokens, token_bias, statistics = [[x.contiguous() for x in field] for field in options.tables]
    teacher_tokens = teacher_tokens or tokens
    parameters = tokens, teacher_tokens, rows, bias, options.masks
    variant = _Variant(
        coefficients.shape[2], len(rows) > 0, len(statistics) > 0, options.custom_mask,
        options.custom_mask and options.customised is not None, len(options.masks) > 0, len(options.valid) > 0,
        options.weights is not None, options.mask_power, options.distance, options.beta, options.eps,
    )  # fmt: skip
    looks = launch.looks(student), launch.looks(teacher)
    maps, launches = _plan_forward(*looks, launch.dtypes(*parameters), variant, loss.device, tuning.generation())
    student, teacher = launch.readable(student, maps[0]), launch.readable(teacher, maps[1])
    with launch.device_of(loss):
        for group, tiles, finish in launches:
            part = loss.new_empty((tiles.programs, 3, variant.num_tokens))
            addresses = group.addresses(
                *(student, teacher, tokens, teacher_tokens, token_bias, statistics, rows),
                *(options.masks, options.valid, masks, cosines),
            )
            launch.run(forward_kernel, tiles, addresses, options.customised if variant.chosen else loss, part)
            launch.run(finish_kernel, finish, group.addresses(bias or masks), part, weights, loss, coefficients)


class _Variant(NamedTuple):
    """Everything that a forward pass depends on, except the form of its tensors."""

    num_tokens: int
    weighted: bool
    standard: bool
    custom_mask: bool
    chosen: bool
    given: bool
    valid: bool
    weights: bool
    mask_power: int
    distance: str
    beta: float
    eps: float


@functools.lru_cache(launch.PLANS)
def _plan_forward(
    student: launch.Looks,
    teacher: launch.Looks,
    parameters: Sequence[Sequence[torch.dtype]],
    variant: _Variant,
    device: torch.device,
    _generation: int,
) -> tuple[list[list[launch.Map]], list[tuple[launch.Group, launch.Numbers, launch.Numbers]]]:
    """Student and teacher as kernels address them, and the launches of the tiles and of what finishes."""
    maps, heights = launch.maps_of(student, teacher), [shape[2] for shape, _, _ in student]
    groups = launch.groups(*maps, parameters=parameters)
    return maps, [(group, *_forward_numbers(group, group.own(heights), variant, device)) for group in groups]


def _forward_numbers(
    group: launch.Group, heights: Sequence[int], variant: _Variant, device: torch.device
) -> tuple[launch.Numbers, launch.Numbers]:
    s, num_tokens = group.maps[0], variant.num_tokens
    config = group.config("forward_kernel", num_tokens, device)
    rows, dtypes = tuning.token_rows(num_tokens), [maps[0].dtype for maps in group.maps]
    splits = [launch.split(dtype) for dtype in dtypes]
    widths = [m.p // h for m, h in zip(s, heights, strict=True)]
    counts = [_partials_of(h, w, variant.weighted, config) for h, w in zip(heights, widths, strict=True)]
    # the cosine adds up three tiles where other distances add up one
    least = min(16, config.block_c)  # channels of a matrix product
    block_c = max(least, config.block_c // 2) if variant.distance == "cosine" else config.block_c
    common = {
        "WEIGHTED": variant.weighted, "DISTANCE": variant.distance, "ACC": launch.acc_type(dtypes[0]),
        "T": num_tokens, "TP": rows, "BLOCK_P": config.block_p,
    }  # fmt: skip
    tiles = launch.numbers(
        group, counts, (0, 1), widths, CUSTOM=variant.custom_mask, CHOSEN=variant.chosen, STANDARD=variant.standard,
        GIVEN=variant.given, VALID=variant.valid, POWER=variant.mask_power, BETA=variant.beta,
        S_SPLIT=splits[0], T_SPLIT=splits[1], S_FAST=group.axes[0], T_FAST=group.axes[1], UPCAST=launch.INTERPRETED,
        BLOCK_C=block_c, STAGES=launch.stages(config, max(splits) * rows), **config.program, **common,
    )  # fmt: skip
    finish = {
        "LEVELS": len(s), "STANDARD": variant.weighted and variant.standard, "WEIGHTS": variant.weights,
        "EMPTY": variant.given or variant.valid, "EPS": variant.eps, "N": s[0].n,
        "BLOCK": max(16, 1024 // rows), "num_warps": 4, **common,
    }  # fmt: skip
    tables = [*tiles.tables[:1], *launch.tables([m.c for m in s], heights, widths, group.levels)]
    return tiles, launch.Numbers(len(s) * s[0].n, tables, finish)


def _partials_of(height: int, width: int, weighted: bool, config: tuning.Config) -> int:
    """The numbers that `_partials` counts."""
    border = 2 * (tuning.ceil_div(width, config.block_p) + tuning.ceil_div(height, config.block_p)) + 4
    return tuning.ceil_div(height * width, config.block_p) + (border if weighted else 0)


def backward(student: Sequence[Tensor], teacher: Sequence[Tensor], grad: Tensor, kept: DistillKept) -> list[Tensor]:
    """Gradients of every level for the student, in its dtype and, where it is dense, its strides."""
    coefficients = kept.coefficients
    launch.check_device(coefficients)
    grads = [torch.empty_like(s) for s in student]
    if not len(student[0]):
        return grads
    statistics = [x.contiguous() for x in kept.statistics]
    variant = coefficients.shape[2], len(statistics) > 0, len(kept.valid) > 0, kept.mask_power, kept.distance, kept.beta
    looks = launch.looks(student), launch.looks(teacher), launch.looks(grads)
    maps, launches = _plan_backward(*looks, variant, coefficients.device, tuning.generation())
    student, teacher = launch.readable(student, maps[0]), launch.readable(teacher, maps[1])
    written = launch.writable(grads, maps[2])
    with launch.device_of(coefficients):
        for group, numbers in launches:
            addresses = group.addresses(student, teacher, kept.masks, statistics, kept.valid, kept.cosines, written)
            launch.run(backward_kernel, numbers, addresses, grad, coefficients, *grad.stride())
    return launch.copied_back(grads, written)


@functools.lru_cache(launch.PLANS)
def _plan_backward(
    student: launch.Looks,
    teacher: launch.Looks,
    grads: launch.Looks,
    variant: tuple[int, bool, bool, int, str, float],
    device: torch.device,
    _generation: int,
) -> tuple[list[list[launch.Map]], list[tuple[launch.Group, launch.Numbers]]]:
    """Student, teacher and gradients as kernels address them, and the launches."""
    num_tokens, standard, valid, mask_power, distance, beta = variant
    maps = launch.maps_of(student, teacher, grads)
    launches = []
    for group in launch.groups(*maps):
        s, (s_fast, t_fast, g_fast) = group.maps[0], group.axes
        config = group.config("backward_kernel", num_tokens, device)
        numbers = launch.numbers(
            group, launch.tiles(s, config), (0, 1, 2), group.levels, VALID=valid, POWER=mask_power, DISTANCE=distance,
            BETA=beta, STANDARD=standard, ACC=launch.acc_type(s[0].dtype), T=num_tokens, TP=tuning.power_of_2(num_tokens),
            N=s[0].n, S_FAST=s_fast, T_FAST=t_fast, G_FAST=g_fast, **config.tile,
        )  # fmt: skip
        launches.append((group, numbers))
    return maps, launches
