"""What every launcher needs to know about its tensors: device, layout, alignment."""

import ctypes
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import CHANNELS, PIXELS, sigmoid

TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
INTERPRETED = not isinstance(sigmoid, triton.runtime.JITFunction)


def check_device(x: Tensor) -> None:
    """RuntimeError where no kernel can run."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f'impl="triton": expected CUDA tensors, got {x.device.type} tensors; set TRITON_INTERPRET=1 before the first use '
            'to run the kernels on the CPU (slow, for tests), or pass impl="auto" or "eager"'
        )


def device_of(x: Tensor) -> torch.cuda.device:
    """A guard: kernels run on the device of their tensors, not on the current one."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def two_parts(value: float) -> tuple[float, float]:
    """``value`` rounded to float32, as a kernel's float argument is, and what that leaves."""
    high = ctypes.c_float(value).value
    return high, value - high


def split(x: Tensor) -> int:
    """Parts in which a float32 factor enters a product with ``x``: 2 for half features."""
    return 2 if x.dtype.itemsize == 2 else 1


def fast(x: Tensor) -> int:
    """The axis of ``x [N, C, P]``, as :func:`addressable` gives it, whose elements lie next to each other."""
    return PIXELS if x.stride(2) == 1 or (x.shape[2] == 1 and x.stride(1) != 1) else CHANNELS


def addressable(x: Tensor) -> Tensor:
    """``x [N, C, P]`` with pixels or channels next to each other; a copy where neither are."""
    return x if _has_fast_axis(x) else x.contiguous()


def writable(x: Tensor) -> Tensor:
    """``x`` if a kernel can write it, else an empty contiguous tensor, to be copied into ``x``."""
    return x if _has_fast_axis(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def _has_fast_axis(x: Tensor) -> bool:
    return 1 in x.stride()[1:] or x.shape[2] == 1


def quotients(x: Tensor, align: int) -> tuple[int, int, int]:
    """Strides in units of ``align``; the contiguous axis needs none."""
    n, c, p = x.stride()
    return n // align, 0 if fast(x) == CHANNELS else c // align, 0 if fast(x) == PIXELS else p // align


def layout(*tensors: Tensor) -> dict[str, int | bool]:
    """How the tensors of one launch may be addressed: common alignment of rows and lengths, width of offsets."""
    _, c, p = tensors[0].shape
    axes = [fast(x) for x in tensors]
    align = 8
    for x, axis in zip(tensors, axes, strict=True):
        n_stride, c_stride, p_stride = x.stride()
        align = gcd(align, n_stride)
        align = gcd(align, c_stride) if axis != CHANNELS else align
        align = gcd(align, p_stride) if axis != PIXELS else align
    return {
        "ALIGN": align,
        "C_ALIGN": gcd(8, c) if CHANNELS in axes else 1,
        "P_ALIGN": gcd(8, p) if PIXELS in axes else 1,
        "WIDE": _wide(*tensors),
    }


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset inside one image leaves 32 bits."""
    return any((x.shape[1] - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2) >= 2**31 for x in tensors)
