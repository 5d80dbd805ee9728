"""Device, layout and alignment of tensors, which every launcher needs to know, and how levels reach a kernel.

Everything about a launch but the addresses follows from what its tensors look like (`looks`), so each pass makes it once for
each look, in a function under ``functools.lru_cache``. The tables of a pyramid are arguments by value: nothing is copied to the
device, nothing is synchronised, and a captured CUDA graph keeps them.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .tiles import CHANNELS, PIXELS, mask_of
from .tuning import Config

INTERPRETED = not isinstance(mask_of, triton.runtime.JITFunction)
PLANS = 128  # looks that a pass remembers


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


class Numbers(NamedTuple):
    """Arguments of a launch that are no tensors: the number of programs, tables of the levels, constants."""

    programs: int
    tables: Sequence[Any]
    constants: dict[str, Any]


def run(kernel: Any, numbers: Numbers, addresses: Sequence[Any], *others: Any, warmup: bool = False) -> Any:
    """Launch ``kernel``, with fused multiply-adds, which Triton 3.10 no longer makes by default; ``warmup``: compile it only.

    Its arguments are the addresses of the levels, the tables, and ``others``.
    """
    programs, tables, constants = numbers
    return kernel.run(*addresses, *tables, *others, grid=(programs,), warmup=warmup, enable_fp_fusion=True, **constants)


Look = tuple[Sequence[int], Sequence[int], torch.dtype]  # shape, strides, dtype
Looks = Sequence[Look]  # of the levels of one sequence of feature maps


def looks(tensors: Iterable[Tensor]) -> Looks:
    """The properties of feature maps that a launch depends on."""
    return tuple([(x.shape, x.stride(), x.dtype) for x in tensors])


def dtypes(*tensors: Iterable[Tensor]) -> tuple[tuple[torch.dtype, ...], ...]:
    """The properties of parameters that a launch depends on."""
    return tuple([tuple([x.dtype for x in each]) for each in tensors])


class Map(NamedTuple):
    """A feature map ``[N, C, P]`` as a kernel addresses it; ``copied``: only a contiguous copy of it has such strides."""

    n: int
    c: int
    p: int
    strides: tuple[int, int, int]
    dtype: torch.dtype
    copied: bool

    @classmethod
    def of(cls, look: Look) -> "Map":
        """Of ``[N, C, P]`` or ``[N, C, H, W]``; pixels or channels must lie next to each other."""
        (n, c, *sizes), (image, channel, *steps), dtype = look
        p, fits = math.prod(sizes), True
        if len(sizes) == 2:
            fits = 1 in sizes or steps[0] == sizes[1] * steps[1]
            steps = steps[:1] if sizes[1] == 1 else steps[1:]
        strides = image, channel, steps[0]
        fits = fits and (c == 1 or p == 1 or 1 in strides[1:])
        return cls(n, c, p, strides if fits else (c * p, p, 1), dtype, not fits)

    def is_contiguous(self, axis: int) -> bool:
        return self.strides[2] == 1 or self.p == 1 if axis == PIXELS else self.strides[1] == 1 or self.c == 1

    def row(self, axis: int) -> int:
        """The stride of the other axis than the contiguous one; 0 where that has one entry."""
        length, stride = (self.c, self.strides[1]) if axis == PIXELS else (self.p, self.strides[2])
        return stride if length > 1 else 0

    def is_aligned(self, axis: int, elements: int) -> bool:
        """Whether ``elements`` divides images, rows and the length of one."""
        return all(x % elements == 0 for x in (self.strides[0], self.row(axis), self.p if axis == PIXELS else self.c))

    @property
    def is_wide(self) -> bool:
        """Whether an offset inside one image leaves 32 bits."""
        return (self.c - 1) * self.strides[1] + (self.p - 1) * self.strides[2] >= 2**31


def maps_of(*looks: Looks) -> list[list[Map]]:
    return [[Map.of(look) for look in each] for each in looks]


def readable(tensors: Sequence[Tensor], maps: Sequence[Map]) -> list[Tensor]:
    """``tensors`` where kernels can address them."""
    return [x.contiguous() if m.copied else x for x, m in zip(tensors, maps, strict=True)]


def writable(tensors: Sequence[Tensor], maps: Sequence[Map]) -> list[Tensor]:
    """``tensors``, or contiguous ones in their stead, of which `copied_back` makes them."""
    contiguous = torch.contiguous_format
    return [torch.empty_like(x, memory_format=contiguous) if m.copied else x for x, m in zip(tensors, maps, strict=True)]


def copied_back(tensors: Sequence[Tensor], written: Sequence[Tensor]) -> list[Tensor]:
    """``tensors``, with what a kernel wrote in their stead."""
    return [x if x is y else x.copy_(y) for x, y in zip(tensors, written, strict=True)]


class Group(NamedTuple):
    """Levels that one launch covers, which are alike in dtypes, layouts and alignment.

    Attributes:
        levels: their indices.
        maps: of each sequence of feature maps, those of these levels.
        axes: the contiguous axis of each sequence.
        align: elements that every stride and contiguous length is a multiple of: what 16-byte accesses need, or 1. No finer
            distinction: each would be compiled anew.
        wide: whether an offset inside one image leaves 32 bits.
    """

    levels: Sequence[int]
    maps: Sequence[Sequence[Map]]
    axes: Sequence[int]
    align: int
    wide: bool

    def own(self, values: Sequence[Any]) -> Sequence[Any]:
        """The entries of these levels."""
        return [values[i] for i in self.levels]

    def addresses(self, *tensors: Sequence[Tensor]) -> list[Any]:
        """The tensors of these levels as a kernel takes them. The first stand in for those that are missing: never read."""
        pick = operator.itemgetter(*self.levels)  # one entry, or a tuple of several
        return [pick(each or tensors[0]) for each in tensors]

    def config(self, kernel: str, num_tokens: int, device: torch.device, of: int = 0) -> Config:
        """The configuration of ``kernel``, whose tiles follow the maps ``of``."""
        maps = self.maps[of]
        bits = 8 * max(each[0].dtype.itemsize for each in self.maps)
        pixels, channels = sum(m.n * m.p for m in maps), max(m.c for m in maps)
        layout = "nhwc" if self.axes[of] == CHANNELS else "nchw"
        key = tuning.Key(kernel, bits, layout, channels, tuning.token_rows(num_tokens), (pixels - 1).bit_length())
        return tuning.config(key, device)

    def tables(self, *which: int) -> list[Any]:
        """Channels and pixels in C_UNIT and P_UNIT; of each sequence of maps asked for, strides of images and rows in ALIGN."""
        units = self.constants
        values = [[m.c // units["C_UNIT"] for m in self.maps[0]], [m.p // units["P_UNIT"] for m in self.maps[0]]]
        for i in which:
            values.append([m.strides[0] // self.align for m in self.maps[i]])
            values.append([m.row(self.axes[i]) // self.align for m in self.maps[i]])
        return tables(*values)

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments that all kernels over feature maps take."""
        units = {"C_UNIT": self.align if CHANNELS in self.axes else 1, "P_UNIT": self.align if PIXELS in self.axes else 1}
        return {"LEVELS": len(self.levels), "ALIGN": self.align, "WIDE": self.wide, **units}


def groups(*maps: Sequence[Map], parameters: Sequence[Sequence[torch.dtype]] = ()) -> list[Group]:
    """The launches for a pyramid: one, unless levels differ in dtypes, layouts or alignment, or leave 32 bits.

    ``maps``: the feature maps that a kernel addresses, a sequence of levels each; ``parameters``: dtypes of what else it reads.
    """
    found: dict[Any, list[int]] = {}
    axes = [_axes(each) for each in maps]
    for i, level in enumerate(zip(*maps, strict=True)):
        own = [each[i] for each in axes]
        full = 16 // min(m.dtype.itemsize for m in level)
        align = full if all(m.is_aligned(axis, full) for m, axis in zip(level, own, strict=True)) else 1
        kinds = *(m.dtype for m in level), *(each[i] for each in parameters if each)
        found.setdefault((kinds, *own, align, any(m.is_wide for m in level)), []).append(i)
    return [
        Group(levels, [[each[i] for i in levels] for each in maps], own, align, wide)
        for (_, *own, align, wide), levels in found.items()
    ]


def _axes(maps: Sequence[Map]) -> list[int]:
    """The contiguous axis of every level: of both, where a level has one pixel or one channel, that of the largest level."""
    largest = max(maps, key=lambda m: m.c * m.p)
    preferred = PIXELS if largest.is_contiguous(PIXELS) else CHANNELS
    return [preferred if m.is_contiguous(preferred) else 1 - preferred for m in maps]


def tables(*values: Iterable[int]) -> list[Any]:
    """Integers per level as a kernel takes them. Triton specialises the integers of a tuple on 1 and on multiples of 16, which
    would compile anew for every size: an odd number above 1 is neither. `tiles.pick_int` gives them back."""
    return [per_level([2 * value + 3 for value in each]) for each in values]


def per_level(values: Sequence[Any]) -> Any:
    """A tuple with an entry per level, or the entry itself where there is one level."""
    return values[0] if len(values) == 1 else tuple(values)


def first_programs(counts: Sequence[int]) -> tuple[list[int], int]:
    """Every level's first program, and the number of all programs, given those of each level."""
    return [sum(counts[:i]) for i in range(len(counts))], sum(counts)


def tiles(maps: Sequence[Map], config: Config) -> list[int]:
    """Tiles of an image of each level."""
    ceil = tuning.ceil_div
    return [ceil(m.c, config.block_c) * ceil(m.p, config.block_p) for m in maps]


def runs(maps: Sequence[Map], config: Config) -> list[int]:
    """Tiles of an image of each level where a program takes all channels of its pixels."""
    return [tuning.ceil_div(m.p, config.block_p) for m in maps]


def numbers(group: Group, counts: Sequence[int], which: Sequence[int], *others: Iterable[int], **constants: Any) -> Numbers:
    """Of a kernel with ``counts`` programs an image; tables: first programs, lengths, strides of maps ``which``, others."""
    first, programs = first_programs([m.n * count for m, count in zip(group.maps[0], counts, strict=True)])
    return Numbers(programs, [*tables(first), *group.tables(*which), *tables(*others)], {**constants, **group.constants})


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """The dtype of sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def split(dtype: torch.dtype) -> int:
    """Parts in which a float32 factor enters a product with features of this dtype: 2 for half features."""
    return 2 if dtype.itemsize == 2 else 1


def stages(config: Config, rows: int) -> int:
    """Stages of the pipeline of a matrix product with so many ``rows``. From Hopper on, 64 rows are multiplied asynchronously;
    for a load that is used in registers, too, Triton's pipeline is then one buffer short."""
    return config.num_stages if rows < 64 else 1
