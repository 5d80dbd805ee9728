"""DRAM traffic of stage 2 and of variants of it, by a model of the L2 cache: ``python -m bench.l2``.

Modelled, not measured. The trace is what every program of a launch reads and writes of student, teacher, masks and gradient;
``tests/ptx/test_l2.py`` holds it against the emulator. Parameters, partial sums and coefficients are left out. The cache is
assumed to be fully associative and to hold whole blocks of a tile. Programs run one after the other in the order of their
numbers: waves are not interleaved.

A step is forward and backward of the criterion, and starts with a cold cache. Other work may pass through the cache between
the two. Figures are in units of one feature tensor of all levels.
"""

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from itertools import groupby
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maskd_triton.kernels import tuning

from . import environment
from .workloads import DTYPES, LAYOUTS, WORKLOADS, Workload

MIB = 2**20
CACHES = (50 * MIB, 126 * MIB)  # H100, B200
BETWEEN = (0, 50 * MIB, 500 * MIB)
SECTOR = 32  # bytes, the least that is fetched
OTHER = 8192  # bytes of a chunk of other work


class Hint(IntEnum):
    """What an access says of the chunk's eviction, in the order in which chunks go."""

    FIRST = 0
    NORMAL = 1
    LAST = 2


class Cache:
    """Fully associative, write-back, least recently used first within a hint.

    The hint of the last access counts. A chunk is written whole, so a write fetches nothing.

    Attributes:
        read: bytes read from DRAM.
        written: bytes written to DRAM.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used, self.read, self.written = capacity, 0, 0, 0
        self._queues: tuple[OrderedDict[int, int], ...] = tuple(OrderedDict() for _ in Hint)  # sizes of chunks
        self._hints: dict[int, Hint] = {}
        self._dirty: set[int] = set()

    def load(self, chunk: int, size: int, hint: Hint = Hint.NORMAL) -> None:
        """Read a chunk, from DRAM where it is not held."""
        if not self._touch(chunk, size, hint):
            self.read += size

    def store(self, chunk: int, size: int, hint: Hint = Hint.NORMAL) -> None:
        """Write a whole chunk; DRAM gets it when it is evicted."""
        self._touch(chunk, size, hint)
        self._dirty.add(chunk)

    def peek(self, chunk: int, size: int) -> None:
        """Read ``size`` bytes of a chunk, which is neither held nor moved for that."""
        if chunk not in self._hints:
            self.read += size

    def stream(self, size: int) -> None:
        """Let other work read ``size`` bytes, each once; they are not counted. More than all of the cache changes no more."""
        for i in range(min(size, self.capacity) // OTHER):
            self._touch(-1 - i, OTHER, Hint.NORMAL)

    def flush(self) -> None:
        """Write what is dirty."""
        self.written += sum(queue[chunk] for queue in self._queues for chunk in queue if chunk in self._dirty)
        self._dirty.clear()

    def copy(self) -> "Cache":
        other = Cache(self.capacity)
        other.used, other.read, other.written = self.used, self.read, self.written
        other._queues = tuple(queue.copy() for queue in self._queues)
        other._hints, other._dirty = self._hints.copy(), self._dirty.copy()
        return other

    def _touch(self, chunk: int, size: int, hint: Hint) -> bool:
        """Put a chunk at the end of a queue; whether it was held."""
        old = self._hints.get(chunk)
        if old is hint:
            self._queues[hint].move_to_end(chunk)
            return True
        if old is None:
            self.used += size
            while self.used > self.capacity and self._hints:
                self._evict()
        else:
            del self._queues[old][chunk]
        self._queues[hint][chunk] = size
        self._hints[chunk] = hint
        return old is not None

    def _evict(self) -> None:
        for queue in self._queues:
            if queue:
                break
        chunk, size = queue.popitem(last=False)
        del self._hints[chunk]
        self.used -= size
        if chunk in self._dirty:
            self._dirty.remove(chunk)
            self.written += size


class Access(NamedTuple):
    """What a program reads or writes of a tensor: channels (of masks: tokens) and pixels of an image of a level."""

    tensor: str
    level: int
    image: int
    channels: range
    pixels: range
    write: bool = False


@dataclass(frozen=True)
class Tiles:
    """Default tiles of both kernels for a workload."""

    forward: tuning.Config
    backward: tuning.Config

    @classmethod
    def of(cls, workload: Workload) -> "Tiles":
        bits, layout = 8 * DTYPES[workload.dtype].itemsize, "nchw" if workload.layout == "nchw" else "nhwc"
        pixels = workload.batch * sum(h * w for _, h, w in workload.levels)
        channels, rows = max(c for c, _, _ in workload.levels), tuning.token_rows(workload.tokens)
        key = tuning.Key("", bits, layout, channels, rows, (pixels - 1).bit_length())
        return cls(*(tuning.default(key._replace(kernel=kernel)) for kernel in ("forward_kernel", "backward_kernel")))


def blocks(length: int, block: int) -> list[range]:
    """``range(length)`` in blocks."""
    return [range(start, min(start + block, length)) for start in range(0, length, block)]


def forward_programs(workload: Workload, tiles: Tiles, level: int, image: int) -> Iterator[list[Access]]:
    """What the forward kernel's programs of an image of a level do: those of its tiles, then those of its border."""
    c, h, w = workload.levels[level]
    at, channels, block = (level, image), range(c), tiles.forward.block_p
    for p in blocks(h * w, block):
        yield [
            *(Access(tensor, *at, channels, p) for tensor in ("teacher", "student")),
            Access("masks", *at, range(workload.tokens), p, write=True),
        ]
    across, down = blocks(w, block), blocks(h, block)
    rows = [range(first + run.start, first + run.stop) for first in (0, (h - 1) * w) for run in across]
    columns = [range(first + run.start * w, first + run.stop * w, w) for first in (0, w - 1) for run in down]
    corners = [range(p, p + 1) for p in (0, w - 1, (h - 1) * w, h * w - 1)]
    for p in rows + columns + corners:
        yield [Access("teacher", *at, channels, p)]


def backward_programs(workload: Workload, tiles: Tiles, level: int, image: int) -> Iterator[list[Access]]:
    """What the backward kernel's programs of an image of a level do."""
    c, h, w = workload.levels[level]
    at = level, image
    for channels in blocks(c, tiles.backward.block_c):
        for p in blocks(h * w, tiles.backward.block_p):
            yield [
                *(Access(tensor, *at, channels, p) for tensor in ("student", "teacher")),
                Access("masks", *at, range(workload.tokens), p),
                Access("gradient", *at, channels, p, write=True),
            ]


class Site(IntEnum):
    """Loads and stores that may carry a hint of their own."""

    FORWARD_FEATURES = 0
    FORWARD_MASKS = 1
    BORDER = 2
    BACKWARD_FEATURES = 3
    BACKWARD_MASKS = 4
    GRADIENT = 5


Touch = tuple[int, int, int]
"""Where in the kernels, a chunk, bytes."""
Programs = list[list[Touch]]
Part = list[tuple[int, int]]
"""Levels and images that a launch covers, in the order of its programs."""


class Trace:
    """The programs of every launch as touches of chunks: blocks in which both kernels take a tensor."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.tiles = workload, Tiles.of(workload)
        self._channels, self._pixels = self.tiles.backward.block_c, gcd(self.tiles.forward.block_p, self.tiles.backward.block_p)
        self._first: dict[tuple[str, int], int] = {}  # chunk of a tensor's level, in the first image
        self._chunks = 0  # of an image
        self._forward: dict[tuple[int, int], Programs] = {}
        self._backward: dict[tuple[int, int], Programs] = {}
        for level in range(len(workload.levels)):
            forward, backward = (f(workload, self.tiles, level, 0) for f in (forward_programs, backward_programs))
            self._forward[level, 0] = [list(self._touches(p, Site.FORWARD_FEATURES, Site.FORWARD_MASKS)) for p in forward]
            self._backward[level, 0] = [list(self._touches(p, Site.BACKWARD_FEATURES, Site.BACKWARD_MASKS)) for p in backward]
        for programs in (self._forward, self._backward):
            for (level, _), first in [*programs.items()]:
                for image in range(1, workload.batch):
                    shift = image * self._chunks
                    programs[level, image] = [[(site, chunk + shift, size) for site, chunk, size in each] for each in first]

    def forward(self, part: Part) -> Programs:
        """Programs of a forward launch."""
        return [program for at in part for program in self._forward[at]]

    def backward(self, part: Part) -> Programs:
        """Programs of a backward launch."""
        return [program for at in part for program in self._backward[at]]

    def _touches(self, program: Sequence[Access], features: Site, masks: Site) -> Iterator[Touch]:
        border = len(program) == 1
        for access in program:
            site = Site.BORDER if border else {"masks": masks, "gradient": Site.GRADIENT}.get(access.tensor, features)
            itemsize = 4 if access.tensor == "masks" else DTYPES[self.workload.dtype].itemsize
            apart = self.workload.layout == "nchw" and (access.pixels.step > 1 or len(access.pixels) == 1)
            each = SECTOR if border and apart else itemsize  # as if no two elements of a column shared a sector
            for chunk, elements in self._cut(access):
                yield int(site), chunk, elements * each

    def _cut(self, access: Access) -> Iterator[tuple[int, int]]:
        """Chunks of an access, and how many elements it takes of each."""
        c, h, w = self.workload.levels[access.level]
        across = tuning.ceil_div(h * w, self._pixels)
        key = access.tensor, access.level
        if key not in self._first:
            self._first[key] = self._chunks
            self._chunks += across * tuning.ceil_div(c, self._channels)
        columns = [(i, len(list(own))) for i, own in groupby(access.pixels, lambda p: p // self._pixels)]
        for start in range(access.channels.start, access.channels.stop, self._channels):
            channels = min(self._channels, access.channels.stop - start)
            row = self._first[key] + start // self._channels * across
            for i, pixels in columns:
                yield row + i, channels * pixels


@dataclass(frozen=True)
class Variant:
    """A way to run a step.

    Attributes:
        name: in tables.
        reverse: backward's programs walk from the last to the first.
        evict_first: loads and stores with that hint.
        keep: the share of the cache that features of a forward launch's last programs take with the hint evict_last.
        with_loss: the gradient is computed with the loss, a part at a time, as `tuning.parts` cuts them for half of the cache.
        rescale: whether backward multiplies a finished gradient by the upstream gradient.
    """

    name: str
    reverse: bool = False
    evict_first: tuple[Site, ...] = ()
    keep: float = 0.0
    with_loss: bool = False
    rescale: bool = False

    @property
    def by_site(self) -> list[Hint]:
        """The hint of every load and store."""
        return [Hint.FIRST if site in self.evict_first else Hint.NORMAL for site in Site]

    @property
    def before_backward(self) -> "Variant":
        """What of it matters before backward is called."""
        if self.with_loss:  # then that is all but the rescaling
            return replace(self, name="", rescale=False)
        return Variant("", evict_first=tuple(site for site in self.evict_first if site < Site.BORDER), keep=self.keep)


def parts(workload: Workload, variant: Variant, capacity: int) -> list[Part]:
    """The launches of a step, each for forward and backward."""
    sizes = [3 * c * h * w * DTYPES[workload.dtype].itemsize for c, h, w in workload.levels]
    own = tuning.parts(workload.batch, sizes, capacity // 2) if variant.with_loss else [(range(len(sizes)), 0, workload.batch)]
    return [[(level, start + i) for level in levels for i in range(images)] for levels, start, images in own]


def run(cache: Cache, programs: Iterable[list[Touch]], hints: Sequence[Hint]) -> None:
    """Let a launch touch the cache; ``hints`` by site."""
    border, masks, gradient = int(Site.BORDER), int(Site.FORWARD_MASKS), int(Site.GRADIENT)
    for program in programs:
        for site, chunk, size in program:
            if site == border:
                cache.peek(chunk, size)
            elif site == masks or site == gradient:
                cache.store(chunk, size, hints[site])
            else:
                cache.load(chunk, size, hints[site])


def run_forward(cache: Cache, programs: Programs, hints: Sequence[Hint], keep: float) -> None:
    """A forward launch whose last programs hint that features up to a share ``keep`` of the cache go last."""
    first, left = len(programs), keep * cache.capacity
    while first and (left := left - sum(size for site, _, size in programs[first - 1] if site == Site.FORWARD_FEATURES)) >= 0:
        first -= 1
    run(cache, programs[:first], hints)
    kept = list(hints)
    kept[Site.FORWARD_FEATURES] = Hint.LAST
    run(cache, programs[first:], kept)


class Model:
    """Steps of one workload through a cache of one size."""

    def __init__(self, trace: Trace, capacity: int) -> None:
        self.trace, self.capacity = trace, capacity
        self._before: dict[Variant, Cache] = {}

    def step(self, variant: Variant, between: int) -> Cache:
        """The cache after a step with ``between`` bytes of other work."""
        cache = self._before_backward(variant.before_backward).copy()
        cache.stream(between)
        own = parts(self.trace.workload, variant, self.capacity)
        if not variant.with_loss:
            self._backward(cache, own[0], variant)
        if variant.rescale:
            gradients = (
                touch for part in own for each in self.trace.backward(part) for touch in each if touch[0] == Site.GRADIENT
            )
            for _, chunk, size in gradients:
                cache.load(chunk, size)
                cache.store(chunk, size)
        cache.flush()
        return cache

    def _before_backward(self, variant: Variant) -> Cache:
        """The cache when the criterion returns."""
        if variant not in self._before:
            cache = Cache(self.capacity)
            for part in parts(self.trace.workload, variant, self.capacity):
                run_forward(cache, self.trace.forward(part), variant.by_site, variant.keep)
                if variant.with_loss:
                    self._backward(cache, part, variant)
            self._before[variant] = cache
        return self._before[variant]

    def _backward(self, cache: Cache, part: Part, variant: Variant) -> None:
        programs = self.trace.backward(part)
        run(cache, reversed(programs) if variant.reverse else programs, variant.by_site)


STREAM = (Site.BACKWARD_FEATURES, Site.GRADIENT)
"""What goes first where hints are given: it is not touched again in the step."""
ONE_PASS = (
    Variant("plain"),
    Variant("reverse", reverse=True),
    Variant("hints", evict_first=STREAM),
    Variant("reverse, hints", reverse=True, evict_first=STREAM),
    Variant("hints, keep", evict_first=STREAM, keep=0.75),
)
WITH_LOSS = (
    Variant("with loss", with_loss=True),
    Variant("with loss, reverse", with_loss=True, reverse=True),
    Variant("with loss, hints", with_loss=True, evict_first=STREAM),
)
VARIANTS = (*ONE_PASS, *WITH_LOSS, *(replace(x, name=f"{x.name}, rescaled", rescale=True) for x in WITH_LOSS))


@dataclass(frozen=True)
class Row:
    """A step; bytes in units of one feature tensor of all levels.

    Attributes:
        cache: MiB of L2.
        launches: of the forward and of the backward kernel, each.
        between: MiB of other work between forward and backward.
    """

    layout: str
    images: int
    cache: int
    variant: str
    launches: int
    between: int
    read: float
    written: float
    total: float


def rows(images: Sequence[int] = (2, 16), variants: Sequence[Variant] = VARIANTS) -> Iterator[Row]:
    """All variants of stage 2 on the bfloat16 FPN, in both layouts, on both caches."""
    for layout in LAYOUTS:
        for n in images:
            trace = Trace(replace(WORKLOADS["fpn"], batch=n, dtype="bf16", layout=layout))
            unit = trace.workload.feature_bytes
            for capacity in CACHES:
                model = Model(trace, capacity)
                for variant in variants:
                    launches = len(parts(trace.workload, variant, capacity))
                    for between in BETWEEN:
                        moved = model.step(variant, between)
                        figures = (round(x / unit, 2) for x in (moved.read, moved.written, moved.read + moved.written))
                        yield Row(layout, n, capacity // MIB, variant.name, launches, between // MIB, *figures)


def table(found: Sequence[dict[str, Any]], layout: str) -> str:
    """Bytes of DRAM in Markdown: a column for each batch and cache, and in a cell a figure for each amount of other work."""
    own = [row for row in found if row["layout"] == layout]
    columns = list(dict.fromkeys((row["images"], row["cache"]) for row in own))
    lines = ["| | " + " | ".join(f"N = {n}, {cache} MiB" for n, cache in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in own):
        cells = [
            " / ".join(
                f"{row['total']:.2f}" for row in own if (row["images"], row["cache"], row["variant"]) == (*column, variant)
            )
            for column in columns
        ]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.l2", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    found = [asdict(row) for row in rows()]
    for layout in LAYOUTS:
        print(f"{layout}\n\n{table(found, layout)}\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(environment.describe(torch.device("cpu")) | {"rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
