"""Strip sums of valid pixels on Triton: what the mask weights of padded images need, one launch for all levels and images.

A program takes BLOCK_C channels of a run of pixels of an image, finds from the bytes of ``valid`` how often each pixel enters
each of the nine sums (``_eager.strips_of``) and adds them up by a matrix product: one read of x. The runs are then added in a
fixed order.
"""

import functools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tuning
from .tiles import add_projection, find_level, load_valid, pick, pick_int, tile_offsets

RUN = 16  # tiles whose sums one program adds up


@triton.jit
def _alone(ptr, here, p, h, w, H, W, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """1 where ``here`` is 1 and the neighbour is not valid."""
    there = (h + DOWN >= 0) & (h + DOWN < H) & (w + RIGHT >= 0) & (w + RIGHT < W)
    return here * (1 - (tl.load(ptr + p + DOWN * W + RIGHT, mask=there & (here != 0), other=0) != 0).to(tl.int32))


@triton.jit
def _strips(ptr, p, P, W):
    """[16, BLOCK_P]: how often every pixel enters each strip sum, in the order of ``_eager.STRIPS``; 0 from row 9 on."""
    H = P // W
    h = p // W
    w = p % W
    here = (tl.load(ptr + p, mask=p < P, other=0) != 0).to(tl.int32)
    top = _alone(ptr, here, p, h, w, H, W, -1, 0)
    bottom = _alone(ptr, here, p, h, w, H, W, 1, 0)
    left = _alone(ptr, here, p, h, w, H, W, 0, -1)
    right = _alone(ptr, here, p, h, w, H, W, 0, 1)
    top_left = top + left - _alone(ptr, here, p, h, w, H, W, -1, -1)
    top_right = top + right - _alone(ptr, here, p, h, w, H, W, -1, 1)
    bottom_left = bottom + left - _alone(ptr, here, p, h, w, H, W, 1, -1)
    bottom_right = bottom + right - _alone(ptr, here, p, h, w, H, W, 1, 1)
    row = tl.arange(0, 16)[:, None]
    strips = tl.where(row == 0, here[None, :], 0)
    strips = tl.where(row == 1, top[None, :], strips)
    strips = tl.where(row == 2, bottom[None, :], strips)
    strips = tl.where(row == 3, left[None, :], strips)
    strips = tl.where(row == 4, right[None, :], strips)
    strips = tl.where(row == 5, top_left[None, :], strips)
    strips = tl.where(row == 6, top_right[None, :], strips)
    strips = tl.where(row == 7, bottom_left[None, :], strips)
    return tl.where(row == 8, bottom_right[None, :], strips)


@triton.jit(do_not_specialize=["first", "Cs", "Ps", "Ws", "x_ns", "x_rows"])
def pool_kernel(
    # of every level
    x_ptrs,  # [N, C, P] by strides
    valid_ptrs,  # [N, P] of bytes
    part_ptrs,  # [N, runs, 9, C + 1], written: sums, and in the last column pixels
    first, Cs, Ps, x_ns, x_rows, Ws,
    LEVELS: tl.constexpr, ALIGN: tl.constexpr, C_UNIT: tl.constexpr, P_UNIT: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    level = find_level(program, first, LEVELS)
    program -= pick_int(first, level, LEVELS)
    W = pick_int(Ws, level, LEVELS)
    x_ptr = pick(x_ptrs, level, LEVELS)
    valid_ptr = pick(valid_ptrs, level, LEVELS)
    part_ptr = pick(part_ptrs, level, LEVELS)
    x_row = pick_int(x_rows, level, LEVELS)
    C = pick_int(Cs, level, LEVELS) * C_UNIT
    P = pick_int(Ps, level, LEVELS) * P_UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    runs = tl.cdiv(P, BLOCK_P * RUN)
    n = (program // (blocks * runs)).to(tl.int64)
    block = (program // runs) % blocks
    run = program % runs
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    image = x_ptr + n * pick_int(x_ns, level, LEVELS) * ALIGN
    total = tl.zeros((16, BLOCK_C), ACC)
    pixels = tl.zeros((16,), ACC)
    for tile in range(run * RUN, tl.minimum((run + 1) * RUN, tl.cdiv(P, BLOCK_P))):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        strips = _strips(valid_ptr + n * P, p, P, W)
        mask = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(image + tile_offsets(c, p, x_row, FAST, ALIGN, WIDE), mask=mask, other=0.0)
        x = tl.where(load_valid(valid_ptr, n, p, P)[None, :], x, 0.0)
        total = add_projection(total, strips.to(tl.float32).to(x.dtype), tl.trans(x), ACC, UPCAST)
        pixels += tl.sum(strips, axis=1).to(ACC)
    strip = tl.arange(0, 16)
    out = part_ptr + ((n * runs + run) * 9 + strip) * (C + 1)
    tl.store(out[:, None] + c[None, :], total, mask=(strip < 9)[:, None] & (c < C)[None, :])
    if block == 0:
        tl.store(out + C, pixels, mask=strip < 9)


def forward(features: Sequence[Tensor], valid: Sequence[Tensor], heights: Sequence[int], sums: Sequence[Tensor]) -> None:
    """Fill ``sums [N, 9, C + 1]`` of every level ``[N, C, P]``."""
    launch.check_device(sums[0])
    n = len(sums[0])
    if n == 0:
        return
    maps, launches = _plan(launch.looks(features), tuple(heights))
    features = launch.readable(features, maps)
    with launch.device_of(sums[0]):
        for group, runs, (programs, tables, constants) in launches:
            parts = [sums[0].new_empty((n, k, 9, m.c + 1)) for k, m in zip(runs, group.maps[0], strict=True)]
            addresses = *group.addresses(features, valid), launch.per_level(parts)
            launch.run(pool_kernel, programs, *addresses, *tables, **constants)
            for i, part in zip(group.levels, parts, strict=True):
                sums[i].copy_(part.sum(1))


@functools.lru_cache(launch.PLANS)
def _plan(
    looks: Sequence[launch.Look], heights: Sequence[int]
) -> tuple[list[launch.Map], list[tuple[launch.Group, list[int], launch.Numbers]]]:
    """Features as the kernel addresses them; of each launch the runs of each level's image, and numbers."""
    maps = [launch.Map.of(look) for look in looks]
    return maps, [_numbers(group, group.own(heights)) for group in launch.groups(maps)]


def _numbers(group: launch.Group, heights: Sequence[int]) -> tuple[launch.Group, list[int], launch.Numbers]:
    (x,), dtype = group.maps, group.maps[0][0].dtype
    # float64 has no matrix instruction: the product is a [16, C, P] block
    block_c, block_p = (8, 16) if dtype.itemsize == 8 else (64 if dtype.itemsize == 2 else 32, 128 // dtype.itemsize)
    runs = [tuning.ceil_div(m.p, block_p * RUN) for m in x]
    programs = [m.n * k * tuning.ceil_div(m.c, block_c) for m, k in zip(x, runs, strict=True)]
    first, total = launch.first_programs(programs)
    widths = [m.p // height for m, height in zip(x, heights, strict=True)]
    constants = {
        "ACC": launch.acc_type(dtype), "FAST": group.axes[0], "UPCAST": launch.INTERPRETED, "RUN": RUN,
        "BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": 4, **group.constants,
    }  # fmt: skip
    return group, runs, launch.Numbers(total, [*launch.tables(first), *group.tables(0), *launch.tables(widths)], constants)
