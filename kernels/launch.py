"""What every launcher needs to know about its tensors: device, layout, alignment, and how levels reach a kernel.

The tables of a pyramid are arguments by value: nothing is copied to the device, nothing is synchronised, and a captured CUDA
graph keeps them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _memo
from . import tuning
from .tiles import CHANNELS, PIXELS, sigmoid
from .tuning import Config

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


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch ``kernel`` on ``programs`` programs, with fused multiply-adds, which Triton 3.10 no longer makes by default."""
    kernel.run(*arguments, grid=(programs,), warmup=False, enable_fp_fusion=True, **constants)


def acc_type(x: Tensor) -> tl.dtype:
    """What sums over ``x`` are taken in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def split(x: Tensor) -> int:
    """Parts in which a float32 factor enters a product with ``x``: 2 for half features."""
    return 2 if x.dtype.itemsize == 2 else 1


def addressable(x: Tensor) -> Tensor:
    """Features as ``[N, C, P]`` with pixels or channels next to each other; a copy where neither are."""
    if x.dim() == 4:
        x = x.flatten(2)
    return x if _contiguous_along(x, PIXELS) or _contiguous_along(x, CHANNELS) else x.contiguous()


def writable(x: Tensor) -> Tensor:
    """``x`` as ``[N, C, P]`` if a kernel can write it, else an empty contiguous tensor; `written_to` copies that."""
    flat = addressable(x)
    return flat if flat.data_ptr() == x.data_ptr() else torch.empty_like(flat, memory_format=torch.contiguous_format)


def written_to(maps: Sequence[Tensor], written: Sequence[Tensor]) -> list[Tensor]:
    """``maps``, with what a kernel wrote in their stead."""
    for x, y in zip(maps, written, strict=True):
        if x.data_ptr() != y.data_ptr():
            x.copy_(y.view(x.shape))
    return list(maps)


def _contiguous_along(x: Tensor, axis: int) -> bool:
    dim = 2 if axis == PIXELS else 1
    return x.stride(dim) == 1 or x.shape[dim] == 1


Plan = TypeVar("Plan")
Numbers = tuple[int, list[Any], dict[str, Any]]  # what a launch takes beside tensors: programs, tables, constants


@dataclass(frozen=True)
class Group:
    """Levels that one launch covers, and how it addresses their feature maps.

    Attributes:
        levels: their indices.
        fast: the contiguous axis of each of the maps.
        wide: whether an offset inside one image leaves 32 bits.
        aligns: every level's alignment in elements: that which 16-byte accesses need, or 1. No finer distinction: each would be
            compiled anew.
    """

    levels: list[int]
    fast: tuple[int, ...]
    wide: bool
    aligns: list[int]

    def own(self, values: Sequence[Any]) -> list[Any]:
        """The entries of these levels."""
        return [values[i] for i in self.levels]

    def addresses(self, *arguments: Sequence[Tensor]) -> list[Any]:
        """The tensors of these levels as a kernel takes them; the first argument stands in for one that there is none of."""
        first = arguments[0]
        if len(first) == len(self.levels):
            return [per_level(tensors or first) for tensors in arguments]
        return [per_level(self.own(tensors or first)) for tensors in arguments]

    def config(self, kernel: str, num_tokens: int, *maps: Sequence[Tensor], axis: int | None = None) -> Config:
        """The configuration of ``kernel`` over ``maps`` of these levels; its tiles follow ``axis``, that of the first map."""
        own = [self.own(tensors) for tensors in maps]
        bits = 8 * max(tensors[0].dtype.itemsize for tensors in own)
        return tuning.config(kernel, own[0], bits, self.fast[0] if axis is None else axis, num_tokens)

    def lengths(self, like: Sequence[Tensor]) -> list[Any]:
        """Tables of channels and pixels, in units of the alignment where C_UNIT and P_UNIT say so."""
        own = self.own(like)
        c = [x.shape[1] // (a if CHANNELS in self.fast else 1) for x, a in zip(own, self.aligns, strict=True)]
        p = [x.shape[2] // (a if PIXELS in self.fast else 1) for x, a in zip(own, self.aligns, strict=True)]
        return tables(c, p)

    def strides(self, *maps: Sequence[Tensor]) -> list[Any]:
        """For each map the tables of image and row strides in units of the alignment."""
        result = []
        for axis, tensors in zip(self.fast, maps, strict=True):
            for dim in (0, _row(axis)):
                result.append(table(x.stride(dim) // a for x, a in zip(self.own(tensors), self.aligns, strict=True)))
        return result

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments that all kernels over feature maps take; ALIGN, END and STEP range over the alignments."""
        largest, smallest = max(self.aligns), min(self.aligns)
        return {
            "LEVELS": len(self.levels),
            "ALIGN": largest,
            "END": smallest - 1,
            "STEP": smallest - largest or -1,
            "C_UNIT": CHANNELS in self.fast,
            "P_UNIT": PIXELS in self.fast,
            "WIDE": self.wide,
        }


def groups(*maps: Sequence[Tensor], parameters: Sequence[Sequence[Tensor]] = ()) -> list[Group]:
    """The launches for a pyramid: one, unless levels differ in dtypes or layouts, or have 2**31 elements in an image.

    ``maps``: the feature maps ``[N, C, P]`` that a kernel addresses, a sequence of levels each; ``parameters``: what it reads.
    """
    found: dict[Any, list[int]] = {}
    axes = [_axes(tensors) for tensors in maps]
    for i, level in enumerate(zip(*maps, strict=True)):
        dtypes = *(x.dtype for x in level), *(each[i].dtype for each in parameters if each)
        fast = tuple(each[i] for each in axes)
        found.setdefault((dtypes, fast, is_wide(*level)), []).append(i)
    return [_group(levels, maps, fast, wide) for (_, fast, wide), levels in found.items()]


def planned(
    kernel: str,
    options: Any,
    maps: Sequence[Sequence[Tensor]],
    parameters: Sequence[Sequence[Tensor]],
    plan: Callable[..., Plan],
) -> Plan:
    """``plan(options, maps, parameters)``, made anew only for maps of other shapes, strides or dtypes, parameters of other
    dtypes, and other configurations.

    To find addresses, tables and configuration of five levels takes longer than a small pyramid's kernels run.
    """
    key = (
        *(kernel, options, tuning.state(), maps[0][0].device),
        *[(x.shape, x.stride(), x.dtype) for tensors in maps for x in tensors],
        *[x.dtype for tensors in parameters for x in tensors],
    )
    found = PLANS.get(key)
    if found is None:
        found = _memo.remember(PLANS, key, plan(options, maps, parameters), MOST_PLANS)
    return found  # type: ignore[no-any-return]


MOST_PLANS = _memo.MOST
PLANS: dict[Any, Any] = {}


def in_place(maps: Sequence[Sequence[Tensor]], flat: Sequence[Sequence[Tensor]]) -> bool:
    """Whether ``flat``, what kernels address, are all ``maps`` where they are."""
    return all(x.data_ptr() == y.data_ptr() for each in zip(maps, flat, strict=True) for x, y in zip(*each, strict=True))


def _axes(tensors: Sequence[Tensor]) -> list[int]:
    """The contiguous axis of every level: of both, where a level has one pixel or one channel, that of the largest level."""
    largest = max(tensors, key=Tensor.numel)
    preferred = PIXELS if _contiguous_along(largest, PIXELS) else CHANNELS
    return [preferred if _contiguous_along(x, preferred) else 1 - preferred for x in tensors]


def _group(levels: list[int], maps: Sequence[Sequence[Tensor]], axes: tuple[int, ...], wide: bool) -> Group:
    first = [tensors[levels[0]] for tensors in maps]
    full = 16 // min(x.dtype.itemsize for x in first)
    aligned = [is_aligned(full, axes, [tensors[i] for tensors in maps]) for i in levels]
    return Group(levels, axes, wide, [full if x else 1 for x in aligned])


def is_aligned(full: int, axes: Sequence[int], level: Sequence[Tensor]) -> bool:
    """Whether ``full`` divides the rows, images and contiguous lengths of one level."""
    lengths = (
        (x.stride(0), x.stride(_row(axis)), x.shape[1 if axis == CHANNELS else 2]) for x, axis in zip(level, axes, strict=True)
    )
    return all(length % full == 0 for each in lengths for length in each)


def _row(axis: int) -> int:
    """The dimension that is not contiguous."""
    return 2 if axis == CHANNELS else 1


def is_wide(*tensors: Tensor) -> bool:
    """Whether an offset inside one image leaves 32 bits."""
    return any((x.shape[1] - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2) >= 2**31 for x in tensors)


def tables(*values: Iterable[int]) -> list[Any]:
    """A `table` of each."""
    return [table(each) for each in values]


def table(values: Iterable[int]) -> Any:
    """Integers per level as a kernel takes them. Triton specialises the integers of a tuple on 1 and on multiples of 16, which
    would compile anew for every size: an odd number above 1 is neither."""
    return per_level([2 * value + 3 for value in values])


def per_level(values: Sequence[Any]) -> Any:
    """A tuple with an entry per level, or the entry itself where there is one level."""
    return values[0] if len(values) == 1 else tuple(values)


def tiles(x: Tensor, config: Config) -> int:
    """Tiles of an image of ``x [N, C, P]``."""
    return tuning.ceil_div(x.shape[1], config.block_c) * tuning.ceil_div(x.shape[2], config.block_p)


def first_programs(counts: Sequence[int]) -> tuple[list[int], int]:
    """Every level's first program, and the number of all programs, given those of each level."""
    first = [sum(counts[:i]) for i in range(len(counts))]
    return first, sum(counts)
